"""Places for the engines of a server, on machines as Linux shows them; and engines forked onto theirs for real."""

import gc
import logging
import math
import os
import random
import signal
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pace import isa, memory_policy, numa
from pace.memory_policy import Policy
from pace.numa import Allowed, Cpu, Node, Place, Topology
from pace.partition import by_node, leftover, partition, union
from pace.sysfs import format_cpu_list, parse_cpu_list
from tests.test_numa import GENOA, MILAN, SMALL, Machine, cpus_of, in_a_process, linux, native, tasks

LAPTOP = Machine(cores=8, ccx=8)


class Host:
    """A machine and what a process may use of it."""

    def __init__(self, machine, root, cpus=None, memory_nodes=None, quota=None):
        self.topology = numa.topology(machine.write(root))
        usable = {cpu.id for cpu in self.topology.cpus} if cpus is None else parse_cpu_list(cpus)
        self.allowed = Allowed(frozenset(usable), memory_nodes, quota)

    def places(self, engines=None, cores=None, num_threads=None):
        return partition(self.topology, self.allowed, engines, cores, num_threads)

    def cpus(self, *args, **kwargs):
        return [format_cpu_list(place.cpus) for place in self.places(*args, **kwargs)]

    def leftover(self, places):
        return format_cpu_list(leftover(self.topology, self.allowed, places))


def test_a_laptop(tmp_path):
    host = Host(LAPTOP, tmp_path)
    (place,) = host.places()
    assert place == Place((0,), tuple(range(8)), 8, 0)
    assert host.leftover([place]) == "8-15"
    assert host.cpus(3) == ["0-1", "2-4", "5-7"]
    assert host.cpus(8) == [str(cpu) for cpu in range(8)]
    with pytest.raises(ValueError, match="engines is 9; this process may use 8 cores"):
        host.places(9)


def test_without_smt_the_front_has_what_the_engines_have(tmp_path):
    host = Host(replace(LAPTOP, threads=1), tmp_path)
    assert host.leftover(host.places(2)) == "0-7"
    some = Host(replace(LAPTOP, threads=1), tmp_path, "0-5")
    assert some.leftover(some.places(cores="0-1;3")) == "2,4-5"


def test_two_sockets(tmp_path):
    host = Host(replace(MILAN, sockets=2), tmp_path)
    assert host.places() == (
        Place((0,), tuple(range(64)), 64, 0),
        Place((1,), tuple(range(64, 128)), 64, 1),
    )
    assert host.leftover(host.places()) == "128-255"
    assert host.cpus(4) == ["0-31", "32-63", "64-95", "96-127"]
    assert host.cpus(3) == ["0-31", "32-63", "64-127"]
    assert host.cpus(1) == ["0-63"]


def test_fewer_engines_than_nodes_take_the_best(tmp_path):
    machine = replace(GENOA, nps=4, free_gib=(10, 40, 30, 20))
    host = Host(machine, tmp_path)
    assert host.cpus(2) == ["24-47", "48-71"]
    assert host.cpus(3) == ["24-47", "48-71", "72-95"]
    host.allowed = replace(host.allowed, memory_nodes=frozenset({0, 3}))
    assert host.cpus(1) == ["72-95"]
    host.allowed = Allowed(frozenset(parse_cpu_list("0-20,24-40,48-68,72-93")), None, None)
    assert host.cpus(1) == ["72-93"]
    assert host.cpus(2) == ["48-68", "72-93"]


def test_numbers_are_not_assumed_to_run_along_the_l3s(tmp_path):
    """Of the 16 cores of a socket, numbers count round robin over 8 L3s."""
    host = Host(replace(SMALL, sockets=2, nps=4, scattered=True), tmp_path)
    nodes = [
        "0-1,8-9",
        "2-3,10-11",
        "4-5,12-13",
        "6-7,14-15",
        "16-17,24-25",
        "18-19,26-27",
        "20-21,28-29",
        "22-23,30-31",
    ]
    assert host.cpus() == nodes
    assert [place.memory_node for place in host.places()] == list(range(8))
    assert host.cpus(16)[:4] == ["0,8", "1,9", "2,10", "3,11"]
    whole = Host(replace(SMALL, scattered=True), tmp_path / "one node")
    assert whole.cpus(2) == ["0-3,8-11", "4-7,12-15"]
    assert whole.cpus(4) == ["0-1,8-9", "2-3,10-11", "4-5,12-13", "6-7,14-15"]


def test_l3_caches_stay_whole_where_that_is_even_enough(tmp_path):
    one = Host(MILAN, tmp_path / "one")  # 8 caches of 8 cores
    assert one.cpus(2) == ["0-31", "32-63"]
    assert [len(place.cpus) for place in one.places(3)] == [21, 21, 22]  # not 24, 16, 24
    assert [len(place.cpus) for place in one.places(16)] == [4] * 16
    one.allowed = Allowed(frozenset(parse_cpu_list("0-28,32-63")), None, None)  # the fourth has 5 left
    assert one.cpus(2) == ["0-28", "32-63"]  # not 30 and 31
    many = Host(Machine(cores=160, ccx=10), tmp_path / "many")
    assert [len(place.cpus) for place in many.places(3)] == [50, 60, 50]


def test_where_nodes_are_caches_engines_have_sockets(tmp_path):
    host = Host(replace(MILAN, sockets=2, nps=8), tmp_path)
    assert host.places() == (
        Place(tuple(range(8)), tuple(range(64)), 64, None),
        Place(tuple(range(8, 16)), tuple(range(64, 128)), 64, None),
    )
    four = host.places(4)
    assert [place.nodes for place in four] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)]
    assert by_node(host.topology, four) == (four[:2], four[2:])
    assert [(place.nodes, place.memory_node) for place in host.places(16)] == [((node,), node) for node in range(16)]


def test_the_affinity_of_this_process(tmp_path):
    host = Host(replace(MILAN, sockets=2), tmp_path, "4-7,64-67,132-133,192,196-199")
    assert host.cpus() == ["4-7", "64-67,196-199"]  # 132 is 4's sibling, 192 is 64's, and 196 is of a core of its own
    assert host.cpus(3) == ["4-7", "64-67", "196-199"]
    assert host.leftover(host.places()) == "132-133,192"
    with pytest.raises(ValueError, match="engines is 13; this process may use 12 cores"):
        host.places(13)


def test_every_node_has_an_engine_before_any_has_two(tmp_path):
    host = Host(replace(MILAN, sockets=2), tmp_path, "0-39,64-65")
    assert host.cpus() == host.cpus(2) == ["0-39", "64-65"]
    assert host.cpus(4) == ["0-12", "13-25", "26-39", "64-65"]


def test_offline_cpus(tmp_path):
    host = Host(replace(SMALL, sockets=2, offline=(0, 1, 2, 33, 40, 41)), tmp_path)
    assert host.cpus() == ["3-15,32,34", "16-31"]  # 32 and 34 are the other threads of 0 and 2, 33 of 1


def test_memory_nodes(tmp_path):
    with_cxl = Host(replace(SMALL, sockets=2, memory_only=1), tmp_path / "cxl")
    assert [(place.nodes, place.memory_node) for place in with_cxl.places()] == [((0,), 0), ((1,), 1)]
    host = Host(replace(SMALL, sockets=2), tmp_path / "no memory")
    bare = tmp_path / "no memory/sys/devices/system/node/node1/meminfo"
    bare.write_text("Node 1 MemTotal: 0 kB\nNode 1 MemFree: 0 kB\n")
    host.topology = numa.topology(tmp_path / "no memory")
    assert [(place.nodes, place.memory_node) for place in host.places()] == [((0,), 0), ((1,), None)]
    assert host.places(1)[0].nodes == (0,)
    denied = Host(replace(SMALL, sockets=2), tmp_path / "denied", memory_nodes=frozenset({1}))
    assert [place.memory_node for place in denied.places(4)] == [None, None, 1, 1]


@pytest.mark.parametrize(
    ("quota", "engines", "threads"),
    [
        (None, 4, [32, 32, 32, 32]),
        (1000.0, 4, [32, 32, 32, 32]),
        (9.5, 4, [3, 3, 2, 2]),
        (2.0, 4, [1, 1, 1, 1]),
        (70.0, 3, [24, 23, 23]),
        (120.0, 3, [32, 32, 56]),
        (0.5, None, [1]),
        (1.5, None, [1, 1]),
        (6.0, None, [3, 3]),
    ],
)
def test_the_quota_is_shared(tmp_path, quota, engines, threads):
    host = Host(replace(MILAN, sockets=2), tmp_path, quota=quota)
    assert [place.num_threads for place in host.places(engines)] == threads


def test_a_number_of_threads_is_of_each_engine(tmp_path):
    host = Host(replace(MILAN, sockets=2), tmp_path, quota=4.0)
    assert host.places(2, num_threads=8)[1] == Place((1,), tuple(range(64, 128)), 8, 1)
    wide = host.places(4, num_threads=40)[1]
    assert wide == Place((0,), (*range(32, 64), *range(160, 192)), 40, 0)
    with pytest.raises(ValueError, match="num_threads is 0"):
        host.places(2, num_threads=0)


def test_cores_that_are_given_are_taken_as_they_are(tmp_path, caplog):
    host = Host(replace(MILAN, sockets=2), tmp_path)
    assert host.places(cores="3,1, 129;64-66") == (Place((0,), (1, 3, 129), 3, 0), Place((1,), (64, 65, 66), 3, 1))
    assert host.places(2, "0;1") == (Place((0,), (0,), 1, 0), Place((0,), (1,), 1, 0))
    across = host.places(cores="60-67")
    assert across == (Place((0, 1), tuple(range(60, 68)), 8, None),)
    assert host.places(cores="0-3;4-7", num_threads=6)[1] == Place((0,), (4, 5, 6, 7), 6, 0)
    limited = Host(replace(MILAN, sockets=2), tmp_path, quota=5)
    assert [place.num_threads for place in limited.places(cores="0-63;64-65")] == [3, 2]
    assert not caplog.records


def test_engines_that_are_given_siblings_are_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "pace"):
        assert Host(MILAN, tmp_path).cpus(cores="0-31;64-95") == ["0-31", "64-95"]
    assert [record.getMessage() for record in caplog.records] == [
        "cores is '0-31;64-95': two engines share each of 32 physical cores"
    ]


@pytest.mark.parametrize(
    ("cores", "engines", "message"),
    [
        ("0-3;2-5", None, "CPUs 2-3 are in two parts"),
        ("0-3;4;0", None, "CPUs 0 are in two parts"),
        ("0-3;14-18", None, "CPUs 16-18 are offline or not allowed to this process, which may use 0-5,8-15"),
        ("5-8", None, "CPUs 6-7 are offline or not allowed"),
        ("40-43", None, "CPUs 40-43 are offline or not allowed"),
        ("0-3;", None, "each part must list CPUs, as in 0-31;32-63"),
        (";", None, "each part must list CPUs"),
        ("", None, "each part must list CPUs"),
        ("0-3; , ;4", None, "each part must list CPUs"),
        ("0-3;4-x", None, "'4-x' must be a number or a span like 0-31"),
        ("5-3", None, "'5-3' must be a number or a span"),
        ("0-3/4-5", None, "must be a number or a span"),
        ("0-3;4-5", 3, "CPUs for 2 engines, and engines is 3"),
        ("0-3", 0, "engines is 0; it must be at least 1"),
    ],
)
def test_cores_that_cannot_be_are_refused(tmp_path, cores, engines, message):
    host = Host(replace(SMALL, offline=(7,)), tmp_path, "0-5,7-15")
    with pytest.raises(ValueError) as error:
        host.places(engines, cores)
    assert message in str(error.value)
    assert engines == 0 or f"cores is {cores!r}" in str(error.value)


def test_no_core_at_all(tmp_path):
    for engines in (None, 1):
        with pytest.raises(ValueError, match="engines is 1; this process may use 0 cores"):
            Host(SMALL, tmp_path, "100").places(engines)


def test_a_system_that_says_nothing(tmp_path):
    topology, allowed = numa.topology(tmp_path), numa.allowed(tmp_path)
    here = tuple(sorted(allowed.cpus))
    assert partition(topology, allowed) == (Place((0,), here, len(here), 0),)
    assert [len(place.cpus) for place in partition(topology, allowed, len(here))] == [1] * len(here)


def test_union(tmp_path):
    host = Host(replace(MILAN, sockets=2), tmp_path, quota=8)
    places = host.places(4)
    assert by_node(host.topology, places) == (places[:2], places[2:])
    assert union(places[2:]) == Place((1,), tuple(range(64, 128)), 4, 1)
    assert union(places) == Place((0, 1), tuple(range(128)), 8, None)
    assert union(places[:1]) == places[0]
    across = host.places(cores="0-3;60-67;4-7;68")
    assert by_node(host.topology, across) == ((across[0], across[2]), (across[1],), (across[3],))
    denied = Host(replace(MILAN, sockets=2), tmp_path, memory_nodes=frozenset({1})).places(4)
    assert [union(denied[:2]).memory_node, union(denied[2:]).memory_node] == [None, 1]


@given(st.sets(st.integers(0, 300)))
def test_a_list_of_cpus_is_read_as_it_was_written(cpus):
    assert parse_cpu_list(format_cpu_list(cpus)) == tuple(sorted(cpus))


# Any machine: numbers of CPUs are shuffled and have gaps, and a node's L3s may have lost any of their cores.


@st.composite
def hosts(draw):
    sockets, caches, ccx, threads = (draw(st.integers(1, most)) for most in (2, 4, 6, 2))
    nps = draw(st.sampled_from([1, 2, 3, 6]))
    num_cpus = sockets * nps * caches * ccx * threads
    ids = random.Random(draw(st.integers(0, 1000))).sample(range(2 * num_cpus), num_cpus)
    if draw(st.booleans()):
        ids.sort()
    groups = defaultdict(list)
    for at, cpu in enumerate(ids):
        core = at % (num_cpus // threads)
        l3, node = core // ccx, core // (ccx * caches)
        groups[node // nps, node, l3, core].append(cpu)
    lowest = {}
    for (_, _, l3, _), cpus in groups.items():
        lowest[l3] = min(lowest.get(l3, 2 * num_cpus), *cpus)
    l3_is_known = draw(st.booleans())
    cpus = [
        Cpu(cpu, min(group), lowest[l3] if l3_is_known else None, node, socket)
        for (socket, node, l3, _), group in groups.items()
        for cpu in group
    ]
    memory = [(draw(st.sampled_from([0, 1 << 36])), draw(st.integers(0, 9))) for _ in range(sockets * nps)]
    topology = Topology(
        tuple(sorted(cpus, key=lambda cpu: cpu.id)),
        tuple(Node(node, total, free << 30 if total else 0) for node, (total, free) in enumerate(memory)),
    )
    usable = frozenset(draw(st.sets(st.sampled_from(ids), min_size=1))) if draw(st.booleans()) else frozenset(ids)
    memory_nodes = draw(st.none() | st.frozensets(st.integers(0, sockets * nps - 1), min_size=1))
    return topology, Allowed(usable, memory_nodes, draw(st.none() | st.floats(0.1, 100)))


@given(hosts(), st.none() | st.integers(1, 40))
def test_places_are_apart_and_alike(host, engines):
    topology, allowed = host
    of = {cpu.id: cpu for cpu in topology.cpus}
    by_socket = len(topology.nodes) // len({cpu.socket for cpu in topology.cpus}) > 4
    domain = {cpu.id: cpu.socket if by_socket else cpu.node for cpu in topology.cpus}
    cores = defaultdict(set)  # that may be used, by domain
    for cpu in allowed.cpus:
        cores[domain[cpu]].add(of[cpu].core)
    num_cores = {which: len(those) for which, those in cores.items()}
    assume((engines or 1) <= sum(num_cores.values()))

    places = partition(topology, allowed, engines)
    most = len(cores) if allowed.quota is None else min(len(cores), math.ceil(allowed.quota))
    assert len(places) == (engines or most)
    assert set().union(*(place.cpus for place in places)) <= allowed.cpus
    used = [of[cpu].core for place in places for cpu in place.cpus]
    assert len(used) == len(set(used))

    sizes, l3s = defaultdict(list), defaultdict(list)
    for place in places:
        (which,) = {domain[cpu] for cpu in place.cpus}
        sizes[which].append(len(place.cpus))
        assert list(place.cpus) == sorted(place.cpus)
        l3s[which].append({of[cpu].l3 for cpu in place.cpus})
        assert set(place.nodes) == {of[cpu].node for cpu in place.cpus}
        has_memory = len(place.nodes) == 1 and topology.nodes[place.nodes[0]].memory_bytes
        may = allowed.memory_nodes is None or place.nodes[0] in allowed.memory_nodes
        assert place.memory_node == (place.nodes[0] if has_memory and may else None)
    assert list(sizes) == sorted(sizes)
    assert len(sizes) == min(len(places), len(cores))
    for which, those in sizes.items():
        assert sum(those) == num_cores[which]
        touched = Counter(l3 for part in l3s[which] for l3 in part)
        assert sum(touched.values()) <= len(touched) + len(those) - 1  # a cut is through one cache at most
        if max(those) > min(those) + 1:
            assert max(those) <= 1.25 * min(those)
            assert max(touched.values()) == 1
    if len(places) <= len(cores):
        assert all(num_cores[left] <= min(map(sum, sizes.values())) for left in num_cores.keys() - sizes.keys())
    for one, other in ((one, other) for one in sizes for other in sizes if len(sizes[one]) > 1):
        assert num_cores[one] / len(sizes[one]) >= num_cores[other] / (len(sizes[other]) + 1)

    threads = [place.num_threads for place in places]
    quota = len(used) if allowed.quota is None else max(len(places), math.ceil(allowed.quota))
    assert sum(threads) == min(quota, len(used))
    assert all(1 <= place.num_threads <= len(place.cpus) for place in places)
    assert all(place.num_threads + 1 >= max(threads) for place in places if place.num_threads < len(place.cpus))

    rest = leftover(topology, allowed, places)
    taken = {cpu for place in places for cpu in place.cpus}
    assert rest == (allowed.cpus - taken or allowed.cpus)
    groups = by_node(topology, places)
    assert [place for group in groups for place in group] == list(places)
    assert [{domain[cpu] for cpu in union(group).cpus} for group in groups] == [{which} for which in sizes]


# For real: a process of its own that loads a model, and engines forked from it.


def private_bytes():
    """What this process has in memory that no other has: pages that it wrote after it was forked."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Private_Dirty"].split()[0]) << 10


def in_a_child(function):
    """Fork; a function that waits until the child is done, and says whether `function` returned True there."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a child that hangs
        try:
            os._exit(0 if function() is True else 1)
        finally:
            sys.excepthook(*sys.exc_info())
            os._exit(2)
    return lambda: os.waitpid(child, 0)[1] == 0


def fork_engines():
    from pace import LLM, SamplingParams

    cpus = sorted(os.sched_getaffinity(0))
    places = [Place((0,), (cpu,), 2, 0) for cpu in (cpus[0], cpus[-1])]
    numa.bind(union(places))
    llm = LLM("smollm2", kv_cache_bytes=64 << 20, numa=False)

    def generate():
        params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
        return llm.generate("The capital of France is", params)[0].outputs[0].token_ids

    expected = generate()
    assert isa.get_num_threads() == 4
    assert all(bound == sorted({cpus[0], cpus[-1]}) for bound in cpus_of(tasks()))
    gc.collect()
    gc.freeze()

    def serve(place):
        def engine():
            before = private_bytes()
            assert numa.occupy(place)
            same = [generate() == expected for _ in range(3)]
            gc.collect()
            grown = private_bytes() - before
            print(f"{grown / 1e6:.1f} MB of {llm.model.weight_bytes / 1e6:.0f}", file=sys.stderr)
            assert isa.get_num_threads() == 2
            assert cpus_of(tasks()) == [list(place.cpus)] * 2
            assert memory_policy.get_policy() == Policy(memory_policy.PREFERRED, (0,))
            return all(same) and grown < llm.model.weight_bytes / 10

        return engine

    def write():
        """A page that is written is no longer shared, and the measure shows it."""
        table = llm.model.head.embedding.panels
        every_page = table.reshape(-1)[:: 4096 // table.itemsize]
        before = private_bytes()
        every_page[:] = every_page.copy()
        return private_bytes() - before > 0.9 * table.nbytes > llm.model.weight_bytes / 10

    waits = [in_a_child(serve(place)) for place in places]
    assert generate() == expected  # beside the children
    assert all([wait() for wait in waits])
    assert in_a_child(write)()
    assert generate() == expected
    print("shared")


@native
@linux
def test_engines_that_are_forked_share_the_weights(smollm2):
    assert in_a_process(fork_engines) == "shared"


@linux
def test_a_place_that_is_refused_keeps_its_number_of_threads(monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    renewed = []
    numa._warn.cache_clear()
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    monkeypatch.setattr(numa, "set_policy", lambda _: pytest.fail("the memory was bound"))
    monkeypatch.setattr(numa, "_renew_helpers", renewed.append)
    with caplog.at_level(logging.WARNING, "pace"):
        assert not numa.occupy(Place((0,), (0,), 3, 0))
    assert renewed == [3]
    assert [record.getMessage() for record in caplog.records] == [
        "Operation not permitted: threads are not bound to their place"
    ]


def test_where_nothing_can_be_bound_a_place_is_its_number_of_threads(monkeypatch):
    renewed = []
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.setattr(numa, "_renew_helpers", renewed.append)
    assert not numa.occupy(Place((0,), (0,), 3, 0))
    assert renewed == [3]
