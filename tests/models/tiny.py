"""Tiny random Llamas on disk, in each format."""

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
}


def llama(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(LLAMA | changes))).to(dtype)


def arrays(model):
    """The tensors by name, in float32; a tied lm_head is not stored."""
    tied = model.config.tie_word_embeddings
    return {k: v.float().numpy() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}


def permuted(weight, heads):
    """The order of rows that llama.cpp's converter gives q and k."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def half_blocks(blocks):
    """MXFP4 as GGUF has it: byte i of a block holds elements i and 16 + i, where Hugging Face's holds 2i and 2i + 1."""
    elements = np.stack((blocks & 15, blocks >> 4), -1).reshape(*blocks.shape[:-1], 32)
    return elements[..., :16] | elements[..., 16:] << 4


def mxfp4(tensors, name):
    """A weight of experts as its GGUF tensor: each block's scale before its bytes."""
    blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
    whole = np.concatenate((scales[..., None], half_blocks(blocks)), -1)
    return whole.reshape(*whole.shape[:2], -1)


def unfused_experts(tensors):
    """What the converter makes of GPT-OSS's experts: gate and up apart, rows of weights as in other models."""
    out = {}
    for name, array in tensors.items():
        stem, _, form = name.partition("_proj")
        if "mlp.experts" not in name:
            out[f"{name}.weight" if name.endswith("sinks") else name] = array
            continue
        if form == "_scales":
            continue
        weight = {"": lambda a: a.swapaxes(1, 2), "_bias": lambda a: a}.get(form)
        array = mxfp4(tensors, f"{stem}_proj") if weight is None else weight(array)
        suffix = "bias" if form == "_bias" else "weight"
        if stem.endswith("gate_up"):
            for which, part in (("gate", array[:, ::2]), ("up", array[:, 1::2])):
                out[f"{stem.removesuffix('gate_up')}{which}_proj.{suffix}"] = part
        else:
            out[f"{stem}_proj.{suffix}"] = array
    return out


ARCHITECTURES = {"gpt_oss": "gpt-oss"}  # where it is not the model_type


def add_metadata(writer, config, architecture):
    """What the converter takes from config.json."""
    rope = config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture == "phi3":
        rotated = rope.get("partial_rotary_factor", 1.0) * config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(rotated))
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(config.sliding_window or 0)
        if "long_factor" in rope:
            original = config.original_max_position_embeddings
            stretch = np.log(config.max_position_embeddings / original) / np.log(original)
            writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + stretch)))
            for which in ("long", "short"):
                writer.add_tensor(f"rope_factors_{which}.weight", np.array(rope[f"{which}_factor"], np.float32))
        return
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(rope[key])
    if architecture == "gpt-oss":
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.intermediate_size)
        writer.add_sliding_window(config.sliding_window)


def write_gguf(
    path,
    model,
    kind=gguf.GGMLQuantizationType.F32,
    rope_factors=None,
    architecture=None,
    metadata=(),
    tensors=None,
):
    """A GGUF file as llama.cpp's converter writes it, with the names of the gguf package: matrices of `kind`, vectors
    in float32; uint8 arrays are MXFP4. tensors: by their Hugging Face names, in place of the model's own.
    """
    config = model.config
    own = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture or own)
    add_metadata(writer, config, own)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_eot_token_id(7)
    for key, value in metadata:
        getattr(writer, key)(value)
    (number,) = [number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == own]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, array in unfused_experts(arrays(model) if tensors is None else tensors).items():
        if own == "llama" and (projection := name.split(".")[-2]) in heads:
            array = permuted(array, heads[projection])
        name, array = names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(array)
        if array.dtype == np.uint8:
            writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType.MXFP4)
        elif array.ndim > 1 and kind != gguf.GGMLQuantizationType.F32 and not name.endswith(".bias"):
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
