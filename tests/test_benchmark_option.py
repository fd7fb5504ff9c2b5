import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pace import isa

ROOT = Path(__file__).parents[1]
QUICK = ["--benchmark-max-time=0.005", "--benchmark-min-rounds=1", "-p", "no:cacheprovider"]

pytestmark = pytest.mark.skipif(isa.AVAILABLE == ("reference",), reason="a build without native kernels")

WRONG = """
import numpy as np
from pace import kernels

def bench_wrong(race, monkeypatch):
    native = kernels.native("rms_norm")
    monkeypatch.setattr(kernels, "native", lambda name: lambda *arguments: native(*arguments) * np.float32(1.01))
    x = np.ones((2, 16), np.float32)
    race("rms_norm", x, x[0].copy(), shape="2 × 16", num_bytes=2 * x.nbytes)
"""


def run_pytest(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PACE_ISA": "", "COLUMNS": "140"}
    command = [sys.executable, "-m", "pytest", *QUICK, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_prints_one_table_and_writes_json(tmp_path):
    report = tmp_path / "report.json"
    run = run_pytest("--benchmark", "-k", "bench_rms_norm and 1-576", f"--benchmark-json={report}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "of machine" in run.stdout
    assert "rms_norm" in run.stdout
    assert "1 × 576" in run.stdout
    assert "GB/s read" in run.stdout
    assert "native is" in run.stdout
    assert "Rounds" not in run.stdout  # pytest-benchmark's own table
    entries = json.loads(report.read_text())["benchmarks"]
    assert len(entries) == 2
    assert all(entry["extra_info"]["reference_seconds"] > 0 for entry in entries)


def test_rungs_by_name():
    run = run_pytest("--benchmark", "-k", "bench_rms_norm and 1-576", "--benchmark-rungs=avx2")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "bf16   avx2" in run.stdout


def test_a_kernel_that_is_wrong_is_not_timed(tmp_path):
    (tmp_path / "bench_wrong.py").write_text(WRONG)
    plugins = ["-p", "conftest", "-p", "benchmarks.conftest"]  # tmp_path is not below them
    run = run_pytest("-c", "pyproject.toml", *plugins, "--benchmark", str(tmp_path))
    assert run.returncode == 1, run.stdout + run.stderr
    assert "Not equal to tolerance" in run.stdout
    assert "of machine" not in run.stdout


def test_benchmarks_are_no_tests():
    run = run_pytest("benchmarks/kernels/bench_rms_norm.py")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "8 skipped" in run.stdout


def test_a_rung_that_cannot_run_is_refused():
    run = run_pytest("--benchmark", "--benchmark-rungs=avx2,reference")
    assert run.returncode == 4
    assert "cannot run on 'reference'" in run.stderr
