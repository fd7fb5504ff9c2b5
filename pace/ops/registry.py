"""Which backend serves which operator, in which dtypes.

An operator is made of kernel functions: `norm` of rms_norm, add_rms_norm and so on (OPERATORS). A backend registers,
for an operator, functions of those names with the contracts of pace.reference, and the dtypes they take. `resolve`
gives the functions of the backend asked for, or of the next in FALLBACK for an operator or dtype that it does not
serve; a fallback is logged once.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np

logger = logging.getLogger("pace")

Dtype = np.dtype[np.generic]
Function = Callable[..., Any]

OPERATORS: Mapping[str, tuple[str, ...]] = {
    "norm": ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"),
    "qkv_projection": ("pack_linear", "linear"),
    "rope": ("rope",),
    "attention": ("store_kv", "attend"),
    "out_projection": ("pack_linear", "linear"),
    "mlp": ("pack_linear", "linear", "gated_mlp"),
    "moe": ("pack_linear", "linear", "pack_experts", "route", "moe"),
    "lm_head": ("pack_linear", "linear", "embed"),
    "sampling": ("sample",),
}
FALLBACK = ("NATIVE", "REFERENCE")

# A backend is a module of pace.ops.backends that registers itself, or says in `missing()` what it lacks on this host.
BACKENDS = {"NATIVE": "native", "REFERENCE": "reference"}


@dataclass(frozen=True)
class Registration:
    """What a backend serves an operator with."""

    functions: Mapping[str, Function]
    dtypes: tuple[Dtype, ...]


_registry: dict[tuple[str, str], Registration] = {}


def register(operator: str, backend: str, functions: Mapping[str, Function], dtypes: tuple[Dtype, ...]) -> None:
    """Have `backend` serve `operator` in `dtypes`; `functions` has every name that OPERATORS lists for it."""
    lacking = set(OPERATORS[operator]) - set(functions)
    if lacking:
        raise ValueError(f"{backend} registers {operator} without {', '.join(sorted(lacking))}")
    _registry[operator, backend] = Registration(functions, dtypes)


@cache
def missing(backend: str) -> str | None:
    """Why a backend can't run here; None where it can. ValueError for a name that is no backend's."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; there are {', '.join(BACKENDS)}")
    module = import_module(f"pace.ops.backends.{BACKENDS[backend]}")
    reason: str | None = module.missing()
    if reason is None:
        module.register_all()
    return reason


def available() -> list[str]:
    """The backends that can run here."""
    return [name for name in BACKENDS if missing(name) is None]


def serving(operator: str, backend: str, dtype: Dtype) -> str:
    """The backend that serves an operator in a dtype when `backend` is asked for: itself, or a fallback."""
    for candidate in (backend, *FALLBACK):
        if missing(candidate) is None:
            registration = _registry.get((operator, candidate))
            if registration is not None and dtype in registration.dtypes:
                return candidate
    raise TypeError(f"no backend serves {operator} in {dtype}")


@cache
def resolve(operator: str, backend: str, dtype: Dtype) -> SimpleNamespace:
    """The functions of an operator, by name."""
    chosen = serving(operator, backend, dtype)
    if chosen != backend:
        logger.warning("%s does not serve %s in %s: using %s", backend, operator, dtype, chosen)
    return SimpleNamespace(**_registry[operator, chosen].functions)
