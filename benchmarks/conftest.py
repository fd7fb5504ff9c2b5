"""The fixture `race`, and the table at the end of a run with --benchmark.

def bench_NAME(race): race("NAME", x, weight, shape="1 × 2048", num_bytes=..., torch=lambda x, weight: ...)
"""

import os
from dataclasses import dataclass, field
from statistics import median

import pytest
from rich.console import Console

from pace import isa, kernels
from pace.host import Host, describe
from pace.roofline import Roofline, best, measure

from .case import (
    RTOL,
    Result,
    Runner,
    assert_twins_agree,
    cache_holding,
    cold_copies,
    copies,
    has_torch,
    is_affordable,
    kind_of,
    tensors,
    time_side_by_side,
    torch_form,
)
from .table import render


@dataclass
class Run:
    """What the cases of one run share."""

    machine: Host = field(default_factory=describe)
    load: float = field(default_factory=lambda: os.getloadavg()[0])  # of others: nothing has run here yet
    rooflines: dict[str, Roofline] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)


BUSY = 0.25  # others' load a CPU: a parallel call then waits for a descheduled thread, often whole time slices

RUN = pytest.StashKey[Run]()


def pytest_configure(config):
    config.stash[RUN] = Run()


def pytest_generate_tests(metafunc):
    if "rung" in metafunc.fixturenames:
        metafunc.parametrize("rung", metafunc.config.option.benchmark_rungs.split(","), indirect=True)


@pytest.fixture
def rung(request):
    before = isa.runtime.get_rung()
    isa.runtime.set_rung(request.param)
    yield request.param
    isa.runtime.set_rung(before)


@pytest.fixture
def race(request, rung, benchmark):
    """race(name, *arguments, shape=, num_bytes=, flops=0, torch=None, torch_arguments=None, cold=False, rtol=None,
            atol=1e-6)

    Checks the native form of `name` against its twin on copies of the arguments, then times native, twin and `torch`
    side by side: a function of the same arguments, as tensors, or of `torch_arguments` where its layout is another.
    `num_bytes` is what must be read from memory and written to it, `flops` what must be computed: the least time for
    either is the machine's. `cold=True` takes the arguments from memory at each call, as a layer's weights are.
    """
    run = request.config.stash[RUN]
    option = request.config.option
    if rung not in run.rooflines:
        run.rooflines[rung] = measure()

    def runner(form, arguments, cold, convert=tuple):
        sets = cold_copies(arguments, run.machine) if cold else [copies(arguments)]
        return Runner(form, [convert(each) for each in sets], float(option.benchmark_max_time))

    def race(
        name, *arguments, shape, num_bytes, flops=0, torch=None, torch_arguments=None, cold=False, rtol=None, atol=1e-6
    ):
        native, reference = kernels.native(name), kernels.reference(name)
        kind, threads = kind_of(arguments), isa.get_num_threads()
        rtol = RTOL[kind] if rtol is None else rtol
        assert_twins_agree(native, reference, arguments, rtol=rtol, atol=atol)

        peers = {"reference": runner(reference, arguments, cold)}
        if torch and has_torch(threads) and is_affordable(flops, kind, threads):
            peers["torch"] = runner(torch_form(torch), torch_arguments or arguments, cold, tensors)
        time_side_by_side(
            benchmark, runner(native, arguments, cold), list(peers.values()), blocks=option.benchmark_min_rounds
        )
        medians = {f"{peer}_seconds": median(peers[peer].seconds) for peer in peers}
        benchmark.extra_info.update(medians, rung=rung, num_bytes=num_bytes, flops=flops)
        benchmark.group = name
        result = Result(
            operation=name,
            shape=shape,
            dtype=str(kind),
            rung=rung,
            native_seconds=benchmark.stats.stats.median,
            reference_seconds=medians["reference_seconds"],
            torch_seconds=medians.get("torch_seconds"),
            num_bytes=num_bytes,
            flops=flops,
            cache=None if cold else cache_holding(num_bytes, run.machine, threads),
        )
        run.results.append(result)

    return race


def pytest_terminal_summary(terminalreporter, config):
    run = config.stash[RUN]
    if not run.results:
        return
    width = max(terminalreporter._tw.fullwidth, 128)  # where the output is no terminal, pytest says 80
    console = Console(width=width, force_terminal=terminalreporter._tw.hasmarkup, highlight=False)
    for rung in run.rooflines:  # once more: a busy neighbour may have been there the first time
        isa.runtime.set_rung(rung)
        run.rooflines[rung] = best(run.rooflines[rung], measure())
    generation = f" ({run.machine.generation})" if run.machine.generation else ""
    console.print()
    console.print(render(run.results, run.rooflines, f"{run.machine.cpu}{generation}"))
    if run.load > BUSY * run.machine.num_cpus:
        load = f"load {run.load:.1f} on {run.machine.num_cpus} CPUs before the run"
        console.print(f"the machine was busy ({load}): times on several threads mislead\n", style="bold yellow")
