import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pace.errors import ModelError
from pace.models.checkpoint import open_checkpoint

from .tiny import arrays, llama


def assert_same_tensors(checkpoint, expected):
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, array in expected.items():
        assert checkpoint.shape(name) == array.shape
        read = checkpoint.read(name)
        assert read.dtype == checkpoint.dtype(name)
        assert not read.flags.writeable
        assert np.array_equal(read.astype(np.float32), array)
        assert np.array_equal(checkpoint.read_rows(name, 1, 3).astype(np.float32), array[1:3])


@pytest.fixture
def directory(tmp_path):
    llama().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    llama(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    return tmp_path


DTYPES = [(torch.float32, np.float32), (torch.float16, np.float16), (torch.bfloat16, ml_dtypes.bfloat16)]


@pytest.mark.parametrize(("stored", "read"), DTYPES, ids=str)
def test_one_file(tmp_path, stored, read):
    model = llama(stored)
    model.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same_tensors(checkpoint, arrays(model))
        assert {checkpoint.dtype(name) for name in checkpoint.names()} == {np.dtype(read)}
        assert checkpoint.config["model_type"] == "llama"
        assert checkpoint.config["hidden_size"] == 64
        assert checkpoint.generation_config["eos_token_id"] == 2


def test_shards(sharded):
    with open_checkpoint(str(sharded)) as checkpoint:
        assert_same_tensors(checkpoint, arrays(llama(torch.bfloat16)))


def test_a_tied_head_is_not_there(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert "lm_head.weight" not in checkpoint.names()
    with pytest.raises(ModelError, match=r"no tensor 'lm_head.weight'"):
        checkpoint.read("lm_head.weight")


def test_arrays_are_views_and_outlive_the_checkpoint(directory):
    checkpoint = open_checkpoint(directory)
    first, again = (checkpoint.read("model.embed_tokens.weight") for _ in range(2))
    assert np.shares_memory(first, again)
    assert np.shares_memory(first, checkpoint.read_rows("model.embed_tokens.weight", 3, 5))
    checkpoint.close()
    assert np.array_equal(first, arrays(llama())["model.embed_tokens.weight"])


def test_tensors_that_are_odd_sizes_scalars_empty_or_unaligned(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    tensors = {"a": np.array(3, np.int8), "b": np.arange(7, dtype=np.uint8), "c": np.zeros((0, 4), np.float32)}
    header = {"odd": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    text += b" " * (5 - len(text) % 8)  # the data begins at no multiple of four
    save_file(tensors, tmp_path / "model-1.safetensors")
    (tmp_path / "model-2.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + np.array([1.5, -2], np.float32).tobytes()
    )
    weight_map = dict.fromkeys(tensors, "model-1.safetensors") | {"odd": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read("a").shape == ()
    assert checkpoint.read("b").tolist() == list(range(7))
    assert checkpoint.read("c").shape == (0, 4)
    assert checkpoint.read("odd").tolist() == [1.5, -2]
    assert checkpoint.read("odd").flags.aligned
    for name in checkpoint.names():
        checkpoint.release(name)


def resident_bytes(path):
    """How much of a file's mappings is in this process's memory."""
    maps = Path("/proc/self/smaps").read_text()
    entries = re.findall(rf" {re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", maps)
    assert entries
    return 1024 * sum(map(int, entries))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="resident memory is read from Linux's /proc")
def test_release_gives_memory_back(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    big = np.ones((1 << 10, 1 << 10), np.float32)
    save_file({"big": big, "small": np.arange(5.0)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    view = checkpoint.read("big")
    assert view.sum() == big.size
    assert resident_bytes(tmp_path / "model.safetensors") >= big.nbytes
    checkpoint.release("big")
    assert resident_bytes(tmp_path / "model.safetensors") < big.nbytes // 10
    assert np.array_equal(view, big)  # fetched again


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_torch_files(tmp_path, stored):
    model = llama(stored)
    model.config.save_pretrained(tmp_path)
    names = sorted(model.state_dict())
    for number in (1, 2):
        part = {name: model.state_dict()[name] for name in names[number - 1 :: 2]}
        torch.save(part, tmp_path / f"pytorch_model-{number}.bin")
    weight_map = {name: f"pytorch_model-{1 + i % 2}.bin" for i, name in enumerate(names)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert_same_tensors(checkpoint, arrays(model))
        checkpoint.release(names[0])


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_torch_files_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    assert_refused(tmp_path, r"pytorch_model\.bin is corrupt")
    assert not Path("evil").exists()


def assert_refused(path, match):
    with pytest.raises(ModelError, match=match) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_no_such_path(tmp_path):
    assert_refused(tmp_path / "nothing", "no model at .*nothing: give")


def test_no_config(directory):
    (directory / "config.json").unlink()
    assert_refused(directory, r"has no config\.json: give")


def test_config_that_is_not_json(directory):
    (directory / "config.json").write_text("<html>")
    assert_refused(directory, r"config\.json is not JSON .*: download it again")


def test_no_weights(directory):
    (directory / "model.safetensors").unlink()
    assert_refused(directory, r"has no weights: download model\.safetensors")


def test_missing_shard(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert_refused(sharded, rf"{shard.name} is missing, though model\.safetensors\.index\.json lists it: download")


def test_tensor_that_its_shard_lacks(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["extra"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    assert_refused(sharded, "promises 'extra' in model-.*, which lacks it: download")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated(directory, keep):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(directory, r"model\.safetensors is (empty|corrupt or cut short).*: download it again")


def test_git_lfs_pointer(directory):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    (directory / "model.safetensors").write_text(pointer)
    assert_refused(directory, "is a git-lfs pointer, not the file itself: run `git lfs pull`")
