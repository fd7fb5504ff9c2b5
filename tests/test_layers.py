"""Water flows down: a module of `pace` imports from its own part and from those below, never from above."""

import ast
from pathlib import Path

import pytest

PACE = Path(__file__).parent.parent / "pace"

# From the top down; what stands in one line does not know its neighbours. `__init__` is the package's own face.
ORDER = [
    ("__main__",),
    ("cli",),
    ("bench",),
    ("info",),
    ("__init__",),
    ("server", "llm"),
    ("engine",),
    ("speculative", "tuning"),
    ("config",),
    ("models",),
    ("cache",),
    ("ops",),
    ("kernels",),
    ("roofline", "partition"),
    ("numa",),
    ("isa", "host"),
    ("_kernels", "reference"),
    ("errors", "sysfs", "memory_policy", "options"),
]
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
MODULES = sorted(PACE.rglob("*.py"))


def dotted(path):
    """The parts of a module's name below `pace`; its package for an `__init__.py` inside of one."""
    parts = path.relative_to(PACE).with_suffix("").parts
    return parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts


def is_module(parts):
    path = PACE.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").exists() or path.with_suffix(".pyx").exists()


def imports_of(path, source):
    """The part of `pace` of each import anywhere in a module, with its line."""
    package = ("pace", *path.relative_to(PACE).parts[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names = [(*base, alias.name) if is_module((*base[1:], alias.name)) else base for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "pace":
                yield name[1] if len(name) > 1 else "__init__", node.lineno


def upward(path, source):
    """Imports that flow up, or sideways between neighbours."""
    part = dotted(path)[0]
    return [
        f"{path.relative_to(PACE)}:{line} ({part}) imports {other}"
        for other, line in imports_of(path, source)
        if other != part and RANK[other] <= RANK[part]
    ]


def test_every_part_has_its_place():
    assert {dotted(path)[0] for path in MODULES} <= RANK.keys(), "give the new part its place in ORDER"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACE)))
def test_imports_go_one_way(path):
    assert upward(path, path.read_text()) == []


@pytest.mark.parametrize("part", ["engine", "models", "cache"])
def test_no_kernel_is_named_above_the_operators(part):
    for path in (PACE / part).rglob("*.py"):
        assert {name for name, _ in imports_of(path, path.read_text())}.isdisjoint({"kernels", "_kernels"}), path


@pytest.mark.parametrize(
    ("module", "line", "part"),
    [
        ("kernels.py", "from .ops import registry", "ops"),
        ("reference/rms_norm.py", "from .. import isa", "isa"),
        ("reference/rms_norm.py", "def f():\n    import pace.kernels", "kernels"),
        ("isa.py", "from pace import LLM", "__init__"),
        ("_kernels/__init__.py", "from pace.reference.arrays import f32", "reference"),
    ],
)
def test_an_import_that_flows_up_is_seen(module, line, part):
    assert [text.split()[-1] for text in upward(PACE / module, line)] == [part]
