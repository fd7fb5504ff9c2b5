import os
import subprocess
import sys

import pytest

from pace import isa


class Host:
    """A CPU with the features of one rung, under an operating system that saves the registers of another."""

    def __init__(self, rung, saved=None, without=()):
        self.registers = {}
        for name in isa.RUNGS[1 : isa.RUNGS.index(rung) + 1]:
            for feature, (leaf, subleaf, register, bit) in isa.FEATURES[name].items():
                if feature not in without:
                    self.registers.setdefault((leaf, subleaf), [0] * 4)[register] |= 1 << bit
        self.saved = {"reference": 0, **isa.STATE}[saved or rung]

    def cpuid(self, leaf, subleaf):
        return self.registers.get((leaf, subleaf))

    def xcr0(self):
        return self.saved


def put_on(monkeypatch, host):
    monkeypatch.setattr(isa, "runtime", host)
    monkeypatch.setattr(isa, "AVAILABLE", tuple(rung for rung in isa.RUNGS if not isa.missing(rung)))


def test_each_host_has_its_rung(monkeypatch):
    for number, rung in enumerate(isa.RUNGS, 1):
        put_on(monkeypatch, Host(rung))
        assert isa.RUNGS[:number] == isa.AVAILABLE
        assert isa.choose(None) == isa.choose("") == rung
        assert isa.choose("reference") == "reference"


def test_what_is_missing_is_named(monkeypatch):
    put_on(monkeypatch, Host("avx512", without=["AVX512_BF16", "LZCNT"]))
    assert isa.missing("avx512") == ["LZCNT", "AVX512_BF16"]
    assert isa.missing("avx2") == ["LZCNT"]
    put_on(monkeypatch, Host("avx512", saved="avx2"))
    assert isa.missing("avx512") == ["the operating system's support for avx512 registers"]
    assert isa.choose(None) == "avx2"


def test_asking_for_more_than_there_is(monkeypatch):
    put_on(monkeypatch, Host("avx512", without=["AVX512_BF16"]))
    with pytest.raises(RuntimeError, match="'avx512', but this host lacks AVX512_BF16; it can run reference, avx2"):
        isa.choose("avx512")
    put_on(monkeypatch, None)
    with pytest.raises(RuntimeError, match="'avx2', but this host lacks the native kernels"):
        isa.choose("avx2")
    with pytest.raises(ValueError, match="PACE_ISA is 'bogus'; it must be one of reference, avx2, avx512"):
        isa.choose("bogus")


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_pace_isa_is_obeyed_at_import():
    for rung in isa.AVAILABLE:
        result = run("import pace.isa; print(pace.isa.RUNG)", PACE_ISA=rung)
        assert (result.stdout.strip(), result.stderr) == (rung, "")
    result = run("import pace.isa", PACE_ISA="bogus")
    assert result.returncode == 1
    assert "ValueError: PACE_ISA is 'bogus'" in result.stderr


def test_the_reference_is_one_line_of_index():
    result = run("from pace import kernels; print(kernels.rms_norm.__module__)", PACE_ISA="reference")
    assert result.stdout.strip() == "pace.reference.rms_norm"
