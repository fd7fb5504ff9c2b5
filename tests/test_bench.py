"""`pace bench model`, on models so small that only the numbers' being there can be checked."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import models
from pace import bench, host, isa
from pace.bench import Plan, Rounds, Sample, Work
from pace.models import load_model
from pace.models.random_weights import RandomCheckpoint, random_checkpoint
from pace.reference.arrays import float32
from pace.roofline import Roofline

from .models.parity import BASE
from .models.tiny import llama
from .test_cli import run

LIMITS = Roofline(30e9, 200e9, 400e9, 2, "avx512")
SHORT = ["--prompt-tokens", "5,33", "--output-tokens", 3, "--batch", "1,3", "--seconds", 0]


@pytest.fixture(autouse=True)
def known_limits(monkeypatch):
    """Measuring them takes a second, and says nothing of what is tested here."""
    monkeypatch.setattr(bench.Machine, "limits", lambda self: LIMITS)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.json"
    path.write_text(json.dumps(BASE | {"model_type": "llama"}))
    return path


def measured(tmp_path, *arguments):
    """The report, and the table."""
    result = run("bench", "model", *arguments, *SHORT, "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    return json.loads((tmp_path / "report.json").read_text()), result.stdout


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_configuration_is_enough(family, config, tmp_path):
    config.write_text(json.dumps(BASE | {"model_type": family}))
    report, table = measured(tmp_path, "--config", config, "--random")
    assert report["model"] == "small"
    assert report["num_layers"] == 3
    assert report["load_seconds"] > 0
    assert report["memory"]["weights"] == 2 * report["num_weights"]  # bfloat16
    assert report["memory"]["cached"] > 0
    assert report["memory"]["peak"] is None or report["memory"]["peak"] >= report["memory"]["loaded"]
    assert [each["tokens"] for each in report["prefill"]] == [5, 33]
    assert [each["tokens"] for each in report["decode"]] == [1, 3]
    for each in report["prefill"] + report["decode"]:
        assert each["seconds"] > 0
        assert 0 < each["share"] < 1
    assert report["limits"] == asdict(LIMITS)
    for words in ("small", "3 layers", "bfloat16", "prefill, 33 tokens", "decode, 3 at a time", "30.0 GB/s read"):
        assert words in table


def test_a_real_model_needs_no_tokenizer(tmp_path):
    llama().save_pretrained(tmp_path / "tiny")
    report, _ = measured(tmp_path, tmp_path / "tiny")
    assert (report["dtype"], report["num_layers"], report["context"]) == ("float32", 2, 5)
    assert report["num_weights"] == sum(map(np.size, load_file(tmp_path / "tiny" / "model.safetensors").values()))


def test_options_reach_the_machine(config, tmp_path):
    before = isa.get_num_threads()
    options = ["--dtype", "float32", "--cache", "BMC", "--ops", '{"mlp": "REFERENCE"}', "--layers", 2, "--threads", 2]
    report, _ = measured(tmp_path, "--config", config, "--random", *options)
    assert (report["dtype"], report["cache"], report["num_layers"]) == ("float32", "BMC", 2)
    assert report["operators"]["mlp"] == "REFERENCE"
    assert isa.runtime is None or isa.get_num_threads() == 2
    isa.set_num_threads(before)


@pytest.mark.parametrize("cache", ["PAGED", "DYNAMIC"])
def test_every_cache(cache, config, tmp_path):
    assert measured(tmp_path, "--config", config, "--random", "--cache", cache)[0]["cache"] == cache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give a MODEL, or --config FILE --random"),
        (["model", "--config", "c.json"], "give a MODEL, or --config FILE --random"),
        (["--config", "c.json"], "--config and --random go together"),
        (["model", "--random"], "--config and --random go together"),
        (["model", "--layers", "2"], "--layers needs --random"),
        (["model", "--prompt-tokens", "5,many"], "--prompt-tokens is '5,many'; it must be like 128,512"),
        (["model", "--batch", "0"], "--batch is '0'"),
        (["model", "--ops", "{mlp}"], "operators is"),
    ],
)
def test_usage_errors(options, message):
    result = run("bench", "model", *options)
    assert result.exit_code == 2
    assert message in " ".join(re.sub("[│╭╮╰╯─]", "", result.stderr).split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "nowhere.json"], "no config.json at nowhere.json"),
        (["--layers", "9"], "layers is 9; the model has 1 to 3"),
        (["--dtype", "int3"], "dtype is 'int3'"),
        (["--cache", "BAG"], "cache is 'BAG'"),
        (["--prompt-tokens", "290", "--output-tokens", "20"], "290 tokens of prompt and 20 of output do not fit"),
    ],
)
def test_errors_are_one_line(options, message, config):
    result = run("bench", "model", "--config", config, "--random", *options)
    assert result.exit_code == 1
    assert re.fullmatch(rf"pace: .*{message}.*\n", result.stderr), result.stderr


def test_weights_that_do_not_fit_the_memory(config, monkeypatch):
    there = host.describe()
    monkeypatch.setattr(
        bench.host, "describe", lambda: bench.host.Host(**asdict(there) | {"memory_available_bytes": 9})
    )
    result = run("bench", "model", "--config", config, "--random")
    assert "GB are free: build fewer layers (--layers N)" in " ".join(result.stderr.split())


@pytest.mark.parametrize("tensor", ["model.norm.weight", "lm_head.weight"])
def test_what_is_not_finite_is_an_error(tensor, tmp_path):
    llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[tensor] = np.full_like(tensors[tensor], np.inf)
    save_file(tensors, tmp_path / "model.safetensors")
    result = run("bench", "model", tmp_path, *SHORT)
    what = "logits" if tensor == "lm_head.weight" else "hidden states"
    assert result.stderr == f"pace: the {what} of a prompt of 5 tokens hold NaN or infinity\n"


def rounds(config, plan, limits=lambda: LIMITS, dtype="float32"):
    checkpoint = random_checkpoint(config, dtype)
    model = load_model(checkpoint, dtype)
    cache = bench.new_cache(model, "SLAB_POOL", plan, bench.OperatorConfig())
    return Rounds(model, cache, plan, limits), checkpoint


def test_rounds_go_on_for_so_long(config, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(clock)))
    plan = Plan([9, 5], 4, [1, 2], seconds=100)
    measured, _ = rounds(config, plan)
    measured.run()
    # The clock is read twice a pass, 2 + 2 · 4 of them, and once a round.
    assert measured.count == 5
    assert [len(samples) for samples in measured.prefills.values()] == [5, 5]
    assert [len(samples) for samples in measured.steps.values()] == [5, 5]
    assert measured.cache.stats().used_tokens == 0  # and nothing is left


def test_what_a_pass_takes_of_the_machine(config):
    plan = Plan([10, 20], 6, [1, 4], seconds=0)
    measured, checkpoint = rounds(config, plan)
    measured.run()
    model, work = measured.model, Work.of(measured.model, checkpoint)
    hidden, inner, heads, layers = (
        BASE[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    )
    query, key = heads * 16, BASE["num_key_value_heads"] * 16
    assert work.layers == layers * hidden * (2 * query + 2 * key + 3 * inner)
    assert work.head == hidden * BASE["vocab_size"]

    def of_a_second(read, flops):
        return [Sample(1.0, Roofline(read, flops, 2 * flops, 1, "avx512"))]

    step = work.decode(4, plan, of_a_second(1.0, 1e30))
    per_token = 2 * layers * key * 4
    assert (step.bound, step.rate) == ("memory", 4)
    assert step.share == pytest.approx(model.bytes_of_step(4) + (10 + 4 * 3) * per_token)
    prompt = work.prefill(20, of_a_second(1e30, 1.0))
    assert (prompt.bound, prompt.rate) == ("fp32", 20)
    assert prompt.share == pytest.approx(2 * (20 * work.layers + work.head))


def test_limits_are_those_beside_each_pass(config):
    rates = iter((8.0, 4.0, 2.0, 6.0))
    measured, _ = rounds(config, Plan([5], 2, [1, 3], seconds=0), lambda: replace(LIMITS, fma_flops=next(rates)))
    measured.run()
    beside = [samples[0].limits.fma_flops for samples in (measured.prefills[5], measured.steps[1], measured.steps[3])]
    assert beside == [6, 3, 4]
    assert measured.best.fma_flops == 8


def test_the_machine_is_measured_elsewhere(monkeypatch):
    monkeypatch.undo()
    before = bench.peak_bytes()
    with bench.Machine() as machine:
        found = machine.limits()
    assert found.num_threads == isa.get_num_threads()
    assert found.read_bytes_per_second > 1e8
    assert before is None or bench.peak_bytes() - before < 100e6  # the buffer that is read has 256 MB or more


def test_a_token_is_multiplied_with_the_experts_that_it_has(config):
    shapes = {
        "model.embed_tokens.weight": (50, 64),
        "model.layers.0.mlp.router.weight": (8, 64),
        "model.layers.0.mlp.experts.down_proj_blocks": (8, 64, 2, 16),
        "model.layers.0.mlp.experts.down_proj_scales": (8, 64, 2),
        "vision_tower.encoder.layers.0.fc1.weight": (900, 900),
    }
    checkpoint = RandomCheckpoint(config, {"num_experts_per_tok": 2}, shapes, float32, 0)
    assert (Work.of(None, checkpoint).layers, Work.of(None, checkpoint).head) == (8 * 64 + 2 * 64 * 64, 50 * 64)


def test_keys_of_windows(config):
    config.write_text(
        json.dumps(
            BASE | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
        )
    )
    measured, checkpoint = rounds(config, Plan())
    work, per_token = Work.of(measured.model, checkpoint), measured.model.cache_shape.bytes_per_token // 3
    assert work._keys(10) == 10 * 3 * per_token
    assert work._keys(100) == (100 + 16 + 16) * per_token


def test_the_table_of_all_models(monkeypatch, capsys, config):
    monkeypatch.setattr(models, "CONFIGS", config.parent)
    monkeypatch.setattr(models.sys, "argv", ["models", "--options", "--seconds 0 --prompt-tokens 5 --output-tokens 2"])
    (config.parent / "other.json").write_text(json.dumps({"model_type": "mamba"}))

    def in_this_process(command, **_):
        assert command[:3] == [sys.executable, "-m", "pace"]
        result = run(*command[3:])
        return subprocess.CompletedProcess(command, result.exit_code, result.stdout, result.stderr)

    monkeypatch.setattr(models.subprocess, "run", in_this_process)
    with pytest.raises(SystemExit) as ended:
        models.main()
    assert ended.value.code == 1
    header, line, other, small = capsys.readouterr().out.splitlines()
    assert len({row.count("|") for row in (header, line, other, small)}) == 1
    assert re.match(r"\| other \| model_type in .*other.json is 'mamba'; supported are", other)
    assert re.match(
        r"\| small, bfloat16 \| 0.00 \| \d+.\d s \| 0.00, .*\| 5: \d+ \(\d+% of \w+\) \| ×1: .*, ×8: ", small
    )
