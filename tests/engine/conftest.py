"""A tiny random Llama, in pace and in transformers."""

import pytest

from pace import LLM

from .fakes import write_model


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_model(path)
    return path


@pytest.fixture
def llm(directory):
    return LLM(directory, kv_cache_bytes=4 << 20)


@pytest.fixture(scope="session")
def peer(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("peer"))
