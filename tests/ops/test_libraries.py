"""Backends that are other people's libraries: what is said where one is absent, or lacks something; what they said."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from pace import isa, kernels
from pace.errors import BackendError
from pace.ops import OperatorConfig, registry
from pace.ops.backends import aocl_dlp, tpp
from tests.kernels.arrays import BF16, F32, draw, rng

from .test_ops import clear

needs_native = pytest.mark.skipif(isa.RUNG == "reference", reason="the native kernels: this is the reference rung")
needs_libxsmm = pytest.mark.skipif(registry.missing("TPP") is not None, reason=f"TPP: {registry.missing('TPP')}")
CACHES = tpp.library, tpp.dtypes, tpp.brgemm, tpp._say, aocl_dlp.library, aocl_dlp.dtypes


def forget():
    clear()
    for each in CACHES:
        each.cache_clear()


@pytest.fixture
def anew(monkeypatch):
    """As in a process that has not looked for libraries yet."""
    monkeypatch.setattr(registry, "_registry", registry._registry.copy())
    forget()
    yield
    forget()


LIBRARIES = {"TPP": ("PACE_LIBXSMM", "libxsmm"), "AOCLDLP": ("PACE_AOCL_DLP", "AOCL-DLP")}


@needs_native
@pytest.mark.parametrize("backend", LIBRARIES)
@pytest.mark.parametrize("found", [None, "/nowhere/lib.so", "/dev/null", "libc.so.6"])
def test_a_library_that_is_not_there(anew, monkeypatch, backend, found):
    variable, library = LIBRARIES[backend]
    monkeypatch.delenv(variable, raising=False)
    if found is not None:
        monkeypatch.setenv(variable, found)
    else:
        monkeypatch.setattr(tpp if backend == "TPP" else aocl_dlp, "find_library", lambda name: None)
    message = f"mlp asks for backend {backend}, but {library} can't be loaded .*{variable}.*available here: NATIVE"
    with pytest.raises(ValueError, match=message):
        OperatorConfig(mlp=backend)
    assert registry.serving("norm", "NATIVE", F32) == "NATIVE"


def product(config, kind, rows=7, features=45, outputs=19):
    functions = config.resolve("linear", kind)
    weight = kernels.pack_linear(draw(rng(1), (outputs, features), kind))
    return functions.linear(draw(rng(2), (rows, features), kind), functions.prepare(weight))


@needs_libxsmm
def test_a_dtype_that_libxsmm_lacks(anew, monkeypatch, caplog):
    """As Debian's on AVX2: NATIVE's, with a line in the log."""
    monkeypatch.setattr(tpp, "dtypes", lambda: (F32,))
    with caplog.at_level(logging.WARNING, "pace"):
        ours = product(OperatorConfig.all("TPP"), BF16)
    assert caplog.messages == ["TPP does not serve linear in bfloat16: using NATIVE"]
    assert np.array_equal(ours, product(OperatorConfig.all("NATIVE"), BF16))


@needs_libxsmm
@pytest.mark.parametrize("kernel", ["blocks", "one"])
def test_a_shape_that_libxsmm_lacks(anew, monkeypatch, caplog, kernel):
    config = OperatorConfig.all("TPP")
    expected = product(OperatorConfig.all("NATIVE"), F32, features=130)
    monkeypatch.setattr(type(tpp.library()), kernel, lambda self, *_, **__: 0)
    tpp.brgemm.cache_clear()
    with caplog.at_level(logging.WARNING, "pace"):
        for _ in range(2):
            assert np.array_equal(product(config, F32, features=130), expected)
    assert caplog.messages == ["TPP: libxsmm has no kernel for some rows of 130 features in float32: using NATIVE"]


@needs_libxsmm
def test_kernels_that_are_wrong_are_not_used(anew, monkeypatch):
    """A library of another version, whose numbers mean something else."""
    blocks = type(tpp.library()).blocks
    monkeypatch.setattr(type(tpp.library()), "blocks", lambda self, dtype, rows, x_stride: blocks(self, dtype, 1, 64))
    with pytest.raises(ValueError, match=r"mlp asks for backend TPP, but .* has no kernels that are right here"):
        OperatorConfig(mlp="TPP")


@needs_libxsmm
def test_the_library_is_named():
    assert registry.describe("TPP").startswith(tpp.library().name)


@needs_libxsmm
@pytest.mark.parametrize("rung", [rung for rung in isa.AVAILABLE if rung != "reference"])
def test_libxsmm_uses_the_instructions_of_the_rung(rung):
    asked = {name: value for name, value in os.environ.items() if name != "LIBXSMM_TARGET"} | {"PACE_ISA": rung}
    code = "from pace.ops.backends import tpp; print(tpp.describe())"
    said = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith(f", {tpp.TARGETS[rung].decode()})")


def test_what_aocl_dlp_says_is_heard():
    aocl_dlp.check(aocl_dlp.Metadata(), "nothing")
    for code, words in ((4, "not supported"), (16, "no kernel for this"), (99, "error 99")):
        with pytest.raises(BackendError, match=f"AOCL-DLP: a product: {words}"):
            aocl_dlp.check(aocl_dlp.Metadata(error=code), "a product")


@pytest.mark.skipif(registry.missing("AOCLDLP") is not None, reason=f"AOCLDLP: {registry.missing('AOCLDLP')}")
def test_a_failure_of_aocl_dlp_is_an_error(monkeypatch):
    """Never memory that nobody has written."""
    weight = aocl_dlp.prepare(kernels.pack_linear(draw(rng(1), (19, 45))))
    monkeypatch.setattr(aocl_dlp, "rows_apart", lambda rows: (rows, 1))
    with pytest.raises(BackendError, match="AOCL-DLP: a product of 7 rows, 45 to 19 in float32: invalid leading dim"):
        aocl_dlp.linear(draw(rng(2), (7, 45)), weight)
