"""A checkpoint of random weights, made as they are read: a config.json is all that it takes.

A model of it knows nothing, but it loads, computes and takes memory as one with real weights does. Every tensor is cut
out of one block of random numbers, at a place that its name and the seed choose, and scaled by 1/√fan-in, so that
hidden states stay about as large as they come in.
"""

import math
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from pace.errors import ModelError
from pace.ops import OperatorConfig
from pace.ops.registry import Dtype
from pace.reference.arrays import Array, bfloat16

from . import architecture_of, choose_dtype
from .checkpoint import Checkpoint, DType, read_json
from .config import Config
from .weights import STORED, Survey

BLOCK = 2_097_143  # numbers: few enough for a core's caches; a prime, so that no two rows begin at the same place
LAYERS = ("num_hidden_layers", "n_layer")  # what config.json calls their number

# Of MXFP4 (pairs of four-bit codes, and powers of two that 32 of them share), by the ends of the tensors' names.
CODES, SCALES = "_blocks", "_scales"
CODE_RMS = math.sqrt(np.mean(np.square([0, 0.5, 1, 1.5, 2, 3, 4, 6])))  # of E2M1, all codes alike


class RandomCheckpoint(Checkpoint):
    """Tensors of the given shapes, read in `dtype` (MXFP4's as uint8). One seed, one model."""

    def __init__(
        self, path: Path, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: Dtype, seed: int
    ) -> None:
        self.path, self.config, self.generation_config = path, config, {}
        self._shapes, self._dtype, self._seed = shapes, dtype, seed
        self._blocks: dict[int, Array] = {}  # of normal numbers, by the fan-in that they are scaled for

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(prod(shape) * self.dtype(name).itemsize for name, shape in self._shapes.items())

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise ModelError(f"no part of the model asks for {name!r}")
        return self._shapes[name]

    def dtype(self, name: str) -> DType:
        return np.dtype(np.uint8) if name.endswith((CODES, SCALES)) else self._dtype

    def read(self, name: str) -> Array:
        return self.read_rows(name, 0, self.shape(name)[0])

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        shape = self.shape(name)
        stop = min(stop, shape[0])
        row = prod(shape[1:])
        begin = crc32(name.encode(), self._seed) + start * row
        return cut(self._numbers(name, shape), begin, (stop - start) * row).reshape(stop - start, *shape[1:])

    def release(self, name: str) -> None:
        pass

    def close(self) -> None:
        pass

    def _numbers(self, name: str, shape: Sequence[int]) -> Array:
        """The block that a tensor is cut out of."""
        if name.endswith(CODES):
            return np.random.default_rng(self._seed).integers(0, 256, BLOCK, np.uint8)
        if name.endswith(SCALES):
            return np.full(BLOCK, 127 - round(math.log2(CODE_RMS * math.sqrt(32 * shape[-1]))), np.uint8)
        if len(shape) == 1 and name.endswith("weight"):  # of a norm
            return np.ones(BLOCK, self._dtype)
        fan_in = shape[-1]
        if fan_in not in self._blocks:
            values = np.random.default_rng(self._seed).standard_normal(BLOCK, np.float32)
            self._blocks[fan_in] = (values / np.float32(math.sqrt(fan_in))).astype(self._dtype)
        return self._blocks[fan_in]


def random_checkpoint(
    path: str | Path, dtype: str = "auto", layers: int | None = None, seed: int = 0
) -> RandomCheckpoint:
    """Of a config.json. dtype: as load_model's. layers: so many of them only.

    ModelError for a file that is not there, or that no model can be made of; ValueError for more layers than there are.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no config.json at {path}: give the path of one")
    config = read_json(path)
    if layers is not None:
        config = with_layers(config, layers)
    empty = RandomCheckpoint(path, config, {}, bfloat16, seed)
    chosen = choose_dtype(dtype, empty)
    with Wishes(empty, chosen, OperatorConfig()) as wishes:
        architecture_of(empty)(Config(config), wishes)
    return RandomCheckpoint(path, config, wishes.shapes, chosen, seed)


class Wishes(Survey):
    """Notes what a model asks for: its tensors and their shapes."""

    def __init__(self, checkpoint: Checkpoint, dtype: Dtype, operators: OperatorConfig) -> None:
        super().__init__(checkpoint, dtype, operators)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def _check(self, name: str, shape: tuple[int, ...], dtypes: Sequence[Dtype] = STORED) -> None:
        self.shapes[name] = shape


def num_layers(config: Mapping[str, Any]) -> int:
    """Of the language model; 1 where the config.json leaves it to the family's default."""
    text = config.get("text_config")
    config = text if isinstance(text, dict) else config
    layers: int = config.get(_key_of_layers(config), 1)
    return layers


def with_layers(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The configuration of the first `layers` layers of the language model."""
    if isinstance(text := config.get("text_config"), dict):
        return {**config, "text_config": with_layers(text, layers)}
    key = _key_of_layers(config)
    there = config.get(key, layers)
    if not 1 <= layers <= there:
        raise ValueError(f"layers is {layers}; the model has 1 to {there}")
    changed = {**config, key: layers}
    if isinstance(kinds := config.get("layer_types"), list):
        changed["layer_types"] = kinds[:layers]
    return changed


def _key_of_layers(config: Mapping[str, Any]) -> str:
    return next((key for key in LAYERS if key in config), LAYERS[0])


def num_weights(name: str, shape: Sequence[int]) -> int:
    """How many numbers a checkpoint's tensor stands for: of MXFP4, one for each code."""
    return 0 if name.endswith(SCALES) else prod(shape) * (2 if name.endswith(CODES) else 1)


def cut(block: Array, begin: int, count: int) -> Array:
    """That many elements from `begin` on, of the block repeated without end; read-only."""
    begin %= len(block)
    if begin + count <= len(block):
        part = block[begin : begin + count]
    else:
        whole, rest = divmod(begin + count - len(block), len(block))
        part = np.concatenate([block[begin:], *[block] * whole, block[:rest]])
    part.flags.writeable = False
    return part
