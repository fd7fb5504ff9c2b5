"""oneDNN's kernels, made for their shapes at run time, as torch carries them (the extra `torch`).

Weights are reordered once into oneDNN's own layout. Products accumulate in float32 and are rounded to the dtype; biases
are bfloat16 with it, and what is not fused into a product (a factor, a residual) is rounded in between, so that
bfloat16 results are a rounding or two from NATIVE's. oneDNN may choose another kernel for another number of rows: a
row's last bits may depend on the batch.

torch runs on as many threads as our kernels do.
"""

import importlib.util
import logging
import re
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pace import isa, kernels
from pace.ops.registry import Function, register
from pace.reference.activate import check_activate
from pace.reference.arrays import Array, Float, bfloat16, check_norm, float32
from pace.reference.attend import check_attend, gathered
from pace.reference.linear import check_linear
from pace.reference.pack_linear import PackedLinear
from pace.reference.softmax import check_softmax

from .unpacked import Weight, biases_of, each_of, given, rows_of

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("pace")

ACTIVATIONS = {
    None: ("none", ""),
    "relu": ("relu", ""),
    "gelu_erf": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}


def missing() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install 'pace[torch]'"
    import torch

    return None if torch.backends.mkldnn.is_available() else "this torch was built without oneDNN"


def register_all() -> None:
    pack = kernels.pack_linear
    linears: dict[str, Function] = {"pack_linear": pack, "prepare": prepare, "linear": threaded(linear)}
    for operator in ("linear", "qkv_projection", "out_projection", "lm_head"):
        register(operator, "JIT", linears, (float32, bfloat16), in_panels=False)
    whole: dict[str, Function] = {"pack_linear": pack, "prepare": each_of(prepare), "mlp": threaded(mlp)}
    register("mlp", "JIT", whole, (float32, bfloat16), in_panels=False)
    norms = {each.__name__: threaded(each) for each in (rms_norm, add_rms_norm, layer_norm, add_layer_norm)}
    register("norm", "JIT", norms, (float32, bfloat16))
    for operator, function in (("activation", activate), ("softmax", softmax)):
        register(operator, "JIT", {function.__name__: threaded(function)}, (float32, bfloat16))
    register("attention", "JIT", {"store_kv": kernels.store_kv, "attend": threaded(attend)}, (float32, bfloat16))


def describe() -> str:
    import torch

    version = re.search(r"v[\d.]+", torch.__config__.show().split("MKL-DNN", 1)[-1])
    return f"oneDNN {version[0] if version else ''} of torch {torch.__version__}"


def threaded(function: Function) -> Function:
    """On as many threads as our kernels have now."""

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        import torch

        if torch.get_num_threads() != isa.get_num_threads():
            torch.set_num_threads(isa.get_num_threads())
        return function(*arguments, **named)

    return call


# --- arrays and tensors, of the same memory ---


def tensor(array: Array) -> "Tensor":
    """Of a copy, where torch has none such: what runs backwards, or must not be written."""
    import torch

    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    if array.dtype == bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array(values: "Tensor") -> Array:
    import torch

    values = values.contiguous()
    if values.dtype == torch.bfloat16:
        values = values.view(torch.int16)
        return cast(Array, values.numpy().view(bfloat16))
    return cast(Array, values.numpy())


# --- products ---


def prepare(packed: PackedLinear) -> Weight:
    import torch

    rows = rows_of(packed)
    torch.set_num_threads(1)  # a process that has begun threads of OpenMP can't be forked, as a server's node is
    values = torch.ops.mkldnn._reorder_linear_weight(tensor(rows), None)
    return Weight(values, packed.out_features, packed.in_features, packed.dtype, rows.nbytes)


def linear(
    x: Array,
    weight: Weight,
    bias: Float | None = None,
    activation: str | None = None,
    multiply: Array | None = None,
    residual: Array | None = None,
    out_dtype: Any = None,
    out: Array | None = None,
) -> Array:
    """As pace.reference.linear."""
    dtype = check_linear(x, weight, bias, activation, multiply, residual, out_dtype, out)
    result = product(tensor(x), weight, bias, activation)
    if dtype == float32:
        result = result.float()
    if multiply is not None:
        result = result * tensor(multiply)
    if residual is not None:
        result = result + tensor(residual)
    return given(array(result.bfloat16() if dtype == bfloat16 else result), out)


def product(x: "Tensor", weight: Weight, bias: Float | None, activation: str | None) -> "Tensor":
    import torch

    name, algorithm = ACTIVATIONS[activation]
    vector = None if bias is None else tensor(bias).to(x.dtype)
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.values, vector, name, [], algorithm)
    return made


def mlp(
    x: Array,
    weights: tuple[Weight, ...],
    up_bias: Float | None,
    down_bias: Float | None,
    activation: str,
    residual: Array | None = None,
) -> Array:
    """As pace.ops.mlp."""
    import torch

    *ups, down = weights
    biases = biases_of(up_bias, ups)
    for up, bias in zip(ups, biases, strict=True):
        check_linear(x, up, bias, activation)
    inner = product(tensor(x), ups[0], biases[0], activation)
    if len(ups) == 2:
        # The product up, multiplied by what is there before it is rounded.
        if biases[1] is None:
            inner = torch.ops.mkldnn._linear_pointwise.binary(tensor(x), inner, ups[1].values, None, "mul")
        else:
            inner = inner * product(tensor(x), ups[1], biases[1], None)
    check_linear(array(inner), down, down_bias, residual=residual)
    result = product(inner, down, down_bias, None)
    return array(result if residual is None else result + tensor(residual))


# --- norms ---


def rms_norm(x: Array, weight: Float, eps: float = 1e-5, out: Array | None = None) -> Array:
    import torch

    check_norm(x, weight, out=out)
    values = tensor(x)
    normed = torch.nn.functional.rms_norm(values.float(), (x.shape[1],), tensor(weight), eps)
    return given(array(normed.to(values.dtype)), out)


def add_rms_norm(x: Array, residual: Array, weight: Float, eps: float = 1e-5, out: Array | None = None) -> Array:
    check_norm(x, weight, None, residual, out)
    return rms_norm(added(x, residual), weight, eps, out)


def layer_norm(x: Array, weight: Float, bias: Float | None, eps: float = 1e-5, out: Array | None = None) -> Array:
    import torch

    check_norm(x, weight, bias, out=out)
    values, shift = tensor(x), None if bias is None else tensor(bias)
    normed = torch.nn.functional.layer_norm(values.float(), (x.shape[1],), tensor(weight), shift, eps)
    return given(array(normed.to(values.dtype)), out)


def add_layer_norm(
    x: Array, residual: Array, weight: Float, bias: Float | None, eps: float = 1e-5, out: Array | None = None
) -> Array:
    check_norm(x, weight, bias, residual, out)
    return layer_norm(added(x, residual), weight, bias, eps, out)


def added(x: Array, residual: Array) -> Array:
    """residual += x, by one rounding."""
    residual[...] = array(tensor(residual) + tensor(x))
    return residual


# --- activations and softmax ---


def activate(x: Array, activation: str, multiply: Array | None = None, out: Array | None = None) -> Array:
    """As pace.reference.activate."""
    from torch.nn import functional

    check_activate(x, activation, multiply, out)
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": functional.relu,
        "gelu_erf": functional.gelu,
        "gelu_tanh": partial(functional.gelu, approximate="tanh"),
        "silu": functional.silu,
    }
    result = forms[activation](tensor(x))
    return given(array(result if multiply is None else result * tensor(multiply)), out)


def softmax(x: Array, scale: float = 1.0, out: Array | None = None) -> Array:
    """As pace.reference.softmax."""
    import torch

    check_softmax(x, out)
    scaled = tensor(x).float() * scale
    return given(array(scaled.softmax(dim=1).to(torch.bfloat16 if x.dtype == bfloat16 else torch.float32)), out)


# --- attention ---


def attend(
    q: Array,
    k_blocks: Array,
    v_blocks: Array,
    block_tables: Array,
    query_starts: Array,
    kv_lengths: Array,
    scale: float,
    window: int | None = None,
    sinks: Float | None = None,
    softcap: float | None = None,
    spans: Array | None = None,
    out: Array | None = None,
) -> Array:
    """As pace.reference.attend, a sequence at a time, its keys and values gathered; soft caps are NATIVE's."""
    import torch

    check_attend(q, k_blocks, v_blocks, block_tables, query_starts, kv_lengths, window, sinks, softcap, spans, out)
    if softcap is not None:
        _say_softcap()
        return kernels.attend(  # type: ignore[no-any-return]
            q, k_blocks, v_blocks, block_tables, query_starts, kv_lengths, scale, window, sinks, softcap, spans, out
        )
    result = np.empty(q.shape, q.dtype) if out is None else out
    for queries, *kept, seen in gathered(k_blocks, v_blocks, block_tables, query_starts, kv_lengths, window, spans):
        keys, values = (tensor(each.astype(q.dtype)).movedim(0, 1) for each in kept)
        mask = torch.from_numpy(np.where(seen, np.float32(0), np.float32(-np.inf))).expand(q.shape[1], *seen.shape)
        if sinks is not None:  # a key more, of zeros, whose score the mask is; and its value
            keys, values = (torch.nn.functional.pad(each, (0, 0, 0, 1)) for each in (keys, values))
            mask = torch.cat((mask, tensor(sinks)[:, None, None].expand(-1, len(seen), 1)), dim=2)
        attended = torch.nn.functional.scaled_dot_product_attention(
            tensor(np.ascontiguousarray(q[queries])).movedim(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask.to(keys.dtype)[None],
            scale=scale,
            enable_gqa=True,
        )
        result[queries] = array(attended[0].movedim(0, 1))
    return result


@cache
def _say_softcap() -> None:
    logger.warning("JIT does not serve attention with a soft cap: using NATIVE, or REFERENCE where that can't run")
