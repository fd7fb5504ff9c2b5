"""The operator framework: models name operators, `OperatorConfig` names the backend of each."""

from .config import OperatorConfig
from .operators import (
    Attention,
    Embedding,
    Frequencies,
    GatedMLP,
    LayerNorm,
    Linear,
    LMHead,
    MoE,
    PlainMLP,
    RMSNorm,
    RoPE,
    Sampling,
)

__all__ = [
    "Attention",
    "Embedding",
    "Frequencies",
    "GatedMLP",
    "LMHead",
    "LayerNorm",
    "Linear",
    "MoE",
    "OperatorConfig",
    "PlainMLP",
    "RMSNorm",
    "RoPE",
    "Sampling",
]
