"""The table that ends a benchmark run."""

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pace.info import describe_roofline
from pace.roofline import Roofline

from .case import Result

DTYPES = {"bfloat16": "bf16", "float32": "fp32", "uint8": "uint8"}

Rooflines = dict[str, Roofline]  # by rung


def render(results: Sequence[Result], rooflines: Rooflines, title: str) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, title=title, title_justify="left")
    for name, style in (("operation", "bold cyan"), ("case", ""), ("dtype", ""), ("rung", "")):
        table.add_column(name, style=style, no_wrap=True)
    for name in ("native", "rate", "of machine", "twin", "torch"):
        table.add_column(name, justify="right", no_wrap=True)
    for before, result in zip([None, *results], results, strict=False):
        if before and before.operation != result.operation:
            table.add_section()
        new = before is None or before.operation != result.operation
        table.add_row(result.operation if new else "", *_cells(result, rooflines[result.rung]))
    limits = [Text.from_markup(f"machine  {describe_roofline(roofline)}") for roofline in rooflines.values()]
    note = "(L2): the data fits in that cache and may come faster than memory is read.  ×: the time relative to native."
    missing = "–: not there, or a call would take many seconds (bfloat16 where torch has no instruction for it)."
    notes = [note] if all(result.torch_seconds for result in results) else [note, missing]
    return Group(table, *limits, *(Text(each, style="dim") for each in notes), Text(), verdict(results), Text())


def verdict(results: Sequence[Result]) -> Text:
    """The cases where native is not the fastest."""
    slower = [(result, peer) for result in results if (peer := _fastest_peer(result))[1] < result.native_seconds]
    if not slower:
        return Text(f"native is the fastest in all {len(results)} cases", style="bold green")
    lines = [f"native is not the fastest in {len(slower)} of {len(results)} cases"]
    for result, (peer, seconds) in slower:
        case = f"{result.operation} {result.shape} {DTYPES[result.dtype]} {result.rung}"
        lines.append(f"  {case}: {peer} takes {duration(seconds)}, native {duration(result.native_seconds)}")
    return Text("\n".join(lines), style="yellow")


def _fastest_peer(result: Result) -> tuple[str, float]:
    torch_seconds = float("inf") if result.torch_seconds is None else result.torch_seconds
    return min(("the twin", result.reference_seconds), ("torch", torch_seconds), key=lambda peer: peer[1])


def _cells(result: Result, roofline: Roofline) -> list[str | Text]:
    bf16 = result.dtype == "bfloat16"
    least = roofline.shortest_seconds(result.num_bytes, result.flops, bf16=bf16)
    by_memory = least == roofline.shortest_seconds(result.num_bytes)
    work, unit = (result.num_bytes, "GB/s") if by_memory else (result.flops, "GFLOP/s")
    share = f"{100 * least / result.native_seconds:.0f} %"
    cache = f"({result.cache})" if by_memory and result.cache else "\N{NO-BREAK SPACE}" * 4  # rich strips spaces
    return [
        result.shape,
        DTYPES[result.dtype],
        result.rung,
        Text(duration(result.native_seconds), style="bold"),
        f"{work / result.native_seconds / 1e9:.1f} {unit}",
        Text.assemble(share, " ", (cache, "dim")),
        _peer(result.reference_seconds, result.native_seconds),
        _peer(result.torch_seconds, result.native_seconds),
    ]


def _peer(seconds: float | None, native_seconds: float) -> Text:
    if seconds is None:
        return Text("–", style="dim")
    times = seconds / native_seconds
    digits = f"{times:.0f}" if times >= 100 else f"{times:.2g}" if times >= 10 else f"{times:.2f}"
    return Text.assemble((duration(seconds), "dim"), (f" ×{digits:<4}", "green" if times >= 1 else "bold red"))


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}" if seconds * scale < 999.5 else f"{seconds * scale:.0f} {unit}"
    return f"{seconds * 1e9:.0f} ns"
