"""Where an engine runs: the CPUs and memory of this machine, those that the process may use, and a place among them.

A place is one CPU of each physical core of one NUMA node, and that node's memory. `settle` is what an engine's loader
calls, before it packs weights; the rest are its steps. Several engines get their places from `partition`, and each
takes its own with `occupy`.
"""

import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path, PurePosixPath

from . import isa
from .memory_policy import PREFERRED, Policy, get_policy, set_policy
from .sysfs import kib, known_cpus, read_cpu_list, read_fields, read_text

logger = logging.getLogger("pace")

_ROOT = Path("/")
_MOST_NODES_PER_SOCKET = 4  # of any EPYC (NPS4), and of Intel's (SNC4): where there are more, each is an L3 cache


@dataclass(frozen=True)
class Cpu:
    """A logical CPU. Cores and L3 domains go by their lowest CPU: the kernel's own numbers have gaps and repeat."""

    id: int
    core: int
    l3: int | None  # None: unknown
    node: int
    socket: int


@dataclass(frozen=True)
class Node:
    """Memory, with CPUs or without (CXL). Bytes are None where they are unknown."""

    id: int
    memory_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True)
class Topology:
    cpus: tuple[Cpu, ...]  # that are online
    nodes: tuple[Node, ...]

    @property
    def num_l3(self) -> int | None:
        """How many L3 domains there are; None where that of some CPU is unknown."""
        domains = {cpu.l3 for cpu in self.cpus}
        return None if None in domains else len(domains)


@dataclass(frozen=True)
class Allowed:
    """What this process may use."""

    cpus: frozenset[int]
    memory_nodes: frozenset[int] | None  # None: any
    quota: float | None  # CPUs' worth of time


@dataclass(frozen=True)
class Place:
    """`nodes` is one node, those of one socket where each L3 cache is a node, or what a user's list of CPUs spans."""

    nodes: tuple[int, ...]
    cpus: tuple[int, ...]
    num_threads: int
    memory_node: int | None  # that memory is taken from; None: that of the thread that first writes it

    def __str__(self) -> str:
        nodes = f"node {self.nodes[0]}" if len(self.nodes) == 1 else f"nodes {', '.join(map(str, self.nodes))}"
        return f"{nodes}: {self.num_threads} threads on {len(self.cpus)} CPUs"


@dataclass(frozen=True)
class Before:
    """What `bind` changed, for `restore`."""

    cpus: frozenset[int]
    policy: Policy | None  # None: it was not changed


def settle(node: int | None = None) -> Place | None:
    """Bind this thread and the kernels' helpers to the best place there is, or to the one on `node`.

    None where there is nothing to do: one node whose cores have one CPU each, more threads asked for than a node has
    cores, or a memory policy that is there already, as under `numactl --interleave`, or after an earlier call. What
    the system refuses is logged, once. Threads and processes that this thread starts later are bound as it is.
    """
    if not hasattr(os, "sched_setaffinity") or (node is None and (isa.RUNG == "reference" or _is_placed())):
        return None
    place = choose(topology(), allowed(), isa.asked_num_threads(), node)
    if place is None or not _permitted(lambda: bind(place), "threads are not bound to their NUMA node"):
        return None
    logger.info("runs on %s", place)
    return place


def bind(place: Place) -> Before:
    """Bind this thread to a place, and raise the kernels' helpers anew, bound as it is. No other thread is touched.

    Threads are not tied to CPUs of their own, nor to as many CPUs as there are threads: two processes that reckon alike
    would then share a few CPUs while others idle.
    """
    before = frozenset(os.sched_getaffinity(0))
    os.sched_setaffinity(0, place.cpus)
    policy = _prefer(place.memory_node) if place.memory_node is not None else None
    _renew_helpers(place.num_threads)
    return Before(before, policy)


def occupy(place: Place) -> bool:
    """`bind` where the system permits it, of a process that keeps to its place, as one that was just forked does.

    What is refused is logged, once; then, and where there is no binding at all, the number of threads is the place's.
    """
    if hasattr(os, "sched_setaffinity") and _permitted(lambda: bind(place), "threads are not bound to their place"):
        return True
    _renew_helpers(place.num_threads)
    return False


def restore(before: Before) -> None:
    """Undo a `bind`, of the thread that calls."""
    os.sched_setaffinity(0, before.cpus)
    if before.policy is not None:
        set_policy(before.policy)
    _renew_helpers(0)


def choose(
    topology: Topology, allowed: Allowed, num_threads: int | None = None, node: int | None = None
) -> Place | None:
    """One CPU of each allowed core of the node with the most of them, then the most free memory, then the lowest.

    There is a thread for each, if the CPU quota allows, or `num_threads`, which is what the user asks for. None where
    the place would be what there is anyway, or where no node has cores for `num_threads`: then the system places them.
    ValueError for a `node` without CPUs that this process may use; one that has them takes any number of threads.
    """
    usable = [cpu for cpu in topology.cpus if cpu.id in allowed.cpus]
    if not usable:
        return None
    cpus = domains(usable, topology, allowed)[0] if node is None else _of_node(usable, node)
    cores = one_of_each_core(cpus)
    if num_threads is not None and num_threads > len(cores):
        if node is None:
            return None
        cores = tuple(cpu.id for cpu in cpus)
    nodes = tuple(sorted({cpu.node for cpu in cpus}))
    within_quota = len(cores) if allowed.quota is None else min(len(cores), max(1, math.ceil(allowed.quota)))
    place = Place(nodes, cores, num_threads or within_quota, memory_node_of(nodes, topology, allowed))
    as_it_is = place.num_threads == (num_threads or len(usable)) and len(cores) == len(usable)
    return None if as_it_is and len(topology.nodes) == 1 else place


def domains(cpus: list[Cpu], topology: Topology, allowed: Allowed) -> list[list[Cpu]]:
    """These CPUs by their node, the best first: that with the most cores, then the most free memory, then the lowest.

    By their socket where nodes are L3 caches, since a cache's link has a small part of the memory's rate, and its
    cores are few.
    """
    of, by_domain = domain_of(topology), defaultdict(list)
    for cpu in cpus:
        by_domain[of(cpu)].append(cpu)

    def rank(cpus: list[Cpu]) -> tuple[int, int, int]:
        nodes = {cpu.node for cpu in cpus}
        free = sum(node.free_bytes or 0 for node in topology.nodes if node.id in nodes and _has_memory(node, allowed))
        return len(one_of_each_core(cpus)), free, -min(nodes)

    return sorted(by_domain.values(), key=rank, reverse=True)


def domain_of(topology: Topology) -> Callable[[Cpu], int]:
    """What tells the domains of CPUs apart: the number of the node, or of the socket where nodes are L3 caches."""
    nodes = {(cpu.socket, cpu.node) for cpu in topology.cpus}
    nodes_are_caches = max(Counter(socket for socket, _ in nodes).values()) > _MOST_NODES_PER_SOCKET
    return attrgetter("socket" if nodes_are_caches else "node")


def _of_node(cpus: list[Cpu], node: int) -> list[Cpu]:
    nodes = sorted({cpu.node for cpu in cpus})
    if node not in nodes:
        raise ValueError(f"node is {node}; this process may use CPUs of {', '.join(map(str, nodes))}")
    return [cpu for cpu in cpus if cpu.node == node]


def one_of_each_core(cpus: list[Cpu]) -> tuple[int, ...]:
    """Two threads on one core would share its vector units, and neither memory nor arithmetic gets faster by that."""
    first: dict[int, int] = {}
    for cpu in sorted(cpus, key=lambda cpu: cpu.id):
        first.setdefault(cpu.core, cpu.id)
    return tuple(sorted(first.values()))


def memory_node_of(nodes: tuple[int, ...], topology: Topology, allowed: Allowed) -> int | None:
    """Of a place's nodes, the one to take memory from; None where there are several, or none with memory."""
    with_memory = [node.id for node in topology.nodes if node.id in nodes and _has_memory(node, allowed)]
    return with_memory[0] if len(nodes) == len(with_memory) == 1 else None


def _has_memory(node: Node, allowed: Allowed) -> bool:
    return node.memory_bytes != 0 and (allowed.memory_nodes is None or node.id in allowed.memory_nodes)


def topology(root: Path = _ROOT) -> Topology:
    """What the /sys under `root` says. Where it says nothing: one node, and each CPU a core."""
    system = root / "sys/devices/system"
    online = read_cpu_list(system / "cpu/online") or _affinity()
    folders = {int(path.name[4:]): path for path in system.glob("node/node[0-9]*") if path.name[4:].isdecimal()}
    node_of = {cpu: node for node, path in sorted(folders.items()) for cpu in read_cpu_list(path / "cpulist")}
    if not node_of.keys() >= online:
        return Topology(tuple(_cpu(system, cpu, 0) for cpu in sorted(online)), (Node(0, None, None),))
    return Topology(
        tuple(_cpu(system, cpu, node_of[cpu]) for cpu in sorted(online)),
        tuple(_node(path, node) for node, path in sorted(folders.items())),
    )


def _cpu(system: Path, cpu: int, node: int) -> Cpu:
    folder = system / f"cpu/cpu{cpu}"
    socket = read_text(folder / "topology/physical_package_id") or ""
    core = min(read_cpu_list(folder / "topology/thread_siblings_list"), default=cpu)
    return Cpu(cpu, core, _l3(folder), node, int(socket) if socket.isdecimal() else 0)


def _l3(folder: Path) -> int | None:
    for index in sorted(folder.glob("cache/index[0-9]*"), reverse=True):
        if read_text(index / "level") == "3":
            return min(read_cpu_list(index / "shared_cpu_list"), default=None)
    return None


def _node(folder: Path, node: int) -> Node:
    memory = read_fields(folder / "meminfo")
    return Node(node, *(kib(memory, f"Node {node} {name}") for name in ("MemTotal", "MemFree")))


def allowed(root: Path = _ROOT, cpus: Iterable[int] | None = None) -> Allowed:
    """What the cpuset, the affinity of this thread (`cpus` in its place, where given) and the CPU quotas leave."""
    memory_nodes = known_cpus(read_fields(root / "proc/self/status").get("Mems_allowed_list"))
    return Allowed(_affinity() if cpus is None else frozenset(cpus), memory_nodes or None, _quota(root))


def _affinity() -> frozenset[int]:
    """The kernel has taken away what is offline or not of the cpuset."""
    return frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def _quota(root: Path) -> float | None:
    """The least of those that the process's control groups set, from its own up to the root of what it can see."""
    mounts = root / "sys/fs/cgroup"
    quotas = []
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            quotas += [_quota_v2(group) for mount in (mounts, mounts / "unified") for group in _up(mount, path)]
        elif "cpu" in controllers.split(","):
            quotas += [_quota_v1(group) for name in (controllers, "cpu") for group in _up(mounts / name, path)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _up(mount: Path, path: str) -> list[Path]:
    """In a container the path may be the host's, and its own group the root of the mount."""
    inside = PurePosixPath(*(part for part in PurePosixPath(path).parts if part not in ("/", "..")))
    return [mount / inside, *(mount / parent for parent in inside.parents)]


def _quota_v2(group: Path) -> float | None:
    quota, _, period = (read_text(group / "cpu.max") or "").partition(" ")
    return _ratio(quota, period)


def _quota_v1(group: Path) -> float | None:
    return _ratio(read_text(group / "cpu.cfs_quota_us") or "", read_text(group / "cpu.cfs_period_us") or "")


def _ratio(quota: str, period: str) -> float | None:
    """None for "max" and -1, which is no limit, too."""
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _prefer(node: int) -> Policy | None:
    """Take memory from `node` as long as it has some; returns the policy before, None where it could not be changed.

    Preferred, not bound to: a node that runs full would end the process while others have memory. And any policy keeps
    automatic NUMA balancing from unmapping the weights, time and again, to see who reads them.
    """
    before = Policy()

    def prefer() -> None:
        nonlocal before
        before = get_policy()
        set_policy(Policy(PREFERRED, (node,)))

    return before if _permitted(prefer, "memory comes from the node of the thread that first writes it") else None


def _is_placed() -> bool:
    try:
        return not get_policy().is_local
    except OSError:
        return False


def _renew_helpers(num_threads: int) -> None:
    if isa.runtime is not None:
        isa.runtime.renew_helpers(num_threads)


def _permitted(action: Callable[[], object], otherwise: str) -> bool:
    try:
        action()
    except OSError as error:
        _warn(f"{error.strerror}: {otherwise}")
        return False
    return True


@cache
def _warn(message: str) -> None:
    """Once for each message."""
    logger.warning("%s", message)
