"""The operator framework: models name operators, `OperatorConfig` names the backend of each."""

from .config import OperatorConfig
from .operators import Attention, GatedMLP, LayerNorm, Linear, LMHead, RMSNorm, RoPE, Sampling

__all__ = ["Attention", "GatedMLP", "LMHead", "LayerNorm", "Linear", "OperatorConfig", "RMSNorm", "RoPE", "Sampling"]
