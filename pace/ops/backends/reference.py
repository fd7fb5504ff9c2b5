"""The NumPy twins."""

from collections.abc import Callable

from pace import kernels
from pace.ops.mlp import in_panels, mlp_of
from pace.ops.registry import OPERATORS, Function, register
from pace.reference.arrays import bfloat16, float32


def missing() -> str | None:
    return None


def register_all() -> None:
    register_form("REFERENCE", kernels.reference)


def register_form(backend: str, form: Callable[[str], Function]) -> None:
    """All operators, of one form of the kernels, which it gives by name."""
    own = {"prepare": in_panels, "mlp": mlp_of(form("linear"), form("gated_mlp"))}
    for operator, names in OPERATORS.items():
        register(operator, backend, {name: own.get(name) or form(name) for name in names}, (float32, bfloat16))
