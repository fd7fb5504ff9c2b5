"""From a model's name to an engine: the checkpoint, the tokenizer, the weights and the cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pace import host
from pace.cache import CACHES, check_block_tokens
from pace.models import Model, load_model, open_checkpoint
from pace.models.hub import resolve
from pace.numa import settle
from pace.ops import OperatorConfig

from .config import EngineConfig
from .engine import Engine
from .tokenizer import Tokenizer

MEMORY_SHARE = 4  # the cache takes one part in four of the memory that is free once the weights are loaded


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer: what the engines of several processes can share."""

    model: Model
    tokenizer: Tokenizer
    operators: OperatorConfig
    generation_config: Mapping[str, Any]

    def engine(
        self,
        kv_cache_bytes: int | None = None,
        cache: str = "SLAB_POOL",
        block_tokens: int | None = None,
        prefix_caching: bool | None = None,
        **limits: Any,
    ) -> Engine:
        """An engine with a cache of its own; the arguments are those of `load_engine`."""
        config = EngineConfig(**limits)
        capacity = kv_cache_bytes if kv_cache_bytes is not None else default_cache_bytes()
        kv_cache = CACHES[cache](self.model.cache_shape, capacity, self.operators, block_tokens, prefix_caching)
        return Engine(self.model, kv_cache, self.tokenizer, config, self.operators, self.generation_config)


def load_shared(
    model: str | Path,
    dtype: str = "auto",
    operators: str | Mapping[str, str] | OperatorConfig | None = None,
    progress: bool = False,
) -> LoadedModel:
    """The part of `load_engine` that comes before there is a cache; nothing is bound."""
    config, path = OperatorConfig.parse(operators), resolve(str(model))
    with open_checkpoint(path) as checkpoint:
        tokenizer = Tokenizer.load(path)  # before the weights: what is wrong with it is said at once
        loaded = load_model(checkpoint, dtype, config, progress)
        eos = checkpoint.generation_config.get("eos_token_id") or checkpoint.config.get("eos_token_id")
        return LoadedModel(loaded, tokenizer, config, checkpoint.generation_config | {"eos_token_id": eos})


def load_engine(
    model: str | Path,
    dtype: str = "auto",
    kv_cache_bytes: int | None = None,
    cache: str = "SLAB_POOL",
    block_tokens: int | None = None,
    prefix_caching: bool | None = None,
    operators: str | Mapping[str, str] | OperatorConfig | None = None,
    progress: bool = False,
    numa: bool = True,
    **limits: Any,
) -> Engine:
    """An engine for a model.

    model: a Hugging Face directory, a GGUF file, a name of `pace pull`, or a repository of the Hugging Face hub. dtype:
    "bfloat16", "float32" or "auto", the checkpoint's own (bfloat16 for quantised ones). kv_cache_bytes: the memory for
    keys and values, None for a quarter of what is free. cache: SLAB_POOL, PAGED, BMC or DYNAMIC; block_tokens: its
    blocks, or the steps by which it grows, a multiple of 16, None for its own choice. prefix_caching: whether prompts
    that begin alike share what was computed; None where that is what the cache is for (PAGED). operators: the backend
    of each operator (see OperatorConfig), by name, mapping or JSON. numa: bind this thread, the kernels' threads and
    their memory to one NUMA node, on a machine that has several. limits: those of EngineConfig.

    ModelError (a ValueError) for a model that is not there or not whole; ValueError for arguments that can't be.
    """
    check_cache(cache, block_tokens)
    EngineConfig(**limits), OperatorConfig.parse(operators)  # before a model is read for nothing
    if numa:
        resolve(str(model))
        settle()  # before there is anything in memory
    shared = load_shared(model, dtype, operators, progress)
    return shared.engine(kv_cache_bytes, cache, block_tokens, prefix_caching, **limits)


def check_cache(cache: str, block_tokens: int | None) -> None:
    """ValueError for a cache that is not there, or blocks that can't be."""
    if cache not in CACHES:
        raise ValueError(f"cache is {cache!r}; it must be {', '.join(CACHES)}")
    if block_tokens is not None:
        check_block_tokens(block_tokens)


def default_cache_bytes() -> int:
    available = host.describe().memory_available_bytes or 4 << 30
    return max(available // MEMORY_SHARE, 64 << 20)
