"""GGUF files: the same tensors under Hugging Face names, and a Hugging Face config made from the metadata.

The header is parsed here because the `gguf` package takes seconds over a vocabulary; its tables of block sizes and its
dequantisation are used. Names and metadata keys of each architecture are data: ARCHITECTURES.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from math import pi, prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from pace.errors import ModelError
from pace.reference.arrays import Array, bfloat16

from .checkpoint import Checkpoint, DType
from .mapped_file import MappedFile

# Elements dequantised at a time: the temporaries of gguf's NumPy code stay in the L2 cache (4 to 6 times faster).
_PIECE = 1 << 15

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9

_PLAIN_DTYPES: dict[GGMLQuantizationType, DType] = {
    GGMLQuantizationType.F64: np.dtype(np.float64),
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: bfloat16,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of a GGUF file lies. Its shape is NumPy's (rows first)."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return int(self.shape[-1] // block * block_bytes)

    @property
    def num_bytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes


class _Cursor:
    """Reads the values of a GGUF header one after the other."""

    def __init__(self, data: Any, at: int) -> None:
        self.data, self.at = data, at

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        if self.at + length > len(self.data):
            raise ValueError(f"a string of {length} bytes")
        self.at += length
        return str(self.data[self.at - length : self.at], "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            value = self.scalar(_scalar_code(kind))
            # The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06.
            return float(str(np.float32(value))) if kind == 6 else value
        element, count = self.scalar("I"), self.scalar("Q")
        if element == _STRING:
            return [self.string() for _ in range(count)]
        values = np.frombuffer(self.data, "<" + _scalar_code(element).replace("?", "B"), count, self.at)
        self.at += values.nbytes
        return values.tolist()


def _scalar_code(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of unknown type {kind}")
    return _SCALARS[kind]


class GGUFFile:
    """A GGUF file as it is: `metadata` by its keys, `tensors` by llama.cpp's names."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.mapped = MappedFile(self.path)
        if self.mapped.bytes[:4] != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: give a GGUF file or a Hugging Face directory")
        try:
            self._parse()
        except (struct.error, ValueError, ArithmeticError, TypeError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{path} is corrupt or cut short ({error}): download it again") from None

    def _parse(self) -> None:
        cursor = _Cursor(self.mapped.bytes, 4)
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise ModelError(f"{self.path} is GGUF version {version}, or big-endian: convert it to version 3")
        num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
        self.metadata = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(num_values)}
        if self.metadata.get("split.count", 1) > 1:
            raise ModelError(f"{self.path} is one part of a split model: join them with `llama-gguf-split --merge`")
        entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        data = -(-cursor.at // alignment) * alignment
        self.tensors = {name: StoredTensor(kind, shape, data + offset) for name, kind, shape, offset in entries}
        for name, tensor in self.tensors.items():
            if tensor.offset + tensor.num_bytes > len(self.mapped):
                raise ValueError(f"{name!r} ends at byte {tensor.offset + tensor.num_bytes} of {len(self.mapped)}")


def _tensor_entry(cursor: _Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    name = cursor.string()
    shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))[::-1]
    kind, offset = GGMLQuantizationType(cursor.scalar("I")), cursor.scalar("Q")
    if not shape or 0 in shape or shape[-1] % GGML_QUANT_SIZES[kind][0]:
        raise ValueError(f"{name!r} of type {kind.name} has shape {shape}")
    return name, kind, shape, offset


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp writes one `general.architecture`, and how Hugging Face does."""

    model_type: str
    class_name: str
    tensors: dict[str, str]  # llama.cpp's stem → Hugging Face's, {} for the layer
    config: dict[str, str]  # config key → metadata key after "ARCHITECTURE."
    constants: dict[str, Any] = field(default_factory=dict)
    # Stems whose rows llama.cpp reorders within each head, from (half, pair) to (pair, half) → config key of the heads.
    permuted: dict[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0  # what llama.cpp adds to the weights of norms
    # What else config.json says, from the file and what is known so far.
    more: Callable[["GGUFFile", dict[str, Any]], dict[str, Any]] | None = None


def _gemma3(file: "GGUFFile", config: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions of each kind of layers; and how scores are scaled, which files do not say: 1 / √head_dim, but
    for the 27b, which llama.cpp knows by its 62 layers.
    """
    local = file.metadata.get("gemma3.rope.freq_base_swa", 10000.0)
    largest = config.get("num_hidden_layers") == 62
    return {
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if largest
        else config["head_dim"],
    }


_LAYER = "model.layers.{}."

ARCHITECTURES = {
    "llama": Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        tensors={
            "token_embd": "model.embed_tokens",
            "output_norm": "model.norm",
            "output": "lm_head",
            "attn_norm": _LAYER + "input_layernorm",
            "attn_q": _LAYER + "self_attn.q_proj",
            "attn_k": _LAYER + "self_attn.k_proj",
            "attn_v": _LAYER + "self_attn.v_proj",
            "attn_output": _LAYER + "self_attn.o_proj",
            "ffn_norm": _LAYER + "post_attention_layernorm",
            "ffn_gate": _LAYER + "mlp.gate_proj",
            "ffn_up": _LAYER + "mlp.up_proj",
            "ffn_down": _LAYER + "mlp.down_proj",
        },
        config={
            "hidden_size": "embedding_length",
            "intermediate_size": "feed_forward_length",
            "num_hidden_layers": "block_count",
            "num_attention_heads": "attention.head_count",
            "num_key_value_heads": "attention.head_count_kv",
            "head_dim": "attention.key_length",
            "max_position_embeddings": "context_length",
            "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        },
        constants={"hidden_act": "silu"},
        permuted={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"},
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        tensors={
            "token_embd": "model.embed_tokens",
            "output_norm": "model.norm",
            "output": "lm_head",
            "attn_norm": _LAYER + "input_layernorm",
            "attn_q": _LAYER + "self_attn.q_proj",
            "attn_k": _LAYER + "self_attn.k_proj",
            "attn_v": _LAYER + "self_attn.v_proj",
            "attn_q_norm": _LAYER + "self_attn.q_norm",
            "attn_k_norm": _LAYER + "self_attn.k_norm",
            "attn_output": _LAYER + "self_attn.o_proj",
            "post_attention_norm": _LAYER + "post_attention_layernorm",
            "ffn_norm": _LAYER + "pre_feedforward_layernorm",
            "ffn_gate": _LAYER + "mlp.gate_proj",
            "ffn_up": _LAYER + "mlp.up_proj",
            "ffn_down": _LAYER + "mlp.down_proj",
            "post_ffw_norm": _LAYER + "post_feedforward_layernorm",
        },
        config={
            "hidden_size": "embedding_length",
            "intermediate_size": "feed_forward_length",
            "num_hidden_layers": "block_count",
            "num_attention_heads": "attention.head_count",
            "num_key_value_heads": "attention.head_count_kv",
            "head_dim": "attention.key_length",
            "max_position_embeddings": "context_length",
            "rms_norm_eps": "attention.layer_norm_rms_epsilon",
            "sliding_window": "attention.sliding_window",
        },
        constants={"hidden_activation": "gelu_pytorch_tanh"},
        norm_offset=1.0,
        more=_gemma3,
    ),
}

_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<stem>\w+)\.(?P<suffix>weight|bias)")
_NOT_WEIGHTS = ("rope_freqs.weight",)  # it is in config["rope_parameters"]


class GGUFCheckpoint(Checkpoint):
    """A GGUF file under Hugging Face names. Plain tensors are views; quantised ones are dequantised when read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUFFile(path)
        name = self._file.metadata.get("general.architecture")
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ModelError(f"{path} is of architecture {name!r}: GGUF files of {known} can be read")
        self._architecture = ARCHITECTURES[name]
        self._stored = {self._translated(name): name for name in self._file.tensors if name not in _NOT_WEIGHTS}
        self.config = config_of(self._file)
        ids = {key: self.config[key] for key in ("bos_token_id", "pad_token_id") if key in self.config}
        self.generation_config = ids | {"eos_token_id": end_token_ids(self._file.metadata)}

    def _translated(self, name: str) -> str:
        match = _NAME.fullmatch(name)
        if not match or match["stem"] not in self._architecture.tensors:
            raise ModelError(f"{self.path} has a tensor {name!r} that {self._architecture.model_type} has no use for")
        return f"{self._architecture.tensors[match['stem']].format(match['layer'])}.{match['suffix']}"

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._stored:
            raise ModelError(f"{self.path} has no tensor {name!r}: the file is not complete, download another")
        return self._file.tensors[self._stored[name]]

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> DType:
        return _PLAIN_DTYPES.get(self._tensor(name).kind, np.dtype(np.float32))

    def read(self, name: str) -> Array:
        return self.read_rows(name, 0, self.shape(name)[0])

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        tensor = self._tensor(name)
        rows: slice | Array = slice(start, stop)
        if (order := self._row_order(name)) is not None:
            rows = order[rows]
        if tensor.kind in _PLAIN_DTYPES:
            array = self._file.mapped.array(tensor.offset, _PLAIN_DTYPES[tensor.kind], tensor.shape)[rows]
        else:
            shape = (*tensor.shape[:-1], tensor.row_bytes)
            array = _dequantized(self._file.mapped.array(tensor.offset, np.dtype(np.uint8), shape), rows, tensor)
        if self._architecture.norm_offset and name.endswith("norm.weight"):
            array = array.astype(np.float32) - np.float32(self._architecture.norm_offset)
        array.flags.writeable = False
        return array

    def _row_order(self, name: str) -> Array | None:
        """Where in the file each row of a reordered tensor is; None where they lie in order."""
        match = _NAME.fullmatch(self._stored[name])
        assert match is not None
        key = self._architecture.permuted.get(match["stem"])
        if key is None:
            return None
        num_rows = self.shape(name)[0]
        if num_rows % (2 * self.config[key]):
            raise ModelError(
                f"{self.path}: {name!r} has {num_rows} rows for {self.config[key]} heads: download it again"
            )
        return np.arange(num_rows).reshape(self.config[key], -1, 2).swapaxes(1, 2).reshape(num_rows)

    def release(self, name: str) -> None:
        tensor = self._tensor(name)
        self._file.mapped.release(tensor.offset, tensor.num_bytes)

    def close(self) -> None:
        self._stored = {}
        del self._file


def _dequantized(blocks: Array, rows: slice | Array, tensor: StoredTensor) -> Array:
    """Rows of float32, made piece by piece."""
    chosen = np.arange(len(blocks))[rows]
    out = np.empty((len(chosen), *tensor.shape[1:]), np.float32)
    step = max(1, _PIECE * len(blocks) // max(1, prod(tensor.shape)))
    for start in range(0, len(chosen), step):
        out[start : start + step] = dequantize(blocks[chosen[start : start + step]], tensor.kind)
    return out


def end_token_ids(metadata: dict[str, Any]) -> list[int]:
    """The tokens that end a text or a turn."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    return sorted({metadata[key] for key in keys if key in metadata})


def config_of(file: GGUFFile) -> dict[str, Any]:
    """What Hugging Face's config.json of the same model says."""
    metadata, name = file.metadata, file.metadata["general.architecture"]
    architecture = ARCHITECTURES[name]
    config = {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "dtype": _dtype(file),
        **architecture.constants,
    }
    for key, source in architecture.config.items():
        if (value := metadata.get(f"{name}.{source}")) is None:
            continue
        if not isinstance(value, int | float) or value <= 0:
            raise ModelError(f"{file.path} says that {source} is {value!r}, which cannot be: download it again")
        config[key] = value
    for key in ("bos", "eos", "padding"):
        if (token := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{key.removesuffix('ding')}_token_id"] = token
    try:
        config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        config["rope_parameters"] = _rope_parameters(file, f"{name}.rope.")
        if architecture.more is not None:
            config |= architecture.more(file, config)
    except KeyError as missing:
        raise ModelError(f"{file.path} does not say {missing}: the file is not complete, download another") from None
    return config


def _dtype(file: GGUFFile) -> str:
    """float32 where every matrix is; bfloat16 for quantised files too, which the metadata says nothing of."""
    kinds = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return "float32" if kinds == {GGMLQuantizationType.F32} else "bfloat16"


def _rope_parameters(file: GGUFFile, prefix: str) -> dict[str, Any]:
    metadata = file.metadata
    theta = metadata.get(prefix + "freq_base", 10000.0)
    if "rope_freqs.weight" in file.tensors:
        tensor = file.tensors["rope_freqs.weight"]
        factors = file.mapped.array(tensor.offset, np.dtype(np.float32), tensor.shape).astype(np.float64)
        return {"rope_theta": theta} | _rope_of_factors(file, factors, theta)
    kind = metadata.get(prefix + "scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind != "linear":
        raise ModelError(f"{file.path} scales RoPE by {kind!r}: linear and Llama 3's rope_freqs are supported")
    return {"rope_type": kind, "rope_theta": theta, "factor": metadata[prefix + "scaling.factor"]}


def _rope_of_factors(file: GGUFFile, factors: np.ndarray[Any, np.dtype[np.float64]], theta: float) -> dict[str, Any]:
    """Divisors of each frequency, as the llama3 parameters that they were made of."""
    if np.all(factors == 1):
        return {"rope_type": "default"}
    low, high, original, factor = 1.0, 4.0, 8192, float(factors.max())
    turns = original / (2 * pi * theta ** (np.arange(len(factors)) / len(factors)))
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        llama3 = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
        return {"rope_type": "llama3", "factor": factor, **llama3}
    raise ModelError(f"{file.path} has rope_freqs that are not Llama 3's: those and linear scaling are supported")
