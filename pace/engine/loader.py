"""From a model's name to an engine: the checkpoint, the tokenizer, the weights and the cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pace import host
from pace.cache import CACHES, KVCache, check_block_tokens
from pace.errors import ModelError
from pace.models import Model, load_model, open_checkpoint
from pace.models.hub import resolve
from pace.numa import settle
from pace.ops import OperatorConfig
from pace.speculative import PROPOSERS, Draft, SpeculativeConfig

from .config import EngineConfig
from .engine import Engine
from .speculation import Speculation
from .tokenizer import Tokenizer

MEMORY_SHARE = 4  # the cache takes one part in four of the memory that is free once the weights are loaded


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer: what the engines of several processes can share."""

    model: Model
    tokenizer: Tokenizer
    operators: OperatorConfig
    generation_config: Mapping[str, Any]
    speculative: SpeculativeConfig | None = None
    draft: Draft | None = None

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
        models = [self.model] if self.draft is None else [self.model, self.draft.model]
        token_bytes = sum(model.cache_shape.bytes_per_token for model in models)

        def cache_of(model: Model, kind: str) -> KVCache:
            """Its part: as many tokens as that of the other."""
            part = capacity * model.cache_shape.bytes_per_token // token_bytes
            shares = prefix_caching if kind == cache else None
            return CACHES[kind](model.cache_shape, part, self.operators, block_tokens, shares)

        kv_cache, speculation = cache_of(self.model, cache), None
        if self.speculative is not None:
            draft_cache = None if self.draft is None else cache_of(self.draft.model, self.speculative.cache or cache)
            proposer = PROPOSERS[self.speculative.method](self.speculative, self.model, self.draft, draft_cache)
            speculation = Speculation(proposer, self.speculative, self.model, kv_cache)
        return Engine(self.model, kv_cache, self.tokenizer, config, self.operators, self.generation_config, speculation)


def load_shared(
    model: str | Path,
    dtype: str = "auto",
    operators: str | Mapping[str, str] | OperatorConfig | None = None,
    progress: bool = False,
    speculative: str | Mapping[str, Any] | SpeculativeConfig | None = None,
) -> LoadedModel:
    """The part of `load_engine` that comes before there is a cache; nothing is bound."""
    config, speculative = OperatorConfig.parse(operators), SpeculativeConfig.parse(speculative)
    path = resolve(str(model))
    with open_checkpoint(path) as checkpoint:
        tokenizer = Tokenizer.load(path)  # before the weights: what is wrong with it is said at once
        loaded = load_model(checkpoint, dtype, config, progress)
        eos = checkpoint.generation_config.get("eos_token_id") or checkpoint.config.get("eos_token_id")
        generation_config = checkpoint.generation_config | {"eos_token_id": eos}
    draft = None
    if speculative is not None and speculative.model is not None:
        draft = load_draft(speculative, loaded, tokenizer, config, progress)
    return LoadedModel(loaded, tokenizer, config, generation_config, speculative, draft)


def load_draft(
    speculative: SpeculativeConfig, target: Model, tokenizer: Tokenizer, operators: OperatorConfig, progress: bool
) -> Draft:
    """The draft model for a target. ModelError where its tokens are others."""
    name = str(speculative.model)
    path = resolve(name)
    with open_checkpoint(path) as checkpoint:
        own = Tokenizer.load(path) if path.is_file() or (path / "tokenizer.json").exists() else None
        if own is not None:
            _check_tokens(name, own, tokenizer)
        model = load_model(checkpoint, speculative.dtype, operators, progress)
        if own is None and model.vocabulary != target.vocabulary:
            raise ModelError(
                f"the draft {name} has {model.vocabulary} tokens, and the model {target.vocabulary}: "
                "a draft needs the model's own vocabulary"
            )
        return Draft(model, checkpoint.config, operators)


def _check_tokens(name: str, draft: Tokenizer, target: Tokenizer) -> None:
    """ModelError where an id is one text for the draft and another for the model; either may have ids of its own."""
    special = draft.special_ids | target.special_ids
    for token in range(min(draft.vocab_size, target.vocab_size)):
        one, other = draft.piece(token), target.piece(token)
        if one != other and one and other and token not in special:
            raise ModelError(
                f"token {token} is {one!r} for the draft {name}, and {other!r} for the model: "
                "a draft needs the model's own vocabulary"
            )


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
    speculative: str | Mapping[str, Any] | SpeculativeConfig | None = None,
    **limits: Any,
) -> Engine:
    """An engine for a model.

    model: a Hugging Face directory, a GGUF file, a name of `pace pull`, or a repository of the Hugging Face hub. dtype:
    "bfloat16", "float32" or "auto", the checkpoint's own (bfloat16 for quantised ones). kv_cache_bytes: the memory for
    keys and values, None for a quarter of what is free. cache: SLAB_POOL, PAGED, BMC or DYNAMIC; block_tokens: its
    blocks, or the steps by which it grows, a multiple of 16, None for its own choice. prefix_caching: whether prompts
    that begin alike share what was computed; None where that is what the cache is for (PAGED). operators: the backend
    of each operator (see OperatorConfig), by name, mapping or JSON. numa: bind this thread, the kernels' threads and
    their memory to one NUMA node, on a machine that has several. speculative: how tokens are guessed ahead (see
    SpeculativeConfig), as JSON or a mapping; texts do not depend on it, and kv_cache_bytes is for the draft model too.
    limits: those of EngineConfig.

    ModelError (a ValueError) for a model that is not there or not whole; ValueError for arguments that can't be.
    """
    check_cache(cache, block_tokens)
    # Before a model is read for nothing.
    EngineConfig(**limits), OperatorConfig.parse(operators)
    speculative = SpeculativeConfig.parse(speculative)
    if numa:
        resolve(str(model))
        settle()  # before there is anything in memory
    shared = load_shared(model, dtype, operators, progress, speculative)
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
