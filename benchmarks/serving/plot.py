"""Draws runs: latency to the first token, time a token, and throughput, over the load."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..plots import DOTS_PER_INCH
from .figures import Percentiles, Point
from .report import level
from .results import Run

# Colours that the colour-blind can tell apart (Okabe and Ito), each with a marker of its own.
_COLOURS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "v"), ("#E69F00", "D"), ("#555555", "x"))
_LINES = {"p50": "-", "p90": "--", "p99": ":"}
_LABELS = {"rate": "requests a second", "concurrency": "requests at a time"}
_LOG_FROM = 30.0  # where the highest value is so many times the lowest, the axis is logarithmic


def draw(runs: Sequence[Run], path: Path) -> None:
    """A row of panels for each kind of load; colours are servers, line styles percentiles."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    kinds = [kind for kind in _LABELS if any(point.kind == kind for run in runs for point in run.points)]
    drawn, rows = pyplot.subplots(
        len(kinds), 3, figsize=(10.5, 3.0 * len(kinds) + 0.6), layout="constrained", squeeze=False
    )
    for axes, kind in zip(rows, kinds, strict=True):
        _row(axes, kind, runs)
    if len({run.model for run in runs}) == 1:
        drawn.suptitle(_title(runs[0]), fontsize=10)
    drawn.legend(handles=_legend(runs), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    drawn.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
    pyplot.close(drawn)


def _title(run: Run) -> str:
    asked = " · ".join(f"{name.replace('_', ' ')} {run.settings[name]}" for name in _SHOWN if run.settings.get(name))
    return f"{run.model} · {asked}" if asked else run.model


_SHOWN = ("prompt_tokens", "output_tokens", "prompts")


def _row(panels: Sequence[Any], kind: str, runs: Sequence[Run]) -> None:
    loads = sorted({point.level for run in runs for point in run.points if point.kind == kind})
    names = {point.level: level(point).split()[0] for run in runs for point in run.points if point.kind == kind}
    shown = ("p50", "p90", "p99") if len(runs) == 1 else ("p50", "p99")
    for axes, title, of in (
        (panels[0], "time to first token, ms", lambda point: point.ttft),
        (panels[1], "time per output token, ms", lambda point: point.tpot),
    ):
        for run, (colour, marker) in zip(runs, _styles(runs), strict=True):
            for percentile in shown:
                _line(axes, run, kind, loads, _of(of, percentile), color=colour, marker=marker, ls=_LINES[percentile])
        axes.set_title(title, fontsize=10)
        _scale(axes)
    rates = panels[2]
    for run, (colour, marker) in zip(runs, _styles(runs), strict=True):
        _line(rates, run, kind, loads, lambda point: point.output_rate, color=colour, marker=marker)
    rates.set_title("output tokens a second", fontsize=10)
    rates.set_ylim(bottom=0)
    for axes in panels:
        axes.set_xticks(range(len(loads)), [names[load] for load in loads])
        axes.set_xlim(-0.25, len(loads) - 0.75)
        axes.set_xlabel(_LABELS[kind], fontsize=9)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)


def _of(of: Callable[[Point], Percentiles], percentile: str) -> Callable[[Point], float]:
    return lambda point: float(getattr(of(point), percentile)) * 1e3


def _line(axes: Any, run: Run, kind: str, loads: Sequence[float], of: Callable[[Point], float], **style: Any) -> None:
    points = sorted((loads.index(point.level), of(point)) for point in run.points if point.kind == kind)
    if points:
        axes.plot(*zip(*points, strict=True), markersize=4, linewidth=1.4, **style)


def _scale(axes: Any) -> None:
    heights = [value for line in axes.get_lines() for value in line.get_ydata() if value > 0]
    if heights and max(heights) > _LOG_FROM * min(heights):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)


def _styles(runs: Sequence[Run]) -> list[tuple[str, str]]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(len(runs))]


def _legend(runs: Sequence[Run]) -> list[Any]:
    from matplotlib.lines import Line2D

    servers = [
        Line2D([], [], color=colour, marker=marker, markersize=4, label=run.name)
        for run, (colour, marker) in zip(runs, _styles(runs), strict=True)
    ]
    shown = _LINES if len(runs) == 1 else {name: _LINES[name] for name in ("p50", "p99")}
    return servers + [Line2D([], [], color="black", ls=line, label=name) for name, line in shown.items()]
