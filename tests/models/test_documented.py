"""docs/LLM.md has every family, and Qwen3 as it is."""

import inspect
from importlib import import_module
from pathlib import Path

from pace.models import MODELS, Model
from pace.models.gguf import ARCHITECTURES
from pace.models.qwen3 import Qwen3

PAGE = (Path(__file__).parents[2] / "docs" / "LLM.md").read_text()


def test_the_table_of_families():
    table = PAGE.split("## Models\n")[1].split("Each of them")[0].strip().splitlines()[2:]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table]
    families = {
        name: getattr(import_module(f"pace.models.{name}"), architecture) for name, architecture in MODELS.items()
    }
    seeing = {name for name, family in families.items() if family.processor.__func__ is not Model.processor.__func__}
    in_gguf = {architecture.model_type for architecture in ARCHITECTURES.values()}
    assert {name for name, _, _, _, _ in rows} == set(MODELS)
    assert {name for name, _, images, _, _ in rows if images == "yes"} == seeing
    assert {name for name, _, _, gguf, _ in rows if gguf == "yes"} == in_gguf


def test_the_page_that_shows_how():
    assert f"```py\n{inspect.getsource(Qwen3)}```" in PAGE
