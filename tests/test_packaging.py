"""What is built and shipped: a pure wheel without a compiler, a native one with, and an sdist that makes either."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePath

import pytest

from pace import isa

ROOT = Path(__file__).parent.parent
SOURCES = {".c", ".h", ".pyx", ".pxd"}

USE = """
import logging; logging.basicConfig()
import numpy as np, pace
from pace import isa, kernels
print(pace.__file__, isa.RUNG, kernels.rms_norm(np.full((1, 4), 2, np.float32), np.ones(4, np.float32), eps=0.0).sum())
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of what the package is built from."""
    copy = tmp_path / "tree"
    leave = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "pace", copy / "pace", ignore=leave)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def python(*args, cwd, check=True, **env):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PACE_")}
    run = subprocess.run(
        [sys.executable, *args], cwd=cwd, env={**environment, **env}, capture_output=True, text=True, check=False
    )
    assert not check or run.returncode == 0, run.stdout + run.stderr
    return run


def pip_wheel(source, out, **kwargs):
    options = "-v --disable-pip-version-check --no-build-isolation --no-deps --no-index".split()
    return python("-m", "pip", "wheel", *options, "-w", str(out), str(source), cwd=out.parent, **kwargs)


def unpack(wheels):
    """The one wheel of a folder, unpacked beside it, and the suffixes of its files."""
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheels / "unpacked")
        names = archive.namelist()
    assert {"pace/py.typed", "pace/server/page.html"} <= set(names)
    suffixes = {PurePath(name).suffix for name in names}
    assert not suffixes & SOURCES
    return wheel, suffixes


def use(wheels, **env):
    """Import the unpacked wheel and run a kernel: its rung, and what was logged."""
    unpacked = wheels / "unpacked"
    run = python("-c", USE, cwd=wheels, PYTHONPATH=str(unpacked), **env)
    file, rung, total = run.stdout.split()
    assert Path(file).is_relative_to(unpacked)
    assert float(total) == 4.0
    return rung, run.stderr


def build_sdist(tree):
    python("-c", "import setuptools.build_meta as build; build.build_sdist('dist')", cwd=tree)
    (sdist,) = tree.glob("dist/*.tar.gz")
    return sdist


@pytest.mark.parametrize(
    ("env", "reason"), [({"PACE_NO_NATIVE": "1"}, "PACE_NO_NATIVE=1"), ({"CC": "no-such-cc"}, "no C compiler found")]
)
def test_without_native_kernels_the_wheel_is_pure_and_runs_the_reference(tree, env, reason):
    wheels, no_cython = tree.parent / "wheels", tree.parent / "no_cython"
    no_cython.mkdir()
    (no_cython / "Cython.py").write_text("raise ImportError")
    run = pip_wheel(tree, wheels, PYTHONPATH=str(no_cython), **env)
    assert f"pace: building without native kernels: {reason}" in run.stdout + run.stderr
    wheel, suffixes = unpack(wheels)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert ".so" not in suffixes
    rung, logged = use(wheels)
    assert rung == "reference"
    assert "WARNING:pace:running on the slow NumPy reference" in logged


@pytest.mark.skipif(isa.runtime is None, reason="the native kernels: this is a build without them")
def test_a_compiler_that_fails_stops_the_build(tree):
    run = pip_wheel(tree, tree.parent / "wheels", check=False, CC="/bin/false")
    assert run.returncode != 0
    assert "/bin/false" in run.stdout + run.stderr


def test_the_sdist_has_every_source(tree):
    wanted = {str(path.relative_to(tree)) for path in tree.glob("pace/**/*") if path.is_file()}
    assert {PurePath(name).suffix for name in wanted} >= SOURCES
    with tarfile.open(build_sdist(tree)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted | {"setup.py", "pyproject.toml", "LICENSE"} <= names
    assert not [name for name in names if name.endswith(".so")]


def test_what_few_need_is_not_imported():
    code = "import sys, pace; from pace import LLM, SamplingParams, StructuredOutputsParams, AsyncEngine\n"
    loaded = python("-c", code + "print(*sys.modules)", cwd=ROOT).stdout.split()
    assert "pace.engine.structured" in loaded
    assert not {"llguidance", "torch", "transformers", "jinja2", "PIL"} & set(loaded)


@pytest.mark.slow
@pytest.mark.skipif(isa.runtime is None, reason="the native kernels: this is a build without them")
def test_a_wheel_of_the_sdist_runs_natively(tree):
    wheels = tree.parent / "wheels"
    pip_wheel(build_sdist(tree), wheels)
    wheel, suffixes = unpack(wheels)
    assert "-none-any" not in wheel.name
    assert ".so" in suffixes
    assert use(wheels)[0] == isa.AVAILABLE[-1]
