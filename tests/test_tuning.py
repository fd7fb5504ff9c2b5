"""`pace bench operators` and OperatorConfig.tuned, on models so small that only the presence of numbers is checked."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from pace import LLM, isa, tuning
from pace.ops import OperatorConfig, registry
from pace.tuning import Report, Timing, choose, measure
from tests.engine.fakes import greedy, write_model
from tests.models.parity import BASE, save
from tests.models.test_gemma3 import GEMMA
from tests.models.test_gpt_oss import GPT_OSS
from tests.models.test_llama import LLAMA

from .test_cli import run

needs_native = pytest.mark.skipif(isa.RUNG == "reference", reason="the native kernels: this is the reference rung")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(tuning, "PAUSE", 0)
    monkeypatch.setattr(tuning, "ROUND_SECONDS", 0.01)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.config"
    path.write_text(json.dumps(BASE | {"model_type": "llama"}))
    return path


def test_operators_side_by_side(config, tmp_path):
    result = run("bench", "operators", "--config", config, "--tokens", "1,5", "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["layers"] == BASE["num_hidden_layers"]
    found = {(each["operator"], each["tokens"], each["backend"]) for each in report["timings"]}
    for operator in ("norm", "qkv_projection", "rope", "attention", "out_projection", "mlp", "embedding", "sampling"):
        for backend in registry.available():
            serves = registry.registration(operator, backend) is not None
            for tokens in (1, 5):
                assert ((operator, tokens, backend) in found) == serves
    assert all(each["seconds"] > 0 for each in report["timings"])
    for text in ("one token after 128", "a prompt of 5 tokens", "qkv_projection", *registry.available(), "tuned"):
        assert text in result.stdout


@pytest.mark.parametrize("family", [GEMMA, GPT_OSS], ids=["windows", "experts"])
def test_operators_of_a_checkpoint(family, tmp_path):
    """Of its shapes and operators; where a table is at both ends, only backends that read it in panels."""
    save(tmp_path, family.make({}))
    report = measure(tmp_path, "float32", tokens=(3,))
    assert {"norm", "mlp" if family is GEMMA else "moe"} <= {each.operator for each in report.timings}
    heads = {each.backend for each in report.timings if each.operator == "lm_head"}
    assert ("JIT" in heads) == ("JIT" in registry.available() and family is not GEMMA)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a MODEL, or --config FILE"),
        (["--config", "CONFIG", "--tokens", "0"], "--tokens is '0'; it must be like 128,512"),
        (["--config", "CONFIG", "--tokens", "1,301"], "tokens is 301; a text of this model has at most 300"),
        (["--config", "CONFIG", "--backends", "FAST"], "backend 'FAST' is unknown; there are NATIVE"),
    ],
)
def test_usage_errors(arguments, message, config):
    result = run("bench", "operators", *[config if each == "CONFIG" else each for each in arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


REPORT = Report("model", "float32", 1, 128, "a CPU", "avx2", 1, {}, [])


@needs_native
def test_the_fastest_is_chosen_for_an_answer():
    """128 tokens for each prompt; NATIVE where another is faster by less than what noise may be."""
    timings = [
        Timing("mlp", 1, "NATIVE", 1.0),
        Timing("mlp", 512, "NATIVE", 10.0),
        Timing("mlp", 1, "IMBPS", 1.1),
        Timing("mlp", 512, "IMBPS", 1.0),
        Timing("norm", 1, "NATIVE", 1.0),
        Timing("norm", 1, "REFERENCE", 0.98),
        Timing("rope", 1, "NATIVE", 1.0),
        Timing("rope", 1, "REFERENCE", 0.5),
    ]
    assert choose(replace(REPORT, timings=timings)) == OperatorConfig(rope="REFERENCE")
    timings[2] = Timing("mlp", 1, "IMBPS", 0.99)
    assert choose(replace(REPORT, timings=timings)) == OperatorConfig(rope="REFERENCE", mlp="IMBPS")


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Where answers are kept."""
    monkeypatch.setenv("PACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tuned"


@pytest.fixture
def asked(monkeypatch):
    """The dtypes that were measured, as it were."""
    dtypes = []

    def counted(model, dtype, backends):
        assert "REFERENCE" not in backends
        dtypes.append(dtype)
        return replace(REPORT, timings=[Timing("rope", 1, "NATIVE", 1.0), Timing("rope", 1, "REFERENCE", 0.5)])

    monkeypatch.setattr(tuning, "measure", counted)
    return dtypes


@needs_native
def test_tuned_is_measured_once(tmp_path, kept, asked):
    write_model(tmp_path / "tiny")
    for dtype in ("float32", "float32", "bfloat16"):
        assert OperatorConfig.tuned(tmp_path / "tiny", dtype) == OperatorConfig(rope="REFERENCE")
    assert asked == ["float32", "bfloat16"]
    assert {file.suffix for file in kept.iterdir()} == {".json"}


@needs_native
def test_what_the_answer_depends_on(tmp_path, kept, asked, monkeypatch):
    write_model(tmp_path / "tiny")

    def again():
        OperatorConfig.tuned(tmp_path / "tiny", "float32")
        return len(asked)

    assert again() == again() == 1
    isa.set_num_threads(isa.get_num_threads() + 1)
    assert again() == 2
    isa.set_num_threads(isa.get_num_threads() - 1)
    library = tmp_path / "libxsmm.so"
    library.write_bytes(b"one")
    for number, name in enumerate(["ONEDNN_MAX_CPU_ISA", "PACE_IMBPS_PIECE", "PACE_LIBXSMM"], 3):
        monkeypatch.setenv(name, str(library))
        assert again() == again() == number
    library.write_bytes(b"another")
    assert again() == 6
    monkeypatch.setattr(tuning, "version", lambda package: "next")
    assert again() == 7


@needs_native
@pytest.mark.parametrize("text", ["", "{}", '{"norm": "NATI', '{"nrom": "NATIVE"}', '{"norm": "GONE"}', "[1]"])
def test_an_answer_that_can_not_be_read_is_found_anew(text, tmp_path, kept, asked):
    write_model(tmp_path / "tiny")
    OperatorConfig.tuned(tmp_path / "tiny", "float32")
    (file,) = kept.iterdir()
    file.write_text(text)
    for _ in range(2):
        assert OperatorConfig.tuned(tmp_path / "tiny", "float32") == OperatorConfig(rope="REFERENCE")
    assert len(asked) == 2


@needs_native
def test_many_are_tuned_at_once(tmp_path, kept, asked):
    write_model(tmp_path / "tiny")
    with ThreadPoolExecutor(8) as threads:
        found = [threads.submit(OperatorConfig.tuned, tmp_path / "tiny", "float32") for _ in range(40)]
        assert all(each.result() == OperatorConfig(rope="REFERENCE") for each in found)
    assert len(list(kept.iterdir())) == 1


def test_a_checkpoint_that_does_not_say_its_dtype(tmp_path, kept, asked):
    """It is what its largest tensor is, as for LLM."""
    save(tmp_path, LLAMA.make({}))
    given = json.loads((tmp_path / "config.json").read_text())
    assert given.pop("dtype", given.pop("torch_dtype", None)) == "float32"
    (tmp_path / "config.json").write_text(json.dumps(given))
    OperatorConfig.tuned(tmp_path)
    assert asked == ["float32"]
    assert measure(tmp_path, tokens=(3,), backends=["REFERENCE"]).dtype == "float32"


def test_texts_that_are_shorter_than_what_is_measured(tmp_path):
    save(tmp_path, LLAMA.make({"max_position_embeddings": 40}))
    report = measure(tmp_path, backends=["REFERENCE"])
    assert report.context == 39
    assert {each.tokens for each in report.timings} == {1, 40}


def test_tuned_runs(tmp_path, kept):
    write_model(tmp_path / "tiny")
    chosen = OperatorConfig.tuned(tmp_path / "tiny", "float32")
    llm = LLM(tmp_path / "tiny", dtype="float32", kv_cache_bytes=1 << 20, operators=chosen)
    assert llm.generate([[5, 6, 7]], greedy(max_tokens=3))[0].outputs[0].token_ids
