"""Which backend serves which operator, in which dtypes.

An operator is made of functions: `norm` of rms_norm, add_rms_norm and so on (OPERATORS). A backend is a module (or any
object) with

    missing() -> str | None      what it lacks on this host, in words; None where it can run
    register_all() -> None       calls `register` for each operator that it serves
    describe() -> str            the library that it has found; it may do without

Most functions have the contract of the twin of their name in pace.reference. Two are of this level:

    prepare(weight) or prepare(up, down)      weights in panels, made into what the backend multiplies with; called
                                              once, and only what it returns is kept
    mlp(x, prepared, up_bias, down_bias, activation, residual)      as in pace.ops.mlp

`resolve` gives the functions of the backend asked for, or of the next in FALLBACK for an operator or dtype that it does
not serve; a fallback is logged once, with the reason.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import numpy as np

logger = logging.getLogger("pace")

Dtype = np.dtype[np.generic]
Function = Callable[..., Any]

OPERATORS: Mapping[str, tuple[str, ...]] = {
    "norm": ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"),
    "linear": ("pack_linear", "prepare", "linear"),
    "qkv_projection": ("pack_linear", "prepare", "linear"),
    "rope": ("rope",),
    "attention": ("store_kv", "attend"),
    "out_projection": ("pack_linear", "prepare", "linear"),
    "mlp": ("pack_linear", "prepare", "mlp"),
    "activation": ("activate",),
    "softmax": ("softmax",),
    "moe": ("pack_linear", "linear", "pack_experts", "route", "moe"),
    "embedding": ("pack_linear", "embed"),
    "lm_head": ("pack_linear", "prepare", "linear"),
    "sampling": ("sample",),
}
FALLBACK = ("NATIVE", "REFERENCE")

# Name → module. Others are added by register_backend, or by a package's entry points of the group "pace.backends".
BACKENDS: dict[str, Any] = {
    "NATIVE": "pace.ops.backends.native",
    "REFERENCE": "pace.ops.backends.reference",
    "IMBPS": "pace.ops.backends.imbps",
    "JIT": "pace.ops.backends.jit",
    "TPP": "pace.ops.backends.tpp",
    "AOCLDLP": "pace.ops.backends.aocl_dlp",
}
GROUP = "pace.backends"


@dataclass(frozen=True)
class Registration:
    """What a backend serves an operator with. in_panels: it multiplies with weights in panels as they are."""

    functions: Mapping[str, Function]
    dtypes: tuple[Dtype, ...]
    in_panels: bool


_registry: dict[tuple[str, str], Registration] = {}


def register_backend(name: str, module: Any) -> None:
    """Make a backend known: a module, its name, or an object like one. ValueError where the name is taken."""
    if name in backends():
        raise ValueError(f"there is a backend {name} already")
    BACKENDS[name] = module


def register(
    operator: str,
    backend: str,
    functions: Mapping[str, Function],
    dtypes: tuple[Dtype, ...],
    in_panels: bool = True,
) -> None:
    """Have `backend` serve `operator` in `dtypes`; `functions` has every name that OPERATORS lists for it."""
    lacking = set(OPERATORS[operator]) - set(functions)
    if lacking:
        raise ValueError(f"{backend} registers {operator} without {', '.join(sorted(lacking))}")
    _registry[operator, backend] = Registration(functions, dtypes, in_panels)


@cache
def _installed() -> dict[str, Any]:
    """Backends of other packages, by their entry points."""
    return {point.name: point for point in entry_points(group=GROUP)}


def backends() -> list[str]:
    """All names, ours first."""
    return [*BACKENDS, *(name for name in _installed() if name not in BACKENDS)]


@cache
def _module(backend: str) -> Any:
    if backend in BACKENDS:
        module = BACKENDS[backend]
        return import_module(module) if isinstance(module, str) else module
    return _installed()[backend].load()


@cache
def missing(backend: str) -> str | None:
    """Why a backend can't run here; None where it can, and has registered what it serves. ValueError for a name that
    is no backend's.
    """
    if backend not in backends():
        raise ValueError(f"backend {backend!r} is unknown; there are {', '.join(backends())}")
    try:
        reason: str | None = _module(backend).missing()
        if reason is None:
            _module(backend).register_all()
    except Exception as error:  # others' code, or a library that is broken: all else goes on
        return f"it fails ({type(error).__name__}: {error})"
    return reason


def describe(backend: str) -> str | None:
    """The library behind it, where there is one."""
    found: str | None = _module(backend).describe() if hasattr(_module(backend), "describe") else None
    return found


def libraries() -> dict[str, str]:
    """Those behind the backends that can run here, by backend."""
    return {name: found for name in available() if (found := describe(name)) is not None}


def available() -> list[str]:
    """The backends that can run here."""
    return [name for name in backends() if missing(name) is None]


def registration(operator: str, backend: str) -> Registration | None:
    """None where it can't run here, or does not serve the operator."""
    return _registry.get((operator, backend)) if missing(backend) is None else None


def serving(operator: str, backend: str, dtype: Dtype, in_panels: bool = False) -> str:
    """The backend that serves an operator in a dtype when `backend` is asked for: itself, or a fallback."""
    for candidate in (backend, *FALLBACK):
        found = registration(operator, candidate)
        if found is not None and dtype in found.dtypes and (found.in_panels or not in_panels):
            return candidate
    raise TypeError(f"no backend serves {operator} in {dtype}")


@cache
def resolve(operator: str, backend: str, dtype: Dtype, in_panels: bool = False) -> SimpleNamespace:
    """The functions of an operator, by name. in_panels: for a weight that stays in panels, as others read it."""
    chosen = serving(operator, backend, dtype, in_panels)
    if chosen != backend:
        found = registration(operator, backend)
        served = found is not None and dtype in found.dtypes
        reason = "would keep a table twice that is read at both ends, in" if served else "does not serve"
        logger.warning("%s %s %s in %s: using %s", backend, reason, operator, dtype, chosen)
    found = registration(operator, chosen)
    assert found is not None
    return SimpleNamespace(**found.functions)
