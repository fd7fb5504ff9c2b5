"""Draws runs: latency to the first token, time a token, and throughput, over the load."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..plots import DOTS_PER_INCH
from .figures import Percentiles, Point
from .results import Run

# Colours that the colour-blind can tell apart (Okabe and Ito), each with a marker of its own.
_COLOURS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "v"), ("#E69F00", "D"), ("#555555", "x"))
_LINES = {"p50": "-", "p90": "--", "p99": ":"}
_LABELS = {"rate": "requests a second", "concurrency": "requests at a time"}
_SHOWN = ("prompt_tokens", "output_tokens", "prompts")
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
    drawn.legend(handles=_legend(runs), loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    drawn.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
    pyplot.close(drawn)


def _title(run: Run) -> str:
    asked = " · ".join(f"{name.replace('_', ' ')} {run.settings[name]}" for name in _SHOWN if run.settings.get(name))
    return f"{run.model} · {asked}" if asked else run.model


def _row(panels: Sequence[Any], kind: str, runs: Sequence[Run]) -> None:
    points = [point for run in runs for point in run.points if point.kind == kind]
    loads = sorted({point.level for point in points})
    latency, per_token, rates = panels
    _latency(latency, "time to first token, ms", kind, runs, loads, lambda point: point.ttft, "slo_ttft_ms")
    _latency(per_token, "time per output token, ms", kind, runs, loads, lambda point: point.tpot, "slo_tpot_ms")
    for run, (colour, marker) in zip(runs, _styles(runs), strict=True):
        _line(rates, run, kind, loads, lambda point: point.output_rate, color=colour, marker=marker)
    rates.set_title("output tokens a second", fontsize=10)
    rates.set_ylim(0, 1.1 * max((point.output_rate for point in points), default=1) or 1)
    if kind == "rate":
        _line(rates, runs[0], kind, loads, _asked_rate, color="#888888", ls="--", zorder=1)
    for axes in panels:
        axes.set_xticks(range(len(loads)), ["∞" if math.isinf(load) else f"{load:g}" for load in loads])
        axes.set_xlim(-0.25, len(loads) - 0.75)
        axes.set_xlabel(_LABELS[kind], fontsize=9)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)


def _latency(
    axes: Any,
    title: str,
    kind: str,
    runs: Sequence[Run],
    loads: Sequence[float],
    of: Callable[[Point], Percentiles],
    objective: str,
) -> None:
    for run, (colour, marker) in zip(runs, _styles(runs), strict=True):
        for percentile in _percentiles(runs):
            marked = marker if percentile == "p50" else None
            _line(axes, run, kind, loads, _of(of, percentile), color=colour, marker=marked, ls=_LINES[percentile])
    axes.set_title(title, fontsize=10)
    _scale(axes)
    if 0 < (limit := runs[0].settings.get(objective) or 0) < axes.get_ylim()[1]:
        axes.axhline(limit, color="black", linewidth=0.8)
        at = {"transform": axes.get_yaxis_transform(), "fontsize": 8, "verticalalignment": "bottom"}
        axes.text(0.01, limit, "objective", **at)


def _percentiles(runs: Sequence[Run]) -> tuple[str, ...]:
    return ("p50", "p90", "p99") if len(runs) == 1 else ("p50", "p99")


def _asked_rate(point: Point) -> float:
    """Tokens a second, if the server kept up."""
    return point.level * point.asked_tokens / point.answered if point.answered else math.nan


def _of(of: Callable[[Point], Percentiles], percentile: str) -> Callable[[Point], float]:
    return lambda point: float(getattr(of(point), percentile)) * 1e3


def _line(axes: Any, run: Run, kind: str, loads: Sequence[float], of: Callable[[Point], float], **style: Any) -> None:
    points = sorted((loads.index(point.level), of(point)) for point in run.points if point.kind == kind)
    points = [(at, height) for at, height in points if math.isfinite(height)]
    if points:
        axes.plot(*zip(*points, strict=True), markersize=4, linewidth=1.4, **style)


def _scale(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    heights = [value for line in axes.get_lines() for value in line.get_ydata() if value > 0]
    if heights and max(heights) > _LOG_FROM * min(heights):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
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
    lines = [Line2D([], [], color="black", ls=_LINES[name], label=name) for name in _percentiles(runs)]
    if any(point.kind == "rate" for run in runs for point in run.points):
        lines.append(Line2D([], [], color="#888888", ls="--", label="asked for"))
    return servers + lines
