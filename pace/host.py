"""What this machine is: CPU, caches, NUMA, memory, as the operating system says; what it does not say is None."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from .sysfs import kib, read_cpu_list, read_fields, read_text

# CPUID family, first and last model, codename, core. Bergamo and Siena share their models: the name tells.
_EPYC = (
    (0x17, 0x00, 0x0F, "Naples", "Zen 1"),
    (0x17, 0x30, 0x3F, "Rome", "Zen 2"),
    (0x19, 0x00, 0x0F, "Milan", "Zen 3"),
    (0x19, 0x10, 0x1F, "Genoa", "Zen 4"),
    (0x19, 0xA0, 0xAF, "Bergamo", "Zen 4c"),
    (0x1A, 0x00, 0x0F, "Turin", "Zen 5"),
    (0x1A, 0x10, 0x1F, "Turin Dense", "Zen 5c"),
)


@dataclass(frozen=True)
class Generation:
    """A generation of EPYC: "Genoa", "Zen 4"."""

    codename: str
    core: str

    def __str__(self) -> str:
        return f"{self.codename}, {self.core}"


@dataclass(frozen=True)
class Host:
    """Caches are the size of one instance; `l3_total_bytes` is all L3 together."""

    cpu: str
    generation: Generation | None
    num_cpus: int  # logical CPUs that this process may use
    threads_per_core: int | None
    sockets: int | None
    numa_nodes: int | None
    l1d_bytes: int | None
    l2_bytes: int | None
    l3_bytes: int | None
    l3_total_bytes: int | None
    memory_bytes: int | None
    memory_available_bytes: int | None


def describe(root: Path = Path("/")) -> Host:
    """The host, as the /proc and /sys under `root` describe it."""
    info = read_fields(root / "proc/cpuinfo")
    memory = read_fields(root / "proc/meminfo")
    name = info.get("model name") or platform.processor() or platform.machine()
    devices = root / "sys/devices/system"
    cpus = sorted(devices.glob("cpu/cpu[0-9]*"))
    caches = _caches(cpus)
    sizes = {level: size for (level, _), size in sorted(caches.items(), reverse=True)}
    return Host(
        cpu=name,
        generation=_generation_of(info, name),
        num_cpus=_num_cpus(),
        threads_per_core=_threads_per_core(cpus),
        sockets=len({read_text(cpu / "topology/physical_package_id") for cpu in cpus} - {None}) or None,
        numa_nodes=len(list(devices.glob("node/node[0-9]*"))) or None,
        l1d_bytes=sizes.get(1) or _sysconf("SC_LEVEL1_DCACHE_SIZE"),
        l2_bytes=sizes.get(2) or _sysconf("SC_LEVEL2_CACHE_SIZE"),
        l3_bytes=sizes.get(3) or _sysconf("SC_LEVEL3_CACHE_SIZE"),
        l3_total_bytes=sum(size for (level, _), size in caches.items() if level == 3) or None,
        memory_bytes=kib(memory, "MemTotal") or _physical_memory(),
        memory_available_bytes=kib(memory, "MemAvailable"),
    )


def generation(family: int, model: int, name: str) -> Generation | None:
    """The generation of an AMD EPYC by its CPUID family and model, or None for any other CPU."""
    if "EPYC" not in name:
        return None
    for known, first, last, codename, core in _EPYC:
        if family == known and first <= model <= last:
            siena = codename == "Bergamo" and re.search(r"\b8\d\d4", name)
            return Generation("Siena" if siena else codename, core)
    return None


def _generation_of(info: dict[str, str], name: str) -> Generation | None:
    try:
        return generation(int(info["cpu family"]), int(info["model"]), name)
    except (KeyError, ValueError):
        return None


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads_per_core(cpus: list[Path]) -> int | None:
    siblings = [len(read_cpu_list(cpu / "topology/thread_siblings_list")) for cpu in cpus]
    return max(siblings, default=0) or None


def _caches(cpus: list[Path]) -> dict[tuple[int, str], int]:
    """Bytes of each data cache, by level and the CPUs that share it."""
    caches = {}
    for index in (index for cpu in cpus for index in cpu.glob("cache/index[0-9]*")):
        level, size, kind = (read_text(index / name) for name in ("level", "size", "type"))
        if level and size and kind != "Instruction":
            caches[int(level), read_text(index / "shared_cpu_list") or ""] = _bytes(size)
    return caches


def _bytes(size: str) -> int:
    """The bytes in "32768K"."""
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1:])
    return int(size[:-1]) * unit if unit else int(size)


def _sysconf(name: str) -> int | None:
    """A value that the C library knows; None where it does not."""
    try:
        value = os.sysconf(name)
    except (ValueError, OSError, AttributeError):
        return None
    return value if value > 0 else None


def _physical_memory() -> int | None:
    pages, page_bytes = _sysconf("SC_PHYS_PAGES"), _sysconf("SC_PAGE_SIZE")
    return pages * page_bytes if pages and page_bytes else None
