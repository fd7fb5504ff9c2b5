"""Our kernels on the rung of this host."""

from pace import isa, kernels

from .reference import register_form


def missing() -> str | None:
    return None if isa.RUNG != "reference" else "this process runs on the reference rung"


def register_all() -> None:
    register_form("NATIVE", kernels.native)
