"""The operator framework: models name operators, `OperatorConfig` names the backend of each."""

from .config import OperatorConfig
from .operators import (
    MLP,
    Activation,
    Attention,
    Embedding,
    Frequencies,
    LayerNorm,
    Linear,
    LMHead,
    MoE,
    RMSNorm,
    RoPE,
    Sampling,
    Softmax,
)
from .registry import register_backend

__all__ = [
    "MLP",
    "Activation",
    "Attention",
    "Embedding",
    "Frequencies",
    "LMHead",
    "LayerNorm",
    "Linear",
    "MoE",
    "OperatorConfig",
    "RMSNorm",
    "RoPE",
    "Sampling",
    "Softmax",
    "register_backend",
]
