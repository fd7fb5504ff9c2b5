import dataclasses

import pytest

from pace import host

GENERATIONS = [
    (0x17, 0x01, "AMD EPYC 7601 32-Core Processor", "Naples, Zen 1"),
    (0x17, 0x31, "AMD EPYC 7742 64-Core Processor", "Rome, Zen 2"),
    (0x19, 0x01, "AMD EPYC 7763 64-Core Processor", "Milan, Zen 3"),
    (0x19, 0x11, "AMD EPYC 9654 96-Core Processor", "Genoa, Zen 4"),
    (0x19, 0x11, "AMD EPYC", "Genoa, Zen 4"),  # a guest whose host hides the number
    (0x19, 0xA0, "AMD EPYC 9754 128-Core Processor", "Bergamo, Zen 4c"),
    (0x19, 0xA0, "AMD EPYC 8534P 64-Core Processor", "Siena, Zen 4c"),
    (0x1A, 0x02, "AMD EPYC 9755 128-Core Processor", "Turin, Zen 5"),
    (0x1A, 0x11, "AMD EPYC 9965 192-Core Processor", "Turin Dense, Zen 5c"),
]

CPUINFO = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9654 96-Core Processor
"""


@pytest.mark.parametrize(("family", "model", "name", "expected"), GENERATIONS)
def test_generation(family, model, name, expected):
    assert str(host.generation(family, model, name)) == expected


@pytest.mark.parametrize(
    ("family", "model", "name"),
    [(0x19, 0x21, "AMD Ryzen 9 5950X"), (6, 143, "Intel(R) Xeon(R) Platinum 8480"), (0x19, 0x50, "AMD EPYC ????")],
)
def test_other_cpus_have_no_generation(family, model, name):
    assert host.generation(family, model, name) is None


def write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


def fake_machine(root, num_cpus=8, cpus_per_l3=4):
    """Two threads a core, two sockets, `num_cpus` / `cpus_per_l3` L3 caches of 32 MiB."""
    write(root, "proc/cpuinfo", CPUINFO)
    write(root, "proc/meminfo", "MemTotal:       1000 kB\nMemFree:  5 kB\nMemAvailable:    600 kB")
    for cpu in range(num_cpus):
        folder = f"sys/devices/system/cpu/cpu{cpu}"
        core, l3 = cpu // 2 * 2, cpu // cpus_per_l3 * cpus_per_l3
        write(root, f"{folder}/topology/physical_package_id", cpu // (num_cpus // 2))
        write(root, f"{folder}/topology/thread_siblings_list", f"{core}-{core + 1}")
        caches = [(1, "Data", "32K", core, 2), (1, "Instruction", "64K", core, 2), (2, "Unified", "1024K", core, 2)]
        for i, (level, kind, size, first, count) in enumerate([*caches, (3, "Unified", "32M", l3, cpus_per_l3)]):
            for name, text in (("level", level), ("type", kind), ("size", size)):
                write(root, f"{folder}/cache/index{i}/{name}", text)
            write(root, f"{folder}/cache/index{i}/shared_cpu_list", f"{first}-{first + count - 1}")
    write(root, "sys/devices/system/node/node0/cpulist", "0-3")
    write(root, "sys/devices/system/node/node1/cpulist", "4-7")
    write(root, "sys/devices/system/node/online", "0-1")


def test_describe(tmp_path):
    fake_machine(tmp_path)
    found = host.describe(tmp_path)
    assert found.num_cpus >= 1
    assert found == host.Host(
        cpu="AMD EPYC 9654 96-Core Processor",
        generation=host.Generation("Genoa", "Zen 4"),
        num_cpus=found.num_cpus,
        threads_per_core=2,
        sockets=2,
        numa_nodes=2,
        l1d_bytes=32 << 10,
        l2_bytes=1 << 20,
        l3_bytes=32 << 20,
        l3_total_bytes=64 << 20,
        memory_bytes=1000 << 10,
        memory_available_bytes=600 << 10,
    )


def test_siblings_as_a_list_and_as_a_span(tmp_path):
    write(tmp_path, "sys/devices/system/cpu/cpu0/topology/thread_siblings_list", "0,96")
    assert host.describe(tmp_path).threads_per_core == 2


def test_an_operating_system_that_says_nothing(tmp_path):
    found = host.describe(tmp_path)
    unknown = ("generation", "threads_per_core", "sockets", "numa_nodes", "l3_total_bytes", "memory_available_bytes")
    assert all(getattr(found, name) is None for name in unknown)
    assert found.num_cpus >= 1


def test_garbage_is_unknown_not_an_error(tmp_path):
    fake_machine(tmp_path, num_cpus=2, cpus_per_l3=2)
    write(tmp_path, "proc/cpuinfo", "model name : AMD EPYC\ncpu family : unknown\nmodel : 1")
    write(tmp_path, "proc/meminfo", "MemAvailable: lots")
    found = host.describe(tmp_path)
    assert (found.generation, found.memory_available_bytes) == (None, None)


def test_this_host():
    assert dataclasses.asdict(host.describe())["cpu"]
