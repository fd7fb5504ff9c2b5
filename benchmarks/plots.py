"""Plots of what benchmarks.attention measured.

A rate is drawn as its share of the limit beside it, times the limit's median over the run: as if the machine had been
the same throughout.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import Figure

# Colours that the colour-blind can tell apart (Okabe and Ito), each with a marker of its own.
STYLES = {
    "SLAB_POOL": ("#0072B2", "o"),
    "PAGED": ("#D55E00", "s"),
    "BMC": ("#009E73", "^"),
    "DYNAMIC": ("#CC79A7", "v"),
    "torch": ("#555555", "x"),
}
DOTS_PER_INCH = 110


def draw_plots(figures: "Sequence[Figure]", directory: Path) -> None:
    """decode.png and prefill.png, of those parts that were measured."""
    import matplotlib as mpl

    mpl.use("agg")
    directory.mkdir(parents=True, exist_ok=True)
    for part, draw in (("decode", _draw_decode), ("prefill", _draw_prefill)):
        measured = [each for each in figures if each.part == part]
        if measured:
            draw(measured, directory / f"{part}.png")


def _draw_decode(figures: "Sequence[Figure]", path: Path) -> None:
    groups = sorted({each.group for each in figures})
    limit = _limit(figures, "read")
    panels = _panels(len(groups), "keys of the sequence", "GB/s of keys and values")
    for axes, group in zip(panels, groups, strict=True):
        shown = [each for each in figures if each.group == group]
        _curves(axes, shown, partial(_height, "read", limit))
        axes.set_ylim(0, 1.12 * limit / 1e9)
        _line(axes, limit, "read bandwidth")
        axes.set_title(f"{group} query head{'s' * (group > 1)} a key head", fontsize=10)
    _finish(panels, path)


def _draw_prefill(figures: "Sequence[Figure]", path: Path) -> None:
    dtypes = sorted({each.dtype for each in figures})
    panels = _panels(len(dtypes), "tokens of the prompt", "GFLOP/s, causal pairs counted once")
    fma = _limit(figures, "fma")
    highest = max(_limit(figures, name) for name in ("fma", "dot"))
    for axes, dtype in zip(panels, dtypes, strict=True):
        axes.set_ylim(0, 1.1 * highest / 1e9)
        shown = [each for each in figures if each.dtype == dtype]
        own = "dot" if "dot" in shown[0].shares else "fma"
        peak = _limit(shown, own)
        _curves(axes, shown, partial(_height, own, peak))
        _line(axes, fma, "float32 FMA peak")
        if own == "dot":
            _line(axes, peak, "bfloat16 peak")
        axes.set_title(dtype, fontsize=10)
    _finish(panels, path)


def _height(name: str, limit: float, figure: "Figure") -> float:
    return figure.shares[name] * limit


def _limit(figures: "Sequence[Figure]", name: str) -> float:
    return median(each.rates[name] / each.shares[name] for each in figures if name in each.shares)


def _panels(count: int, x_label: str, y_label: str) -> list[Any]:
    from matplotlib import pyplot

    size = (max(3.1 * count, 6.5) + 0.5, 3.4)
    _, panels = pyplot.subplots(1, count, figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axes in panels[0]:
        axes.set_xlabel(x_label)
        axes.set_xscale("log", base=2)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel(y_label)
    return list(panels[0])


def _curves(axes: Any, figures: "Sequence[Figure]", height: "Callable[[Figure], float]") -> None:
    sizes = sorted({each.size for each in figures})
    for name, (colour, marker) in STYLES.items():
        points = sorted((each.size, height(each) / 1e9) for each in figures if each.what == name)
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.4, label=name)
    labels = [f"{size // 1024}k" if size >= 1024 else str(size) for size in sizes]
    axes.set_xticks(sizes, labels)
    axes.minorticks_off()


def _line(axes: Any, limit: float, name: str) -> None:
    axes.axhline(limit / 1e9, color="black", linestyle="--", linewidth=1)
    at = (0.99, limit / 1e9 + 0.01 * axes.get_ylim()[1])
    axes.text(*at, name, transform=axes.get_yaxis_transform(), fontsize=8, horizontalalignment="right")


def _finish(panels: Sequence[Any], path: Path) -> None:
    drawn = panels[0].figure
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    drawn.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
