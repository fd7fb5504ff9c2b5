"""GPT-OSS (OpenAI, 2025): experts in place of the MLP, sinks, and a window in every second layer."""

from .config import Config
from .layers import Decoder, Parts, PreNorm
from .weights import Weights


class GptOss(Decoder):
    """Experts that a checkpoint has in MXFP4 stay so, in memory and in the product."""

    def __init__(self, config: Config, weights: Weights) -> None:
        parts = Parts(config, weights)
        bias, rope = config.flag("attention_bias", True), parts.rope()
        window = config.integer("sliding_window", 0, least=0) or None
        inner, experts = config.integer("intermediate_size"), config.integer("num_local_experts")
        chosen = config.integer("num_experts_per_tok", 4)
        alpha, limit = config.number("swiglu_alpha", 1.702), config.number("swiglu_limit", 7.0)
        layers = [
            PreNorm(
                parts.rms_norm(f"{name}.input_layernorm"),
                parts.attention(
                    f"{name}.self_attn",
                    rope,
                    bias,
                    out_bias=bias,
                    window=window,
                    sinks=weights.vector(f"{name}.self_attn.sinks", parts.heads),
                ),
                parts.rms_norm(f"{name}.post_attention_layernorm"),
                weights.moe(
                    f"{name}.mlp", parts.hidden, inner, experts, chosen, alpha, limit, is_mxfp4(config, weights, name)
                ),
            )
            for name, window in zip(
                parts.layers("model.layers"), config.windows(window, lambda index: index % 2 == 0), strict=True
            )
        ]
        super().__init__(parts, layers, parts.rms_norm("model.norm"))


def is_mxfp4(config: Config, weights: Weights, layer: str) -> bool:
    """As the tensors are named; where neither is there, as config.json says."""
    name = f"{layer}.mlp.experts.gate_up_proj"
    quantization = config.values.get("quantization_config") or {}
    declared = isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"
    return weights.holds(f"{name}_blocks") or (declared and not weights.holds(name))
