"""Places for the engine processes of one server: no core is in two of them. Starts nothing and binds nothing."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise

from .numa import Allowed, Cpu, Place, Topology, domain_of, domains, memory_node_of, one_of_each_core
from .sysfs import format_cpu_list, parse_cpu_list

logger = logging.getLogger("pace")

# Of a node that is cut between engines: how many times the smallest may be in the largest, for engines that share no
# L3 cache. Three L3s for two engines are cut through the middle one.
_MOST_UNEVEN = 1.25


def partition(
    topology: Topology,
    allowed: Allowed,
    engines: int | None = None,
    cores: str | None = None,
    num_threads: int | None = None,
) -> tuple[Place, ...]:
    """A place for each engine, by node; within a node by L3 cache.

    engines: None for one on each node (one on each socket where nodes are L3 caches), though no more than the CPU quota
    has CPUs. Fewer than nodes: each has a whole node, of those with the most cores. More: nodes are cut, those with
    more cores into more places. A place has one CPU of each of its cores. cores: the CPUs of each engine instead, as in
    "0-31;32-63", taken as they are. num_threads: of each engine; None for one a CPU, though no more of all engines
    together than the quota has CPUs, as long as each has one.

    ValueError for more engines than cores, and for `cores` that are no lists, overlap, are not to be had or are not as
    many as `engines`.
    """
    for name, number in (("engines", engines), ("num_threads", num_threads)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")
    usable = [cpu for cpu in topology.cpus if cpu.id in allowed.cpus]
    if cores is not None:
        parts = _given(cores, engines, usable)
    else:
        parts = _cut_domains(domains(usable, topology, allowed), engines, allowed.quota)
        if num_threads is not None:
            parts = [_with_siblings(part, usable) if num_threads > len(part) else part for part in parts]
    threads = [num_threads] * len(parts) if num_threads else _within_quota([len(part) for part in parts], allowed.quota)
    return tuple(_place(part, count, topology, allowed) for part, count in zip(parts, threads, strict=True))


def by_node(topology: Topology, places: Iterable[Place]) -> tuple[tuple[Place, ...], ...]:
    """The places that one copy of the weights serves: those of one node, or of one socket where nodes are L3 caches."""
    of = domain_of(topology)
    domain = {cpu.id: of(cpu) for cpu in topology.cpus}
    groups: dict[frozenset[int], list[Place]] = defaultdict(list)
    for place in places:
        groups[frozenset(domain[cpu] for cpu in place.cpus)].append(place)
    return tuple(map(tuple, groups.values()))


def union(places: Sequence[Place]) -> Place:
    """The place of all that these have, to load in what they share."""
    nodes = tuple(sorted({node for place in places for node in place.nodes}))
    cpus = tuple(sorted({cpu for place in places for cpu in place.cpus}))
    memory_nodes = {place.memory_node for place in places}
    memory_node = memory_nodes.pop() if len(memory_nodes) == 1 else None
    return Place(nodes, cpus, sum(place.num_threads for place in places), memory_node)


def leftover(topology: Topology, allowed: Allowed, places: Iterable[Place]) -> frozenset[int]:
    """The CPUs for a process beside the engines: those that are in no place, or all where every one is."""
    usable = allowed.cpus & {cpu.id for cpu in topology.cpus}
    return usable - {cpu for place in places for cpu in place.cpus} or usable


def _place(cpus: Iterable[Cpu], num_threads: int, topology: Topology, allowed: Allowed) -> Place:
    cpus = sorted(cpus, key=lambda cpu: cpu.id)
    nodes = tuple(sorted({cpu.node for cpu in cpus}))
    return Place(nodes, tuple(cpu.id for cpu in cpus), num_threads, memory_node_of(nodes, topology, allowed))


def _cut_domains(domains: list[list[Cpu]], engines: int | None, quota: float | None) -> list[list[Cpu]]:
    """domains: the best first. The parts are in the order of the nodes' numbers."""
    by_l3 = [_cores_by_l3(cpus) for cpus in domains]
    num_cores = sum(map(len, by_l3))
    if engines is None:
        engines = max(1, len(domains) if quota is None else min(len(domains), math.ceil(quota)))
    if engines > num_cores:
        raise ValueError(f"engines is {engines}; this process may use {num_cores} cores, and each needs one of its own")
    taken = by_l3[:engines]
    counts = _spread([len(cores) for cores in taken], engines)
    in_order = sorted(zip(taken, counts, strict=True), key=lambda pair: min(cpu.node for cpu in pair[0]))
    return [part for cores, count in in_order for part in _cut(cores, count)]


def _cores_by_l3(cpus: list[Cpu]) -> list[Cpu]:
    """One CPU of each core; those of an L3 cache are neighbours, whatever their numbers."""
    ids = set(one_of_each_core(cpus))
    return sorted((cpu for cpu in cpus if cpu.id in ids), key=lambda cpu: (-1 if cpu.l3 is None else cpu.l3, cpu.id))


def _spread(num_cores: list[int], engines: int) -> list[int]:
    """How many engines each domain has: one, and each further one goes where it has the most cores."""
    counts = [1] * len(num_cores)
    for _ in range(engines - len(num_cores)):
        roomiest = max(range(len(counts)), key=lambda domain: num_cores[domain] / (counts[domain] + 1))
        counts[roomiest] += 1
    return counts


def _cut(cores: list[Cpu], engines: int) -> list[list[Cpu]]:
    """Whole L3 caches for each engine if that is even enough; else cuts fall where they are most even."""
    n = len(cores)
    edges = [0, *(i for i in range(1, n) if cores[i - 1].l3 != cores[i].l3), n]
    whole = [min(edges, key=lambda edge: abs(edge * engines - n * i)) for i in range(engines + 1)]
    even = [n * i // engines for i in range(engines + 1)]
    sizes = [end - begin for begin, end in pairwise(whole)]
    bounds = whole if max(sizes) <= _MOST_UNEVEN * min(sizes) else even
    return [cores[begin:end] for begin, end in pairwise(bounds)]


def _with_siblings(cores: list[Cpu], usable: list[Cpu]) -> list[Cpu]:
    wanted = {cpu.core for cpu in cores}
    return [cpu for cpu in usable if cpu.core in wanted]


def _within_quota(sizes: list[int], quota: float | None) -> list[int]:
    """As many threads as CPUs, where the quota allows; else threads go to those that have the fewest."""
    if quota is None:
        return sizes
    threads = [1] * len(sizes)
    for _ in range(min(sum(sizes), math.ceil(quota)) - len(sizes)):
        fewest = min((i for i, size in enumerate(sizes) if threads[i] < size), key=lambda i: threads[i])
        threads[fewest] += 1
    return threads


def _given(cores: str, engines: int | None, usable: list[Cpu]) -> list[list[Cpu]]:
    try:
        parts = [parse_cpu_list(part) for part in cores.split(";")]
    except ValueError as error:
        raise ValueError(f"cores is {cores!r}: {error}") from None
    if not all(parts):
        raise ValueError(f"cores is {cores!r}: each part must list CPUs, as in 0-31;32-63")
    if engines not in (None, len(parts)):
        raise ValueError(f"cores is {cores!r}: CPUs for {len(parts)} engines, and engines is {engines}")
    known = {cpu.id: cpu for cpu in usable}
    if missing := {cpu for part in parts for cpu in part} - known.keys():
        raise ValueError(
            f"cores is {cores!r}: CPUs {format_cpu_list(missing)} are offline or not allowed to this process, "
            f"which may use {format_cpu_list(known)}"
        )
    for first, second in combinations(parts, 2):
        if both := set(first) & set(second):
            raise ValueError(f"cores is {cores!r}: CPUs {format_cpu_list(both)} are in two parts")
    found = [[known[cpu] for cpu in part] for part in parts]
    for part, other in combinations(found, 2):
        if shared := {cpu.core for cpu in part} & {cpu.core for cpu in other}:
            logger.warning("cores is %r: two engines share each of %d physical cores", cores, len(shared))
    return found
