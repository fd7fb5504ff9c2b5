"""A tiny target, and drafts that are more and less like it."""

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from pace import LLM
from pace.speculative import PROPOSERS
from tests.engine.fakes import TINY, write_model, write_tokenizer
from tests.models.tiny import LLAMA

from .proposers import OUTSIDE

PARD_TOKEN = 0


@pytest.fixture(scope="package", autouse=True)
def outside():
    """Proposers that are registered from outside, and are nobody's afterwards."""
    PROPOSERS.update(OUTSIDE)
    yield
    for name in OUTSIDE:
        del PROPOSERS[name]


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("target")
    write_model(path)
    return path


@pytest.fixture(scope="session")
def other_directory(tmp_path_factory):
    """A Qwen2 of one layer, that says other things."""
    path = tmp_path_factory.mktemp("other")
    config = LLAMA | TINY | {"num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 1}
    Qwen2ForCausalLM(Qwen2Config(**config)).save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def llm(directory):
    return LLM(directory, dtype="bfloat16", kv_cache_bytes=16 << 20)


@pytest.fixture(scope="session")
def alike(directory):
    """The target in another dtype."""
    return LLM(directory, dtype="float32", kv_cache_bytes=16 << 20)


@pytest.fixture(scope="session")
def other(other_directory):
    return LLM(other_directory, dtype="bfloat16", kv_cache_bytes=16 << 20)
