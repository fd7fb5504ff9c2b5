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
CONTROL = 3  # in tokenizer.ggml.token_type

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
    rope: dict[str, Any] = field(default_factory=dict)  # constants of rope_parameters
    # Stems whose rows llama.cpp reorders within each head, from (half, pair) to (pair, half) → config key of the heads.
    permuted: dict[str, str] = field(default_factory=dict)
    # Hugging Face's tensors without ".weight" → the stems they are made of; rows of two stems take turns.
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    norm_offset: float = 0.0  # what llama.cpp adds to the weights of norms
    full_every: int = 0  # with a sliding window: the last of so many layers sees everything
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

_LLAMA_TENSORS = {
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
}
_LLAMA_CONFIG = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_HEAD_NORMS = {"attn_q_norm": _LAYER + "self_attn.q_norm", "attn_k_norm": _LAYER + "self_attn.k_norm"}
_WINDOW = {"sliding_window": "attention.sliding_window"}
_SILU = {"hidden_act": "silu"}


def _without(tensors: dict[str, str], *stems: str) -> dict[str, str]:
    return {stem: name for stem, name in tensors.items() if stem not in stems}


# GPT-J and OPT are not here: llama.cpp has no loader of theirs.
ARCHITECTURES = {
    "llama": Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        tensors=_LLAMA_TENSORS,
        config=_LLAMA_CONFIG,
        constants=_SILU,
        permuted={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"},
    ),
    "qwen2": Architecture(
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        tensors=_LLAMA_TENSORS,
        config=_LLAMA_CONFIG,
        constants=_SILU,
    ),
    "qwen3": Architecture(
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        tensors=_LLAMA_TENSORS | _HEAD_NORMS,
        config=_LLAMA_CONFIG,
        constants=_SILU,
    ),
    "phi3": Architecture(
        model_type="phi3",
        class_name="Phi3ForCausalLM",
        tensors=_without(_LLAMA_TENSORS, "attn_q", "attn_k", "attn_v", "ffn_gate")
        | {"attn_qkv": _LAYER + "self_attn.qkv_proj", "ffn_up": _LAYER + "mlp.gate_up_proj"},
        config=_LLAMA_CONFIG | _WINDOW | {"original_max_position_embeddings": "rope.scaling.original_context_length"},
        constants=_SILU,
    ),
    "gpt-oss": Architecture(
        model_type="gpt_oss",
        class_name="GptOssForCausalLM",
        tensors=_without(_LLAMA_TENSORS, "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
        | {
            "post_attention_norm": _LAYER + "post_attention_layernorm",
            "ffn_gate_inp": _LAYER + "mlp.router",
        },
        parameters={
            _LAYER + "self_attn.sinks": ("attn_sinks",),
            _LAYER + "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
            _LAYER + "mlp.experts.down_proj": ("ffn_down_exps",),
        },
        config=_LLAMA_CONFIG
        | _WINDOW
        | {
            "intermediate_size": "expert_feed_forward_length",
            "num_local_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
        },
        constants=_SILU | {"swiglu_limit": 7.0},
        rope={"truncate": False},
        full_every=2,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        tensors=_LLAMA_TENSORS
        | _HEAD_NORMS
        | {
            "post_attention_norm": _LAYER + "post_attention_layernorm",
            "ffn_norm": _LAYER + "pre_feedforward_layernorm",
            "post_ffw_norm": _LAYER + "post_feedforward_layernorm",
        },
        config=_LLAMA_CONFIG | _WINDOW,
        constants={"hidden_activation": "gelu_pytorch_tanh"},
        norm_offset=1.0,
        more=_gemma3,
    ),
}

_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<stem>\w+)\.(?P<suffix>weight|bias)")
# They are in config["rope_parameters"].
_NOT_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_MXFP4 = GGMLQuantizationType.MXFP4
_BLOCK = 32  # elements of MXFP4 that share a scale


@dataclass(frozen=True)
class _Source:
    """What a tensor is read from: `names` in the file, and what of them, "values", "blocks" or "scales".

    With two names the second dimension takes an entry of each in turn. `transposed`: the last two dimensions swapped.
    """

    names: tuple[str, ...]
    what: str = "values"
    transposed: bool = False


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
        self._sources = self._find_sources()
        self.config = config_of(self._file)
        ids = {key: self.config[key] for key in ("bos_token_id", "pad_token_id") if key in self.config}
        self.generation_config = ids | {"eos_token_id": end_token_ids(self._file.metadata)}

    def _find_sources(self) -> dict[str, _Source]:
        tables = self._architecture
        owner = {stem: (target, stems) for target, stems in tables.parameters.items() for stem in stems}
        sources: dict[str, _Source] = {}
        for name in self._file.tensors:
            if name in _NOT_WEIGHTS:
                continue
            match = _NAME.fullmatch(name)
            stem = match["stem"] if match else None
            if match and stem in tables.tensors:
                sources[f"{tables.tensors[stem].format(match['layer'])}.{match['suffix']}"] = _Source((name,))
            elif match and stem in owner:
                target, stems = owner[stem]
                names = tuple(f"blk.{match['layer']}.{stem}.{match['suffix']}" for stem in stems)
                sources |= self._parameter(target.format(match["layer"]), names, match["suffix"])
            else:
                raise ModelError(f"{self.path} has a tensor {name!r} that {tables.model_type} has no use for")
        return sources

    def _parameter(self, target: str, names: tuple[str, ...], suffix: str) -> dict[str, _Source]:
        """Under the names that they have on Hugging Face's side, where MXFP4 is two tensors."""
        for name in names:
            if name not in self._file.tensors:
                raise ModelError(f"{self.path} has no tensor {name!r}: the file is not complete, download another")
        stored = [self._file.tensors[name] for name in names]
        kinds = {tensor.kind for tensor in stored}
        if len({tensor.shape for tensor in stored}) > 1 or (len(kinds) > 1 and _MXFP4 in kinds):
            raise ModelError(f"{self.path}: {' and '.join(names)} do not fit each other: download it again")
        if suffix == "bias":
            return {f"{target}_bias": _Source(names)}
        if kinds == {_MXFP4}:
            return {f"{target}_{what}": _Source(names, what) for what in ("blocks", "scales")}
        return {target: _Source(names, transposed=len(stored[0].shape) == 3)}

    def _source(self, name: str) -> _Source:
        if name not in self._sources:
            raise ModelError(f"{self.path} has no tensor {name!r}: the file is not complete, download another")
        return self._sources[name]

    def _stored(self, name: str) -> list[StoredTensor]:
        return [self._file.tensors[part] for part in self._source(name).names]

    def names(self) -> list[str]:
        return list(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        source, (tensor, *others) = self._source(name), self._stored(name)
        shape = tensor.shape
        if source.what != "values":
            shape = (*shape[:-1], shape[-1] // _BLOCK, *((_BLOCK // 2,) if source.what == "blocks" else ()))
        if others:
            shape = (shape[0], 2 * shape[1], *shape[2:])
        return (*shape[:-2], shape[-1], shape[-2]) if source.transposed else shape

    def dtype(self, name: str) -> DType:
        if self._source(name).what != "values":
            return np.dtype(np.uint8)
        dtypes = {_PLAIN_DTYPES.get(tensor.kind, np.dtype(np.float32)) for tensor in self._stored(name)}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def read(self, name: str) -> Array:
        return self.read_rows(name, 0, self.shape(name)[0])

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        source = self._source(name)
        rows: slice | Array = slice(start, stop)
        if (order := self._row_order(name)) is not None:
            rows = order[rows]
        parts = [self._rows(tensor, source.what, rows) for tensor in self._stored(name)]
        array = parts[0] if len(parts) == 1 else _in_turn(parts, self.dtype(name))
        if source.transposed:
            array = array.swapaxes(1, 2)
        if self._architecture.norm_offset and name.endswith("norm.weight"):
            array = array.astype(np.float32) - np.float32(self._architecture.norm_offset)
        array.flags.writeable = False
        return array

    def _rows(self, tensor: StoredTensor, what: str, rows: slice | Array) -> Array:
        if tensor.kind in _PLAIN_DTYPES:
            return self._file.mapped.array(tensor.offset, _PLAIN_DTYPES[tensor.kind], tensor.shape)[rows]
        stored = self._file.mapped.array(tensor.offset, np.dtype(np.uint8), (*tensor.shape[:-1], tensor.row_bytes))
        if what == "values":
            return _dequantized(stored, rows, tensor)
        chosen = stored[rows]
        blocks = chosen.reshape(*chosen.shape[:-1], tensor.shape[-1] // _BLOCK, 1 + _BLOCK // 2)
        return np.ascontiguousarray(blocks[..., 0]) if what == "scales" else _in_pairs(blocks[..., 1:])

    def _row_order(self, name: str) -> Array | None:
        """Where in the file each row of a reordered tensor is; None where they lie in order."""
        match = _NAME.fullmatch(self._source(name).names[0])
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
        for tensor in self._stored(name):
            self._file.mapped.release(tensor.offset, tensor.num_bytes)

    def close(self) -> None:
        self._sources = {}
        del self._file


def _dequantized(blocks: Array, rows: slice | Array, tensor: StoredTensor) -> Array:
    """Rows of float32, made piece by piece."""
    chosen = np.arange(len(blocks))[rows]
    out = np.empty((len(chosen), *tensor.shape[1:]), np.float32)
    step = max(1, _PIECE * len(blocks) // max(1, prod(tensor.shape)))
    for start in range(0, len(chosen), step):
        out[start : start + step] = dequantize(blocks[chosen[start : start + step]], tensor.kind)
    return out


def _in_turn(parts: list[Array], dtype: DType) -> Array:
    """Entries of the second dimension: the first of each part, the second of each, ..."""
    count, length, *rest = parts[0].shape
    return np.stack([part.astype(dtype, copy=False) for part in parts], 2).reshape(count, 2 * length, *rest)


def _in_pairs(nibbles: Array) -> Array:
    """Bytes of MXFP4, each with two neighbours, the first one low: in GGUF byte i has elements i and 16 + i."""
    elements = np.concatenate((nibbles & 15, nibbles >> 4), -1)
    pairs: Array = elements[..., ::2] | elements[..., 1::2] << 4
    return pairs


# Control tokens that end a turn whatever the metadata say, for files name one end only; as in llama.cpp.
_ENDS_OF_TURNS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|return|>", "<|call|>")


def end_token_ids(metadata: dict[str, Any]) -> list[int]:
    """The tokens that end a text or a turn."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    tokens, types = (metadata.get(f"tokenizer.ggml.{what}", ()) for what in ("tokens", "token_type"))
    control = {token: index for index, token in enumerate(tokens[: len(types)]) if types[index] == CONTROL}
    ends = {control[token] for token in _ENDS_OF_TURNS if token in control}
    if "<|return|>" in control:  # GPT-OSS's <|end|> ends a message, and more may follow
        ends.discard(control.get("<|end|>", -1))
    return sorted(ends | {metadata[key] for key in keys if key in metadata})


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
        if key == "sliding_window" and value == 0:  # as the converter says that there is none
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
        config["rope_parameters"] = _rope_parameters(file, f"{name}.rope.", config["head_dim"]) | architecture.rope
        if architecture.full_every and "sliding_window" in config:
            layers = range(1, config["num_hidden_layers"] + 1)
            kinds = ("sliding_attention", "full_attention")
            config["layer_types"] = [kinds[index % architecture.full_every == 0] for index in layers]
        if architecture.more is not None:
            config |= architecture.more(file, config)
    except KeyError as missing:
        raise ModelError(f"{file.path} does not say {missing}: the file is not complete, download another") from None
    return config


def _dtype(file: GGUFFile) -> str:
    """float32 where every matrix is; bfloat16 for quantised files too, which the metadata says nothing of."""
    kinds = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return "float32" if kinds == {GGMLQuantizationType.F32} else "bfloat16"


# rope_type → its settings, and where in the metadata they are; `factor` must be there.
_ROPE_TYPES = {
    "none": {},
    "linear": {"factor": "scaling.factor"},
    "yarn": {
        "factor": "scaling.factor",
        "original_max_position_embeddings": "scaling.original_context_length",
        "beta_fast": "scaling.yarn_beta_fast",
        "beta_slow": "scaling.yarn_beta_slow",
        "attention_factor": "scaling.yarn_attn_factor",
        "mscale_all_dim": "scaling.yarn_log_multiplier",
    },
    "longrope": {
        "original_max_position_embeddings": "scaling.original_context_length",
        "attention_factor": "scaling.attn_factor",
    },
}


def _rope_parameters(file: GGUFFile, prefix: str, head_dim: int) -> dict[str, Any]:
    metadata = file.metadata
    found = {"rope_theta": metadata.get(prefix + "freq_base", 10000.0)}
    rotated = metadata.get(prefix + "dimension_count", head_dim)
    if not isinstance(rotated, int) or not 0 < rotated <= head_dim:
        raise ModelError(f"{file.path} rotates {rotated!r} of {head_dim} elements of a head: download it again")
    if rotated != head_dim:
        found["partial_rotary_factor"] = rotated / head_dim
    if "rope_freqs.weight" in file.tensors:
        return found | _rope_of_factors(file, _floats(file, "rope_freqs.weight"), found["rope_theta"])
    has_factors = "rope_factors_long.weight" in file.tensors  # which the converter of Phi-3 gives no type
    kind = "longrope" if has_factors else metadata.get(prefix + "scaling.type", "none")
    if kind not in _ROPE_TYPES:
        raise ModelError(f"{file.path} scales RoPE by {kind!r}: {', '.join(_ROPE_TYPES)} are supported")
    for key, source in _ROPE_TYPES[kind].items():
        if key == "factor" or prefix + source in metadata:
            found[key] = metadata[prefix + source]
    if "mscale_all_dim" in found:
        found["mscale"] = 1.0  # llama.cpp assumes it
    if kind == "longrope":
        found |= {
            f"{which}_factor": _floats(file, f"rope_factors_{which}.weight").tolist() for which in ("short", "long")
        }
    return {"rope_type": "default" if kind == "none" else kind} | found


def _floats(file: GGUFFile, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    tensor = file.tensors[name]
    return file.mapped.array(tensor.offset, np.dtype(np.float32), tensor.shape).astype(np.float64)


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
    raise ModelError(f"{file.path} has rope_freqs that are not Llama 3's: only those are supported")
