"""Servers to ask: one of a tiny random model, one of SmolLM2, each with two engines, for the whole session."""

import json
import os
from pathlib import Path

import pytest

from tests.engine.fakes import write_model

from .running import Server

TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The directory of a tiny random model, with a chat template."""
    path = tmp_path_factory.mktemp("tiny-server")
    write_model(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def server(tiny, tmp_path_factory):
    """Of the tiny model, with two engines."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    flags = ("--engines", 2, "--served-model-name", "tiny", "--kv-cache-bytes", "8M", "--max-sequences", 64)
    with Server(tiny, *flags, log=log) as running:
        yield running


SEEING_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}[image]{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}\n\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def seeing_model(tmp_path_factory):
    """The directory of a tiny random model that sees, for processes that have stand_in on their path."""
    path = tmp_path_factory.mktemp("seeing-server")
    write_model(path)
    (path / "chat_template.jinja").write_text(SEEING_TEMPLATE)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "seeing"}))
    return path


@pytest.fixture(scope="session")
def seeing(seeing_model, tmp_path_factory):
    """Of the tiny model that sees, with two engines."""
    log = tmp_path_factory.mktemp("log") / "seeing.log"
    flags = ("--engines", 2, "--served-model-name", "seeing", "--kv-cache-bytes", "8M")
    flags += ("--max-images", 3, "--max-waiting-tokens", 60)
    here = Path(__file__).parent
    known = os.pathsep.join(map(str, (here / "stand_in", here.parent.parent)))
    with Server(seeing_model, *flags, log=log, env={"PYTHONPATH": known}) as running:
        yield running


@pytest.fixture(scope="session")
def smollm2(smollm2, tmp_path_factory):
    """Of SmolLM2, with two engines."""
    log = tmp_path_factory.mktemp("log") / "smollm2.log"
    flags = ("--engines", 2, "--served-model-name", "smollm2", "--kv-cache-bytes", "512M")
    with Server(smollm2, *flags, log=log) as running:
        yield running
