"""What runs here and how fast it could: the data behind `pace info`, and its rendering."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import isa, kernels, numa
from .host import Host
from .host import describe as describe_host
from .models import DTYPES
from .ops import registry
from .roofline import Roofline, measure

_PACKAGES = ("pace", "numpy", "ml_dtypes", "torch")
SHORT = {"bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class Info:
    """What `pace info` prints, as data."""

    host: Host
    rung: str
    missing: dict[str, list[str]]  # what this host or build lacks, by each higher rung that it cannot run
    operations: dict[str, str]  # the rung that each operation runs on
    num_threads: int  # of kernels that no engine has settled
    l3_domains: int | None
    place: numa.Place | None  # where an engine settles; None: where it is
    versions: dict[str, str | None]  # None: not installed
    roofline: Roofline | None
    operators: dict[str, dict[str, list[str]]] | None  # the dtypes that each backend serves, by operator
    libraries: dict[str, str]  # what backends that are others' libraries have found
    missing_backends: dict[str, str]  # why they cannot run here


def collect(*, roofline: bool = False, operators: bool = False) -> Info:
    """Everything about this host and build; `roofline=True` measures the machine as well (half a second), and
    `operators=True` asks every backend what it serves.
    """
    topology = numa.topology()
    return Info(
        host=describe_host(),
        rung=isa.RUNG,
        missing={rung: isa.missing(rung) for rung in isa.RUNGS if rung not in isa.AVAILABLE},
        operations={name: _rung_of(name) for name in kernels.OPERATIONS},
        num_threads=isa.get_num_threads(),
        l3_domains=topology.num_l3,
        place=numa.choose(topology, numa.allowed(), isa.asked_num_threads()),
        versions={"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        roofline=measure() if roofline else None,
        operators={name: _served(name) for name in registry.OPERATORS} if operators else None,
        libraries=registry.libraries() if operators else {},
        missing_backends=_missing_backends() if operators else {},
    )


def render(info: Info) -> RenderableType:
    """The report, for a terminal."""
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for name, value in _rows(info):
        table.add_row(name, value)
    second = _operations(info) if info.operators is None else _operators(info, info.operators)
    return Group(Text(), table, Text(), second, Text())


def _rows(info: Info) -> list[tuple[str, RenderableType]]:
    host = info.host
    rows: list[tuple[str, RenderableType]] = [
        ("CPU", f"{host.cpu}  [dim]({host.generation})[/]" if host.generation else host.cpu),
        ("cores", _cores(host)),
        ("caches", _caches(host, info.l3_domains)),
        ("memory", f"{_size(host.memory_bytes)}, {_size(host.memory_available_bytes)} available"),
        ("rung", _rung(info)),
        ("threads", _threads(info)),
        ("versions", "  ".join(f"{name} {found or '[dim]not installed[/]'}" for name, found in info.versions.items())),
    ]
    return [*rows, ("roofline", describe_roofline(info.roofline))] if info.roofline else rows


def describe_roofline(roofline: Roofline) -> str:
    """ "50.9 GB/s read · 227 GFLOP/s fp32 · 455 GFLOP/s bf16 (avx512, 2 threads)" """
    threads = _count(roofline.num_threads, "thread")
    how = "as NumPy reaches it" if roofline.rung == "reference" else f"{roofline.rung}, {threads}"
    return (
        f"{roofline.read_bytes_per_second / 1e9:.1f} GB/s read · {roofline.fma_flops / 1e9:.0f} GFLOP/s fp32 · "
        f"{roofline.bf16_flops / 1e9:.0f} GFLOP/s bf16 [dim]({how})[/]"
    )


def _cores(host: Host) -> str:
    parts = [
        f"{host.num_cpus} CPUs usable",
        _count(host.threads_per_core, "thread", " a core"),
        _count(host.sockets, "socket"),
        _count(host.numa_nodes, "NUMA node"),
    ]
    return " · ".join(part for part in parts if part)


def _threads(info: Info) -> str:
    """ "192 · an engine settles on node 1: 48 threads on 48 CPUs" """
    return f"{info.num_threads} · an engine settles on {info.place}" if info.place else str(info.num_threads)


def _caches(host: Host, l3_domains: int | None) -> str:
    domains = f"{_count(l3_domains, 'domain')}, " if l3_domains else ""
    total = f" [dim]({domains}{_size(host.l3_total_bytes)} in all)[/]" if host.l3_total_bytes != host.l3_bytes else ""
    return f"L1d {_size(host.l1d_bytes)} · L2 {_size(host.l2_bytes)} · L3 {_size(host.l3_bytes)}{total}"


def _rung(info: Info) -> str:
    lines = [f"[bold green]{info.rung}[/]"]
    lines += [f"[yellow]not {rung}[/]: this host lacks {', '.join(what)}" for rung, what in info.missing.items()]
    higher = [rung for rung in isa.AVAILABLE if isa.RUNGS.index(rung) > isa.RUNGS.index(info.rung)]
    if higher:
        lines.append(f"[yellow]lowered by PACE_ISA[/]: {higher[-1]} is available")
    return "\n".join(lines)


def _operations(info: Info) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2), pad_edge=False)
    table.add_column("operation", style="cyan")
    table.add_column("rung")
    for name, rung in info.operations.items():
        table.add_row(name, f"[yellow]{rung}[/]" if rung == "reference" else rung)
    return table


def _operators(info: Info, operators: dict[str, dict[str, list[str]]]) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("operator", style="cyan", no_wrap=True)
    for backend in registry.backends():
        table.add_column(backend)
    for name, served in operators.items():
        table.add_row(
            name,
            *(" ".join(SHORT[dtype] for dtype in served[backend]) or "[dim]–[/]" for backend in registry.backends()),
        )
    libraries = [Text(f"{backend}: {library}") for backend, library in info.libraries.items()]
    reasons = [Text(f"{backend}: {why}", style="yellow") for backend, why in info.missing_backends.items()]
    return Group(table, Text(), *libraries, *reasons)


def _served(operator: str) -> dict[str, list[str]]:
    found = {backend: registry.registration(operator, backend) for backend in registry.backends()}
    return {
        backend: [name for name, dtype in DTYPES.items() if own is not None and dtype in own.dtypes]
        for backend, own in found.items()
    }


def _missing_backends() -> dict[str, str]:
    return {name: why for name in registry.backends() if (why := registry.missing(name)) is not None}


def _rung_of(name: str) -> str:
    return "reference" if getattr(kernels, name).__module__.startswith("pace.reference") else isa.RUNG


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _count(count: int | None, noun: str, suffix: str = "") -> str:
    return "" if count is None else f"{count} {noun}{'' if count == 1 else 's'}{suffix}"


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return "?"
    for unit, shift in (("GiB", 30), ("MiB", 20)):
        if num_bytes >= 1 << shift:
            return f"{num_bytes / (1 << shift):.4g} {unit}"
    return f"{num_bytes >> 10} KiB"
