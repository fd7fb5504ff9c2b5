"""The index of operations: the only place that knows both forms of each.

`pace.kernels.NAME` is the fastest form that this host runs: the native binding on the rung `pace.isa.RUNG`, or the
NumPy reference. `native(NAME)` and `reference(NAME)` are the two forms by name.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from . import isa

Operation = Callable[..., Any]

OPERATIONS = (
    "activate",
    "add_layer_norm",
    "add_rms_norm",
    "attend",
    "embed",
    "gated_mlp",
    "layer_norm",
    "linear",
    "moe",
    "pack_experts",
    "pack_linear",
    "rms_norm",
    "rope",
    "route",
    "sample",
    "softmax",
    "store_kv",
)


def reference(name: str) -> Operation:
    """The NumPy form: the specification."""
    return getattr(import_module(f"pace.reference.{name}"), name)  # type: ignore[no-any-return]


def native(name: str) -> Operation:
    """The native form. ImportError in a build without native kernels."""
    return getattr(import_module(f"pace._kernels.{name}.{name}"), name)  # type: ignore[no-any-return]


_form = reference if isa.RUNG == "reference" else native

activate = _form("activate")
add_layer_norm = _form("add_layer_norm")
add_rms_norm = _form("add_rms_norm")
attend = _form("attend")
embed = _form("embed")
gated_mlp = _form("gated_mlp")
layer_norm = _form("layer_norm")
linear = _form("linear")
moe = _form("moe")
pack_experts = _form("pack_experts")
pack_linear = _form("pack_linear")
rms_norm = _form("rms_norm")
rope = _form("rope")
route = _form("route")
sample = _form("sample")
softmax = _form("softmax")
store_kv = _form("store_kv")
