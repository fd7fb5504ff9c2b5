"""CPU inference of language models, made for AMD EPYC.

    from pace import LLM, SamplingParams

    llm = LLM("smollm2")
    print(llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=32))[0].outputs[0].text)

`pace.kernels` are the operations, `pace.reference` their specification, `pace.isa` says what they run on.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.async_engine import AsyncEngine, EngineDead
    from .engine.engine import QueueFull
    from .engine.pooling import PoolingParams
    from .engine.request import CompletionOutput, EmbeddingOutput, Logprob, RequestOutput
    from .engine.sampling_params import SamplingParams
    from .engine.structured import StructuredOutputsParams
    from .errors import ModelError
    from .isa import get_num_threads, set_num_threads
    from .llm import LLM
    from .ops import OperatorConfig

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "EmbeddingOutput",
    "EngineDead",
    "Logprob",
    "ModelError",
    "OperatorConfig",
    "PoolingParams",
    "QueueFull",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "get_num_threads",
    "set_num_threads",
]

# Imported when first asked for: `from pace import isa` should not load an engine.
_HOMES = {
    "LLM": "llm",
    "AsyncEngine": "engine.async_engine",
    "EngineDead": "engine.async_engine",
    "QueueFull": "engine.engine",
    "CompletionOutput": "engine.request",
    "EmbeddingOutput": "engine.request",
    "Logprob": "engine.request",
    "ModelError": "errors",
    "OperatorConfig": "ops",
    "PoolingParams": "engine.pooling",
    "RequestOutput": "engine.request",
    "SamplingParams": "engine.sampling_params",
    "StructuredOutputsParams": "engine.structured",
    "get_num_threads": "isa",
    "set_num_threads": "isa",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"pace.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pace' has no attribute {name!r}")
