"""A model on disk as named arrays, whatever its format. Knows Hugging Face names, not what a model does with them."""

import json
import pickle
from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import ml_dtypes
import numpy as np

from pace.errors import ModelError
from pace.reference.arrays import Array, bfloat16

from .mapped_file import MappedFile

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"

DType = np.dtype[np.generic]
Tensor = TypeVar("Tensor")


class Checkpoint(ABC):
    """Tensors by their Hugging Face names, with the contents of config.json and generation_config.json.

    Arrays are read-only and, where the format allows, views of a memory-mapped file; they outlive `close`.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]

    @abstractmethod
    def names(self) -> list[str]:
        """Every tensor, in the order of the files."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor. ModelError, here and below, for a name that the checkpoint lacks."""

    @abstractmethod
    def dtype(self, name: str) -> DType:
        """What `read` gives: the dtype on disk, or float32 for a quantised tensor."""

    @abstractmethod
    def read(self, name: str) -> Array:
        """The whole tensor."""

    @abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """`read(name)[start:stop]`, touching no other rows."""

    @abstractmethod
    def release(self, name: str) -> None:
        """Tell the system that the tensor's pages are not needed any more. Reading it again fetches them again."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A Hugging Face directory or a GGUF file. ModelError where it is not whole."""
    path = Path(path)
    if path.is_file():
        from .gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if not path.is_dir():
        raise ModelError(f"no model at {path}: give a Hugging Face directory or a GGUF file")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: give a Hugging Face model directory or a GGUF file")
    for single, form in ((SAFETENSORS, SafetensorsCheckpoint), (TORCH, TorchCheckpoint)):
        if (path / single).exists() or (path / f"{single}.index.json").exists():
            return form(path)
    raise ModelError(f"{path} has no weights: download {SAFETENSORS}, or its shards and {SAFETENSORS}.index.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or ModelError; {} where there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not an object: download it again")
    return content


class _Directory(Checkpoint, Generic[Tensor]):
    """A Hugging Face directory: the weights in one file, or in shards listed by an index."""

    single: str

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        self.generation_config = read_json(path / "generation_config.json")
        self._tensors: dict[str, Tensor] = {}
        if (path / self.single).exists():
            self._tensors = self._open(path / self.single)
        else:
            self._open_shards(path / f"{self.single}.index.json")

    def _open_shards(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index} has no weight_map: download it again")
        for shard in sorted(set(weight_map.values())):
            if not (index.parent / shard).exists():
                raise ModelError(f"{index.parent / shard} is missing, though {index.name} lists it: download it")
            self._tensors |= self._open(index.parent / shard)
        for name, shard in weight_map.items():
            if name not in self._tensors:
                raise ModelError(f"{index} promises {name!r} in {shard}, which lacks it: download both again")

    @abstractmethod
    def _open(self, file: Path) -> dict[str, Tensor]: ...

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise ModelError(f"{self.path} has no tensor {name!r}: the weights do not fit config.json")
        return self._tensors[name]

    def names(self) -> list[str]:
        return list(self._tensors)

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        return self.read(name)[start:stop]

    def close(self) -> None:
        self._tensors = {}


@dataclass(frozen=True)
class _Stored:
    """Where a tensor of a safetensors file lies."""

    file: MappedFile
    offset: int
    dtype: DType
    shape: tuple[int, ...]


_SAFETENSORS_DTYPES: dict[str, DType] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": bfloat16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class SafetensorsCheckpoint(_Directory[_Stored]):
    """Views of memory-mapped safetensors files: reading costs nothing until the pages are touched."""

    single = SAFETENSORS

    def _open(self, file: Path) -> dict[str, _Stored]:
        from safetensors import SafetensorError, safe_open

        mapped = MappedFile(file)
        try:
            with safe_open(file, framework="numpy"):
                pass  # checks the header, the offsets and the length of the file
        except SafetensorError as error:
            raise ModelError(f"{file} is corrupt or cut short ({error}): download it again") from None
        data = 8 + int.from_bytes(mapped.bytes[:8], "little")
        header = json.loads(mapped.bytes[8:data])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in _SAFETENSORS_DTYPES:
                raise ModelError(f"{file}: {name!r} is of dtype {entry['dtype']}, which is not supported: convert it")
            dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
            tensors[name] = _Stored(mapped, data + entry["data_offsets"][0], dtype, tuple(entry["shape"]))
        return tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> DType:
        return self._tensor(name).dtype

    def read(self, name: str) -> Array:
        stored = self._tensor(name)
        return stored.file.array(stored.offset, stored.dtype, stored.shape)

    def release(self, name: str) -> None:
        stored = self._tensor(name)
        stored.file.release(stored.offset, prod(stored.shape) * stored.dtype.itemsize)


class TorchCheckpoint(_Directory[Any]):
    """pytorch_model.bin, read by torch itself: memory-mapped, and weights only, so that no pickled code can run."""

    single = TORCH

    def _open(self, file: Path) -> dict[str, Any]:
        try:
            import torch
        except ModuleNotFoundError:
            raise ModelError(f"{file} needs torch: pip install torch, or convert the model to safetensors") from None
        MappedFile(file)  # for its errors
        try:
            return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ModelError(f"{file} is corrupt, cut short or too old ({reason}): download it again") from None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor(name).shape)

    def dtype(self, name: str) -> DType:
        return self.read_rows(name, 0, 0).dtype if self.shape(name) else self.read(name).dtype

    def read(self, name: str) -> Array:
        import torch

        tensor = self._tensor(name).detach().contiguous()
        is_bfloat16 = tensor.dtype == torch.bfloat16
        array: Array = tensor.view(torch.uint16).numpy().view(bfloat16) if is_bfloat16 else tensor.numpy()
        array.flags.writeable = False
        return array

    def release(self, name: str) -> None:
        self._tensor(name)  # torch's mapping offers no way to advise; the system reclaims its clean pages when it must
