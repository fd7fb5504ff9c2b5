"""Topologies as Linux shows them on EPYC, the place chosen on each, and binding for real on this machine."""

import itertools
import logging
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from pace import isa, kernels, memory_policy, numa
from pace.memory_policy import Policy
from pace.numa import Allowed, Cpu, Node, Place
from pace.sysfs import parse_cpu_list

ROOT = Path(__file__).parent.parent
GIB = 1 << 20  # in kB


def as_list(cpus):
    """CPUs as Linux lists them: "0-3,8"."""
    spans = []
    for _, run in itertools.groupby(enumerate(sorted(cpus)), lambda pair: pair[1] - pair[0]):
        run = [cpu for _, cpu in run]
        spans.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(spans)


def write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


@dataclass(frozen=True)
class Machine:
    """A machine whose /sys is written as Linux writes it on EPYC.

    Linux counts cores first, all of socket 0, then all of socket 1, and after them the second threads in the same
    order: the sibling of CPU c is c + the number of cores. A socket's cores are cut into equal nodes, in order; a
    CCX is a run of cores. `scattered` is the firmware that counts round robin over CCXs: neighbouring numbers are then
    of different L3s. core_id starts again in each socket and leaves gaps where cores are fused off; cache ids come from
    APIC ids and have gaps too. An offline CPU has its folder, without topology and cache, and nobody lists it. Node
    folders have `cpulist`, `meminfo` ("Node 0 MemTotal: … kB") and links that nobody reads here.
    """

    cores: int  # of a socket
    ccx: int  # its cores
    sockets: int = 1
    nps: int = 1
    threads: int = 2
    scattered: bool = False
    offline: tuple[int, ...] = ()
    memory_only: int = 0  # nodes without CPUs, after the others
    free_gib: tuple[int, ...] = ()  # of each node, 64 where it is not said

    @property
    def num_cores(self):
        return self.sockets * self.cores

    def place_of(self, core):
        """The socket of a core, its node, and its CCX."""
        socket, within = divmod(core, self.cores)
        num_ccx = self.cores // self.ccx
        ccx = within % num_ccx if self.scattered else within // self.ccx
        return socket, socket * self.nps + ccx * self.nps // num_ccx, socket * num_ccx + ccx

    def cpus(self):
        """(CPU, core, socket, node, CCX) of each that is online."""
        for thread in range(self.threads):
            for core in range(self.num_cores):
                cpu = thread * self.num_cores + core
                if cpu not in self.offline:
                    yield cpu, core, *self.place_of(core)

    def write(self, root):
        system = "sys/devices/system"
        sharing = defaultdict(list)
        for cpu, core, socket, node, ccx in self.cpus():
            for domain in (("core", core), ("socket", socket), ("node", node), ("l3", ccx)):
                sharing[domain].append(cpu)
        for cpu, core, socket, _, ccx in self.cpus():
            topology = f"{system}/cpu/cpu{cpu}/topology"
            write(root, f"{topology}/physical_package_id", socket)
            write(root, f"{topology}/core_id", core % self.cores // self.ccx * 8 + core % self.ccx)
            write(root, f"{topology}/thread_siblings_list", as_list(sharing["core", core]))
            write(root, f"{topology}/core_siblings_list", as_list(sharing["socket", socket]))
            kinds = [(1, "Data", "core", core), (1, "Instruction", "core", core)]
            kinds += [(2, "Unified", "core", core), (3, "Unified", "l3", ccx)]
            for index, (level, kind, domain, number) in enumerate(kinds):
                cache = f"{system}/cpu/cpu{cpu}/cache/index{index}"
                write(root, f"{cache}/level", level)
                write(root, f"{cache}/type", kind)
                write(root, f"{cache}/id", number * 4)
                write(root, f"{cache}/shared_cpu_list", as_list(sharing[domain, number]))
        for cpu in self.offline:
            write(root, f"{system}/cpu/cpu{cpu}/online", 0)
        num_nodes = self.sockets * self.nps + self.memory_only
        for node in range(num_nodes):
            free = self.free_gib[node] if node < len(self.free_gib) else 64
            write(root, f"{system}/node/node{node}/cpulist", as_list(sharing["node", node]))
            meminfo = f"Node {node} MemTotal:    {96 * GIB} kB\nNode {node} MemFree:     {free * GIB} kB"
            write(root, f"{system}/node/node{node}/meminfo", meminfo)
        write(root, f"{system}/cpu/online", as_list(cpu for cpu, *_ in self.cpus()))
        write(root, f"{system}/node/online", as_list(range(num_nodes)))
        return root


MILAN, GENOA = Machine(64, 8), Machine(96, 8)  # 7763, 9654
SMALL = Machine(16, 2)  # 7302
MACHINES = {
    "7763": MILAN,
    "7763 NPS2": replace(MILAN, nps=2),
    "7763 NPS4": replace(MILAN, nps=4),
    "2 7763": replace(MILAN, sockets=2),
    "2 7763 NPS4, no SMT": replace(MILAN, sockets=2, nps=4, threads=1),
    "2 7763 L3 as NUMA": replace(MILAN, sockets=2, nps=8),
    "9654 no SMT": replace(GENOA, threads=1),
    "2 9654 NPS2": replace(GENOA, sockets=2, nps=2),
    "2 9654 NPS4": replace(GENOA, sockets=2, nps=4),
    "7302 scattered": replace(SMALL, scattered=True),
    "2 7302 NPS4 scattered": replace(SMALL, sockets=2, nps=4, scattered=True),
    "2 7302 offline": replace(SMALL, sockets=2, offline=(0, 1, 2, 33, 40, 41)),
    "7302 and CXL": replace(SMALL, memory_only=1),
}
# Of the CPUs that are online: all, a cpuset across nodes, the second threads alone, one in three, one.
CPUSETS = {
    "all": lambda cpus: cpus,
    "across": lambda cpus: cpus[len(cpus) // 8 : len(cpus) // 3],
    "second": lambda cpus: cpus[len(cpus) // 2 :],
    "third": lambda cpus: cpus[::3],
    "one": lambda cpus: cpus[5:6],
}


@pytest.fixture(scope="module", params=MACHINES, ids=str)
def machine(request, tmp_path_factory):
    return MACHINES[request.param], MACHINES[request.param].write(tmp_path_factory.mktemp("machine"))


def test_topology_is_read_as_written(machine):
    model, root = machine
    found = numa.topology(root)
    written = sorted(model.cpus())
    assert [(cpu.id, cpu.socket, cpu.node) for cpu in found.cpus] == [
        (cpu, socket, node) for cpu, _, socket, node, _ in written
    ]
    for part, column in (("core", 1), ("l3", 4)):
        lowest = {}
        for row in written:
            lowest.setdefault(row[column], row[0])
        assert [getattr(cpu, part) for cpu in found.cpus] == [lowest[row[column]] for row in written]
    assert found.num_l3 == model.num_cores // model.ccx
    assert [node.id for node in found.nodes] == list(range(model.sockets * model.nps + model.memory_only))
    assert {node.memory_bytes for node in found.nodes} == {96 << 30}


@pytest.mark.parametrize("quota", [None, 0.5, 3.5, 1000.0])
@pytest.mark.parametrize("cpuset", CPUSETS)
def test_a_place_is_one_cpu_of_each_core_of_one_node(machine, cpuset, quota):
    model, root = machine
    topology = numa.topology(root)
    usable = frozenset(CPUSETS[cpuset]([cpu.id for cpu in topology.cpus]))
    of = {cpu: (core, socket, node) for cpu, core, socket, node, _ in model.cpus()}
    cores_of = defaultdict(set)  # by node, or by socket where nodes are L3 caches
    for cpu in usable:
        core, socket, node = of[cpu]
        cores_of[socket if model.nps > 4 else node].add(core)
    most = max(map(len, cores_of.values()))
    for asked in (None, 1, 2, 7, 10_000):
        place = numa.choose(topology, Allowed(usable, None, quota), asked)
        limit = most if quota is None else min(most, {0.5: 1, 3.5: 4, 1000.0: 1000}[quota])
        if place is None:  # it would change nothing, or no node has so many cores
            as_it_is = most == len(usable) and len(topology.nodes) == 1 and (asked or limit) == (asked or len(usable))
            assert as_it_is or asked > most
            continue
        cores = {of[cpu][0] for cpu in place.cpus}
        assert set(place.cpus) <= usable
        assert len(place.cpus) == len(cores) == most
        assert cores in cores_of.values()
        assert all(cpu == min(other for other in usable if of[other][0] == of[cpu][0]) for cpu in place.cpus)
        assert place.num_threads == (asked or limit)
        assert set(place.nodes) == {of[cpu][2] for cpu in place.cpus}
        assert place.memory_node == (place.nodes[0] if len(place.nodes) == 1 else None)


def chosen(machine, root, cpus=None, num_threads=None, node=None, **limits):
    topology = numa.topology(machine.write(root))
    cpus = frozenset(cpu.id for cpu in topology.cpus) if cpus is None else frozenset(parse_cpu_list(cpus))
    return numa.choose(topology, Allowed(cpus, **{"memory_nodes": None, "quota": None} | limits), num_threads, node)


def test_a_whole_socket(tmp_path):
    everything = tuple(range(64))
    assert chosen(MILAN, tmp_path / "smt") == Place((0,), everything, 64, 0)
    assert chosen(replace(MILAN, threads=1), tmp_path / "no smt") is None
    assert chosen(replace(MILAN, sockets=2), tmp_path / "two") == Place((0,), everything, 64, 0)


def test_siblings_are_of_a_core_whatever_their_numbers(tmp_path):
    two = replace(MILAN, sockets=2)
    assert chosen(two, tmp_path, "4,64-67,130-132,192,196") == Place((1,), (64, 65, 66, 67, 196), 5, 1)
    assert chosen(two, tmp_path, "130,131,200") == Place((0,), (130, 131), 2, 0)


def test_nodes_of_cores_whose_numbers_alternate(tmp_path):
    place = chosen(replace(SMALL, nps=4, scattered=True), tmp_path)
    assert place == Place((0,), (0, 1, 8, 9), 4, 0)


def test_a_tie_goes_to_the_node_with_more_free_memory(tmp_path):
    nodes = replace(GENOA, nps=4, free_gib=(10, 20, 30, 20))
    assert chosen(nodes, tmp_path) == Place((2,), tuple(range(48, 72)), 24, 2)
    assert chosen(nodes, tmp_path, memory_nodes=frozenset({0, 1})) == Place((1,), tuple(range(24, 48)), 24, 1)
    assert chosen(nodes, tmp_path, "0-30,48-60") == Place((0,), tuple(range(24)), 24, 0)


def test_memory_that_may_not_be_used_is_not_asked_for(tmp_path):
    place = chosen(replace(MILAN, sockets=2), tmp_path, "0-63", memory_nodes=frozenset({1}))
    assert (place.nodes, place.memory_node) == ((0,), None)


def test_where_nodes_are_caches_a_place_is_a_socket(tmp_path):
    machine = replace(MILAN, sockets=2, nps=8, free_gib=(1,) * 8)
    place = chosen(machine, tmp_path)
    assert place == Place(tuple(range(8, 16)), tuple(range(64, 128)), 64, None)
    assert chosen(machine, tmp_path, node=3) == Place((3,), tuple(range(24, 32)), 8, 3)


def test_a_number_of_threads_does_not_narrow_the_cpus(tmp_path):
    """Two processes that ask for 8 threads must not share the same 8 CPUs of 64."""
    assert chosen(MILAN, tmp_path, num_threads=8) == Place((0,), tuple(range(64)), 8, 0)
    assert chosen(MILAN, tmp_path, quota=3.5) == Place((0,), tuple(range(64)), 4, 0)
    assert chosen(MILAN, tmp_path, quota=3.5, num_threads=8).num_threads == 8
    assert chosen(replace(MILAN, threads=1), tmp_path / "no smt", quota=3.5).num_threads == 4


def test_more_threads_than_a_node_has_cores_are_left_to_the_system(tmp_path):
    two = replace(MILAN, sockets=2)
    assert chosen(two, tmp_path, num_threads=65) is None
    assert chosen(two, tmp_path, num_threads=65, node=1) == Place((1,), (*range(64, 128), *range(192, 256)), 65, 1)


def test_a_node_that_cannot_be_had_is_refused(tmp_path):
    with pytest.raises(ValueError, match="node is 2; this process may use CPUs of 0, 1"):
        chosen(replace(MILAN, sockets=2), tmp_path, node=2)
    with pytest.raises(ValueError, match="node is 1; this process may use CPUs of 0"):
        chosen(replace(MILAN, sockets=2), tmp_path, "0-63", node=1)
    with pytest.raises(ValueError, match="node is 1"):
        chosen(replace(SMALL, memory_only=1), tmp_path / "memory only", node=1)


def test_a_system_that_says_nothing_is_one_node(tmp_path):
    found = numa.topology(tmp_path)
    assert {cpu.id for cpu in found.cpus} == os.sched_getaffinity(0)
    assert found.cpus[0] == Cpu(min(os.sched_getaffinity(0)), min(os.sched_getaffinity(0)), None, 0, 0)
    assert (found.nodes, found.num_l3) == ((Node(0, None, None),), None)
    assert numa.choose(found, numa.allowed(tmp_path)) is None


@pytest.mark.parametrize("text", ["", "lots", "7-3", "0-3"], ids=["empty", "garbage", "reversed", "too few"])
def test_nodes_that_do_not_add_up_are_one_node(tmp_path, text):
    replace(SMALL, sockets=2).write(tmp_path)
    write(tmp_path, "sys/devices/system/node/node1/cpulist", text)
    found = numa.topology(tmp_path)
    assert found.nodes == (Node(0, None, None),)
    assert numa.choose(found, Allowed(frozenset(range(64)), None, None)) == Place((0,), tuple(range(32)), 32, 0)


def test_garbage_is_unknown_not_an_error(tmp_path):
    SMALL.write(tmp_path)
    for name in ("topology/physical_package_id", "topology/thread_siblings_list", "cache/index3/level"):
        write(tmp_path, f"sys/devices/system/cpu/cpu3/{name}", "?")
    write(tmp_path, "sys/devices/system/node/node0/meminfo", "Node 0 MemTotal: ?")
    write(tmp_path, "proc/self/status", "Mems_allowed_list: all")
    write(tmp_path, "proc/self/cgroup", "nonsense\n0::/")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "a few")
    found = numa.topology(tmp_path)
    assert found.cpus[3] == Cpu(3, 3, None, 0, 0)
    assert found.nodes == (Node(0, None, None),)
    assert numa.allowed(tmp_path, [0]) == Allowed(frozenset({0}), None, None)


def test_the_least_quota_on_the_way_up(tmp_path):
    write(tmp_path, "proc/self/cgroup", "0::/kubepods/pod1/box")
    write(tmp_path, "proc/self/status", "Name:\tpython\nMems_allowed_list:\t0,2-3")
    write(tmp_path, "sys/fs/cgroup/kubepods/pod1/box/cpu.max", "max 100000")
    assert numa.allowed(tmp_path, [1, 2]) == Allowed(frozenset({1, 2}), frozenset({0, 2, 3}), None)
    write(tmp_path, "sys/fs/cgroup/kubepods/cpu.max", "800000 100000")
    assert numa.allowed(tmp_path).quota == 8
    write(tmp_path, "sys/fs/cgroup/kubepods/pod1/cpu.max", "175000 50000")
    assert numa.allowed(tmp_path).quota == 3.5


@pytest.mark.parametrize("where", ["cpu,cpuacct/docker/box", "cpu/docker/box", "cpu,cpuacct"])
def test_the_quota_of_cgroup_v1(tmp_path, where):
    """Inside a container the path may be the host's while the mount is the container's own group."""
    write(tmp_path, "proc/self/cgroup", "9:name=systemd:/a\n4:cpu,cpuacct:/docker/box\n3:cpuset:/other")
    write(tmp_path, f"sys/fs/cgroup/{where}/cpu.cfs_quota_us", 350000)
    write(tmp_path, f"sys/fs/cgroup/{where}/cpu.cfs_period_us", 100000)
    assert numa.allowed(tmp_path).quota == 3.5
    write(tmp_path, f"sys/fs/cgroup/{where}/cpu.cfs_quota_us", -1)
    assert numa.allowed(tmp_path).quota is None


def test_a_group_above_what_the_container_sees(tmp_path):
    write(tmp_path, "proc/self/cgroup", "0::/../../box")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "150000 100000")
    write(tmp_path, "box/cpu.max", "1000 100000")
    assert numa.allowed(tmp_path).quota == 1.5


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3,8", (0, 1, 2, 3, 8)), ("5", (5,)), (" 8, 0-1 ,1", (0, 1, 8)), ("", ())]
)
def test_parse_cpu_list(text, cpus):
    assert parse_cpu_list(text) == cpus


@pytest.mark.parametrize("text", ["a", "3-1", "1-", "-1", "0-3;4", "1 2", "0x1"])
def test_what_is_no_cpu_list_is_refused(text):
    with pytest.raises(ValueError, match="must be a number or a span like 0-31") as error:
        parse_cpu_list(text)
    assert repr(text) in str(error.value)


# For real, each in a process of its own, with this machine's CPUs.


def tasks():
    return {int(task.name) for task in Path("/proc/self/task").iterdir()}


def cpus_of(threads):
    """The CPUs that each of these threads may run on; those that end meanwhile are left out."""
    found = []
    for thread in threads:
        try:
            found.append(sorted(os.sched_getaffinity(thread)))
        except ProcessLookupError:
            continue
    return found


def norm():
    x = np.random.default_rng(0).standard_normal((500, 700)).astype(np.float32)
    return kernels.rms_norm(x, np.ones(700, np.float32))


def gone(threads):
    """Waits until these threads have ended."""
    import time

    end = time.monotonic() + 30
    while threads & tasks():
        assert time.monotonic() < end, "helpers of the crew before are still there"
        time.sleep(0.01)


def bind_and_restore():
    import threading

    all_cpus = sorted(os.sched_getaffinity(0))
    last = all_cpus[-1]
    bystander = threading.Thread(target=threading.Event().wait, args=(60,), daemon=True)
    bystander.start()
    before = tasks()
    isa.set_num_threads(3)
    expected = norm()
    old = tasks() - before
    assert cpus_of(old) == [all_cpus] * 2

    undo = numa.bind(Place((0,), (last,), 1, 0))
    gone(old)
    assert memory_policy.get_policy() == Policy(memory_policy.PREFERRED, (0,))
    bound = tasks() - before
    assert cpus_of([0, *bound]) == [[last]] * 3
    assert np.array_equal(norm(), expected)
    isa.set_num_threads(5)
    assert np.array_equal(norm(), expected)
    later = tasks() - before
    assert later > bound
    assert cpus_of(later) == [[last]] * 4
    assert cpus_of([bystander.native_id]) == [all_cpus]

    numa.restore(undo)
    gone(later)
    assert memory_policy.get_policy() == Policy()
    assert cpus_of([0, *(tasks() - before)]) == [all_cpus] * 5
    assert np.array_equal(norm(), expected)
    print("bound")


def bind_before_any_helper():
    last = max(os.sched_getaffinity(0))
    before = tasks()
    undo = numa.bind(Place((0,), (last,), 3, None))
    num_threads = isa.get_num_threads()
    norm()
    assert cpus_of([0, *(tasks() - before)]) == [[last]] * num_threads
    assert memory_policy.get_policy() == Policy()
    numa.restore(undo)
    print(num_threads, isa.get_num_threads())


def bind_among_calls():
    """Helpers come and go while kernels run, with forks in between."""
    from concurrent.futures import ThreadPoolExecutor

    isa.set_num_threads(3)
    expected, cpus = norm(), tuple(os.sched_getaffinity(0))
    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(norm) for _ in range(60)]
        for turn in range(30):
            numa.bind(Place((0,), cpus[turn % len(cpus) :], 2, None))
            if turn % 10 == 0:
                child = os.fork()
                if child == 0:
                    os._exit(not np.array_equal(norm(), expected))
                assert os.waitpid(child, 0)[1] == 0
        assert all(np.array_equal(result.result(), expected) for result in results)
    assert np.array_equal(norm(), expected)
    print("same")


def settle_here():
    def state():
        return sorted(os.sched_getaffinity(0)), sorted(tasks()), isa.get_num_threads(), memory_policy.get_policy()

    before = state()
    print(numa.settle() is None and state() == before)


def settle_as_on_two_nodes():
    """The CPUs are this machine's, each said to be a node."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    numa.topology = lambda: numa.Topology(
        tuple(Cpu(cpu, cpu, None, node, 0) for node, cpu in enumerate(cpus)), (Node(0, 1, 0), Node(1, 1, 0))
    )
    numa.allowed = lambda: Allowed(frozenset(cpus), frozenset({0}), None)
    before = tasks()

    def state():
        return [isa.get_num_threads(), *cpus_of([0, *(tasks() - before)])]

    first = numa.settle()
    assert first == Place((0,), (cpus[0],), 1, 0)
    assert state() == [1, [cpus[0]]]
    assert memory_policy.get_policy() == Policy(memory_policy.PREFERRED, (0,))
    assert numa.settle() is None  # it is placed
    assert numa.settle(node=1) == Place((1,), (cpus[1],), 1, None)
    assert state() == [1, [cpus[1]]]
    isa.set_num_threads(2)
    assert numa.settle(node=0) == Place((0,), (cpus[0],), 2, 0)
    assert state() == [2, [cpus[0]], [cpus[0]]]
    print("settled")


native = pytest.mark.skipif(isa.RUNG == "reference", reason="the native kernels: this is the reference rung")
linux = pytest.mark.skipif(sys.platform != "linux", reason="binding is Linux's")


def in_a_process(function, **env):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    code = f"import {function.__module__} as here; here.{function.__name__}()"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, "OPENBLAS_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@native
@linux
def test_bind_reaches_this_thread_and_the_helpers_and_no_other():
    assert in_a_process(bind_and_restore) == "bound"


@native
@linux
def test_what_the_user_says_of_threads_wins():
    num_cpus = len(os.sched_getaffinity(0))
    assert in_a_process(bind_before_any_helper) == f"3 {num_cpus}"
    assert in_a_process(bind_before_any_helper, OMP_NUM_THREADS="2") == "2 2"


@native
@linux
def test_binding_among_calls_and_forks():
    assert in_a_process(bind_among_calls) == "same"


@native
@linux
@pytest.mark.skipif(
    len(numa.topology().nodes) > 1 or numa.choose(numa.topology(), numa.allowed()) is not None,
    reason="one node without SMT: this machine has more",
)
def test_settling_on_one_node_changes_nothing():
    assert in_a_process(settle_here) == "True"


@native
@linux
@pytest.mark.skipif(len(numa.allowed().cpus) < 2, reason="two CPUs: this process may use one")
def test_settling():
    assert in_a_process(settle_as_on_two_nodes) == "settled"


@linux
def test_a_memory_policy_that_is_there_is_left(monkeypatch):
    """As under numactl --interleave."""
    monkeypatch.setattr(numa, "get_policy", lambda: Policy(memory_policy.INTERLEAVE, (0, 1)))
    monkeypatch.setattr(numa, "topology", lambda: pytest.fail("settle went on"))
    assert numa.settle() is None


@linux
def test_what_the_system_refuses_is_said_once_and_not_fatal(monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError(1, "set_mempolicy: Operation not permitted")

    numa._warn.cache_clear()
    here = tuple(sorted(os.sched_getaffinity(0)))
    monkeypatch.setattr(numa, "set_policy", refuse)
    with caplog.at_level(logging.WARNING, "pace"):
        undo = numa.bind(Place((0,), here, 2, 0))
        numa.restore(numa.bind(Place((0,), here, 2, 0)))
    assert undo == numa.Before(frozenset(here), None)
    assert [record.getMessage() for record in caplog.records] == [
        "set_mempolicy: Operation not permitted: memory comes from the node of the thread that first writes it"
    ]


@native
@linux
def test_threads_that_may_not_be_bound_stay(monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    numa._warn.cache_clear()
    monkeypatch.setattr(numa, "topology", lambda: numa.Topology((Cpu(0, 0, None, 0, 0), Cpu(1, 0, None, 0, 0)), ()))
    monkeypatch.setattr(numa, "allowed", lambda: Allowed(frozenset({0, 1}), None, None))
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    monkeypatch.setattr(isa, "asked_num_threads", lambda: None)  # other tests may have asked
    before = isa.get_num_threads()
    with caplog.at_level(logging.WARNING, "pace"):
        assert numa.settle() is None
    assert isa.get_num_threads() == before
    assert [record.getMessage() for record in caplog.records] == [
        "Operation not permitted: threads are not bound to their NUMA node"
    ]


@linux
def test_policies_that_are_local():
    assert Policy().is_local
    assert Policy(memory_policy.LOCAL).is_local
    assert Policy(memory_policy.DEFAULT | 1 << 13).is_local
    assert not Policy(memory_policy.PREFERRED, (0,)).is_local
    assert not Policy(memory_policy.INTERLEAVE | 1 << 15, (0, 1)).is_local
