"""The tables: of one run, and of several beside each other."""

import math
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .figures import Percentiles, Point
from .results import Run

_LATE_S = 0.01  # from here on the client, not the server, may be what is slow
_UNITS = {"rate": "req/s", "concurrency": "at a time"}


def render(run: Run) -> RenderableType:
    table = _table(f"{run.name} · {_asked(run)}", "load", "answered", "req/s", "tok/s")
    for name in ("TTFT", "TPOT", "gap", "E2E"):
        for percentile in ("p50", "p90", "p99"):
            table.add_column(f"{name}\n{percentile}", justify="right", no_wrap=True)
    good = any(point.good is not None for point in run.points)
    if good:
        table.add_column("good\nreq/s", justify="right", no_wrap=True)
    for before, point in zip([None, *run.points], run.points, strict=False):
        if before and before.kind != point.kind:
            table.add_section()
        latencies = (cell for each in (point.ttft, point.tpot, point.gap, point.e2e) for cell in _three(each))
        rates = (f"{point.request_rate:.3g}", f"{point.output_rate:.4g}")
        last = (f"{point.goodput:.3g}",) if point.goodput is not None else ()
        table.add_row(level(point), _answered(point), *rates, *latencies, *last)
    note = "milliseconds; tok/s: of output; TTFT and E2E from when a request was due; gap: between pieces of text"
    return Group(table, Text(note, style="dim"), *(Text(each, style="yellow") for each in remarks(run.points)))


def compare(runs: Sequence[Run]) -> RenderableType:
    """Each load under every server; the ratios are to the first one's, above 1 where it is faster."""
    table = _table(_asked(runs[0]), "load", "server", "answered", "tok/s", "")
    for name in ("TTFT\np50", "p99", "TPOT\np50", "p99", "E2E\np50", "p99"):
        table.add_column(name, justify="right", no_wrap=True)
        if name.endswith("p50"):
            table.add_column("", justify="right", no_wrap=True)
    loads = sorted({(point.kind, point.level) for run in runs for point in run.points})
    for load in loads:
        found = [(run.name, point) for run in runs for point in run.points if (point.kind, point.level) == load]
        _, first = found[0]
        for name, point in found:
            cells: list[str | Text] = [
                level(point) if point is first else "",
                name,
                _answered(point),
                f"{point.output_rate:.4g}",
            ]
            cells.append("" if point is first else _ratio(first.output_rate, point.output_rate))
            for ours, theirs in ((first.ttft, point.ttft), (first.tpot, point.tpot), (first.e2e, point.e2e)):
                ratio = "" if point is first else _ratio(theirs.p50, ours.p50)
                cells += [milliseconds(theirs.p50), ratio, milliseconds(theirs.p99)]
            table.add_row(*cells)
        table.add_section()
    notes = [f"×: how much better {runs[0].name} is; milliseconds"]
    others = {_asked(run) for run in runs} - {_asked(runs[0])}
    warnings = [f"not all were asked the same: {each}" for each in sorted(others)]
    return Group(
        table, *(Text(each, style="dim") for each in notes), *(Text(each, style="yellow") for each in warnings)
    )


def remarks(points: Sequence[Point]) -> Iterator[str]:
    """What a reader of the numbers must know."""
    for point in points:
        where = level(point)
        if point.errors:
            each = ", ".join(f"{count} × {error}" for error, count in sorted(point.errors.items()))
            yield f"{where}: {each}; percentiles are of the requests that were answered"
        if point.output_tokens != point.asked_tokens:
            yield f"{where}: {point.output_tokens} tokens of output where {point.asked_tokens} were asked for"
        if not point.counted:
            yield f"{where}: the server counts no tokens (no usage in its stream): pieces of text are taken for tokens"
        if point.lag.p99 > _LATE_S:
            yield f"{where}: the client was late by {milliseconds(point.lag.p99)} ms (p99): it has too little CPU"
    answered = sum(point.output_tokens for point in points)
    if answered:
        cost = sum(point.client_seconds for point in points)
        busy = cost / sum(point.seconds for point in points)
        yield f"the client took {cost / answered * 1e6:.1f} µs of CPU a token of output, {busy:.1%} of one CPU"


def level(point: Point) -> str:
    return f"{'∞' if math.isinf(point.level) else f'{point.level:g}'} {_UNITS[point.kind]}"


def milliseconds(seconds: float) -> str:
    """Three digits, or more; a dash where nothing was measured."""
    if math.isnan(seconds):
        return "–"
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _table(title: str, *names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, title=title, title_justify="left")
    for name in names:
        text = name in ("load", "server")
        table.add_column(name, justify="left" if text else "right", style="bold cyan" if text else "", no_wrap=True)
    return table


def _asked(run: Run) -> str:
    said = (f"{name.replace('_', ' ')} {value}" for name, value in run.settings.items() if value not in (None, {}))
    return " · ".join((run.model, *said))


def _three(percentiles: Percentiles) -> tuple[str, str, str]:
    return milliseconds(percentiles.p50), milliseconds(percentiles.p90), milliseconds(percentiles.p99)


def _answered(point: Point) -> Text:
    text = Text(str(point.answered))
    if point.refused:
        text.append(f" +{point.refused} 429", "yellow")
    if point.other_errors:
        text.append(f" +{point.other_errors} errors", "bold red")
    return text


def _ratio(ours: float, theirs: float) -> Text:
    if not theirs or math.isnan(ours / theirs):
        return Text("")
    ratio = ours / theirs
    return Text(f"×{ratio:.2f}", "green" if ratio >= 1 else "bold red")
