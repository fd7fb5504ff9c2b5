"""Every example runs as its user runs it, and shows what it says."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.models.tiny import llama
from tests.server.running import Server

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))

# What each script prints, whatever the rung.
PRINTED = {
    "basic": r"'The capital of France is' → ' Paris.*\n'Water boils at' → .*\ntext 0, length: .*\ntext 1, length: ",
    "streaming": r"first token after \d+\.\d\d s\n\d+ tokens read, \d+ written\nended by: (length|stop)\n$",
    "chat": r"user: .*\nassistant: .*Paris.*\n.* 0 of them cached\]\nuser: .*\n(.*\n)+ .*, 32 of them cached\]\n$",
    "batch": r"^(The capital of .*\n){6}6 requests in \d+ steps; .*\n30 tokens read, \d+ written, 0 preemptions\n",
    "structured_output": (
        r"json: (?P<json>\{.*\})\nregex: \d{4}-\d\d\nchoice: (good|bad)\ngrammar: \d+ \+ [\d+ ]+ = \d+\n"
    ),
    "speculative_ngram": r"nine years later\.\nthe same text: True\n\d+ of \d+ drafts were right; \d+ steps\n$",
    "speculative_draft_model": r"the same text: True\n\d+% right, \d\.\d tokens a step\n$",
    "async_engine": r"3 requests: \{('cancelled': 1, 'length': 2|'length': 2, 'cancelled': 1)\}\n$",
}
# Those that ask a server.
ASKING = {
    "openai_client": (
        r"answer: .*Paris.*\nstream: .*Paris.*\n\d+ tokens read, \d+ written\n"
        r"schema: name='(Paris|Rome|Madrid)' large=(True|False)\nchoice: (Paris|Lyon)\nembeddings: \[576, 576\]\n$"
    ),
    "server_tools": (
        r'^weather\(\{"city": "\w+", "unit": "\w+"\}\) -> \{\'city\': .*\'degrees\': (21|70)\}\nassistant: .'
    ),
}


# Those that need more than a model.
OTHERS = {"speculative_pard", "train_pard_draft"}


def run(script, *arguments):
    run = subprocess.run(
        [sys.executable, script, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def printed(smollm2):
    """What a script prints, by its name."""
    return lambda name: run(EXAMPLES / f"{name}.py", smollm2)


def test_all_scripts_are_known():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == PRINTED.keys() | ASKING.keys() | OTHERS


@pytest.mark.parametrize("name", PRINTED)
def test_a_script(printed, name):
    shown = printed(name)
    found = re.search(PRINTED[name], shown.stdout)
    assert found, shown.stdout
    if name == "structured_output":
        city = ast.literal_eval(found["json"])
        assert city.keys() == {"name", "country", "inhabitants"}
        assert 0 <= city["inhabitants"] <= 100_000_000
    if name == "batch":
        assert "100%" in shown.stderr  # the bar


def test_a_pard_draft(smollm2, tmp_path):
    """Of a model that is untrained: texts are the same."""
    made = llama(vocab_size=49152, hidden_size=64, num_hidden_layers=1, max_position_embeddings=2048, pard_token=0)
    made.save_pretrained(tmp_path)
    shown = run(EXAMPLES / "speculative_pard.py", smollm2, tmp_path).stdout
    assert re.search(r"^(the same text: True\n){3}\d+ of \d+ drafts were right\nsteps took \d\.\d\d times less", shown)


@pytest.fixture(scope="module")
def url(smollm2, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    with Server(smollm2, "--engines", 1, "--kv-cache-bytes", "256M", log=log) as server:
        yield f"{server.url}/v1"


@pytest.mark.parametrize("name", ASKING)
def test_a_script_that_asks_a_server(url, name):
    shown = run(EXAMPLES / f"{name}.py", url).stdout
    assert re.search(ASKING[name], shown), shown


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_a_script_says_how_to_run_it(path):
    argument = "URL" if path.stem in ASKING else "MODEL"  # the first
    assert f"python examples/{path.name} [{argument}]" in ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("page", ["README.md", "docs/LLM.md"])
def test_the_snippets_of_a_page(smollm2, tmp_path, page):
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert snippets
    script = tmp_path / "snippets.py"
    script.write_text("\n".join(snippets))
    assert "Paris" in run(script, smollm2).stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert cells
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.fixture
def ran(smollm2, monkeypatch):
    """The code cells of a notebook that has run, by their ids."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run_notebook(name):
        notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", 4)
        NotebookClient(notebook, timeout=120).execute()  # raises for a cell that fails
        return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}

    return run_notebook


def test_the_notebook_of_a_server(ran):
    cells = ran("server")
    assert "Paris" in result_of(cells["chat"])
    assert ast.literal_eval(result_of(cells["tools"]))[1].keys() == {"city", "unit"}
    assert ast.literal_eval(result_of(cells["schema"])).keys() == {"city", "is_capital"}
    assert [result_of(cells[name]) for name in ("many", "kill", "stop")] == ["True", "True", "0"]


def test_the_notebook_of_a_server_with_drafts(ran):
    cells = ran("speculative")
    assert result_of(cells["ask"]) == "[True, True]"
    figures = ast.literal_eval(result_of(cells["metrics"]))
    assert float(figures["drafted_tokens_total"]) > float(figures["accepted_tokens_total"]) > 0
    assert result_of(cells["stop"]) == "[0, 0]"


def test_the_notebook(ran):
    cells = ran("pace")
    assert result_of(cells["generate"]).startswith("' Paris")
    weather = ast.literal_eval(result_of(cells["structured"]))
    assert isinstance(weather["rainy"], bool)
    assert re.fullmatch(r"\{('length': \d+|'stop': \d+)(, .*)?\}", result_of(cells["stats"]))


def result_of(cell):
    """The value of a cell's last line, as it is shown."""
    (result,) = [output for output in cell.outputs if output.output_type == "execute_result"]
    return result.data["text/plain"]
