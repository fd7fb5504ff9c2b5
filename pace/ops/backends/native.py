"""Our kernels on the rung of this host."""

from pace import isa, kernels
from pace.ops.registry import OPERATORS, register
from pace.reference.arrays import bfloat16, float32


def missing() -> str | None:
    return None if isa.RUNG != "reference" else "this process runs on the reference rung"


def register_all() -> None:
    for operator, names in OPERATORS.items():
        register(operator, "NATIVE", {name: kernels.native(name) for name in names}, (float32, bfloat16))
