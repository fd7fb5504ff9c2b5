"""The NumPy twins."""

from pace import kernels
from pace.ops.registry import OPERATORS, register
from pace.reference.arrays import bfloat16, float32


def missing() -> str | None:
    return None


def register_all() -> None:
    for operator, names in OPERATORS.items():
        register(operator, "REFERENCE", {name: kernels.reference(name) for name in names}, (float32, bfloat16))
