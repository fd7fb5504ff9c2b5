"""The command, as it is used: in processes of its own where pipes, terminals and Ctrl-C matter."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from pace import LLM, SamplingParams, isa
from pace.cli.answer import Figures
from pace.cli.commands import app
from pace.cli.terminal import explain

from .models.tiny import llama

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role[0] }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)


def write_model(path, **changes):
    """A tiny random Llama whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(name, special=True) for name in ("<|s|>", "<|u|>", "<|a|>")])
    llama(**({"vocab_size": 259, "eos_token_id": None, "bos_token_id": None} | changes)).save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return path


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models so small are faster on one, and tests beside others much."""
    before = isa.get_num_threads()
    isa.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    isa.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def endless(tmp_path_factory):
    """Has no token that ends a text, and room for many."""
    return write_model(tmp_path_factory.mktemp("endless"), max_position_embeddings=200_000)


def run(*args, input=None):
    return CliRunner().invoke(app, [str(arg) for arg in args], input=input, prog_name="pace")


def pace(*args, **options):
    """`python -m pace`, with pipes."""
    command = [sys.executable, "-m", "pace", *map(str, args)]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    return subprocess.Popen(command, **(pipes | options))


class Terminal:
    """`python -m pace` on a pseudo-terminal."""

    def __init__(self, *args, columns=120):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": "xterm", "COLUMNS": str(columns)}
            os.execv(sys.executable, [sys.executable, "-m", "pace", *map(str, args)])
        self.seen = ""

    def read(self, seconds=0.05):
        if select.select([self.fd], [], [], seconds)[0]:
            try:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                return False
        return True

    def wait_for(self, pattern, seconds=20):
        """Reads until the pattern is seen; returns and forgets all that was read up to its end."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < deadline, f"{pattern!r} is not in {self.seen[-2000:]!r}"
            assert self.read() or re.search(pattern, self.seen, re.DOTALL), self.seen[-2000:]
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def type(self, text):
        os.write(self.fd, text.encode())

    def ended(self, seconds):
        deadline = time.monotonic() + seconds
        while self.read():
            if time.monotonic() > deadline:
                return False
        return True

    def status(self, seconds=20):
        assert self.ended(seconds), self.seen[-2000:]
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal():
    opened = []

    def start(*args, **options):
        opened.append(Terminal(*args, **options))
        return opened[-1]

    yield start
    for each in opened:
        os.close(each.fd)
        try:
            if os.waitpid(each.pid, os.WNOHANG)[0] == 0:
                os.kill(each.pid, signal.SIGKILL)
                os.waitpid(each.pid, 0)
        except ChildProcessError:
            pass


PROMPT = r"> (?:\x1b\[0m)?"


def test_the_text_is_that_of_the_library_and_all_that_stdout_gets(tiny):
    params = SamplingParams(temperature=0.8, top_k=50, seed=5, max_tokens=20)
    expected = LLM(tiny).generate("Hello", params)[0].outputs[0].text
    result = run("generate", tiny, "Hello", "--temperature", 0.8, "--top-k", 50, "--seed", 5, "--max-tokens", 20)
    assert result.exit_code == 0, result.output
    assert result.stdout == expected + "\n" * (not expected.endswith("\n"))
    assert re.fullmatch(r"prompt \d+ tok/s · first token .* s from start\) · decode [\d.]+ tok/s · .*\n", result.stderr)


def test_stdin_and_the_template(tiny):
    asked = LLM(tiny).chat([{"role": "user", "content": "Hi\nyou"}], SamplingParams(temperature=0, max_tokens=9))
    result = run("generate", tiny, "-", "--chat", "--max-tokens", 9, "--no-stats", input="Hi\nyou\n")
    assert result.stdout.rstrip("\n") == asked[0].outputs[0].text.rstrip("\n")
    assert result.stderr == ""


def test_stop_strings_can_be_repeated(tiny):
    text = LLM(tiny).generate("Hello", SamplingParams(temperature=0, max_tokens=20))[0].outputs[0].text
    result = run("generate", tiny, "Hello", "--max-tokens", 20, "--stop", "nowhere", "--stop", text[6:8])
    assert result.stdout == text[: text.index(text[6:8])] + "\n"


def test_bad_words_can_be_repeated(tiny):
    text = LLM(tiny).generate("Hello", SamplingParams(temperature=0, max_tokens=20))[0].outputs[0].text
    words = [character for character in dict.fromkeys(text) if character.strip() and character.isascii()][:2]
    options = [part for word in words for part in ("--bad-word", word)]
    result = run("generate", tiny, "Hello", "--max-tokens", 20, *options)
    assert result.exit_code == 0, result.output
    assert len(words) == 2
    assert not set(words) & set(result.stdout)


SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize("form", ["text", "file"])
def test_json_by_a_schema(tiny, tmp_path, form):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    schema = tmp_path / "schema.json" if form == "file" else json.dumps(SCHEMA)
    result = run("generate", tiny, "Hello", "--json-schema", schema)
    assert json.loads(result.stdout)["a"] in (1, 2)


@pytest.mark.parametrize("form", ["text", "file"])
def test_text_by_a_grammar(tiny, tmp_path, form):
    source = 'root ::= ("ab" | "cd"){3}'
    (tmp_path / "grammar.gbnf").write_text(source)
    grammar = tmp_path / "grammar.gbnf" if form == "file" else source
    assert re.fullmatch("(ab|cd){3}\n", run("generate", tiny, "Hello", "--grammar", grammar).stdout)


def test_text_by_a_regular_expression_or_a_choice(tiny):
    assert re.fullmatch(r"[xy]{4}\n", run("generate", tiny, "Hello", "--regex", "[xy]{4}").stdout)
    assert run("generate", tiny, "Hello", "--choice", "yes", "--choice", "no").stdout in ("yes\n", "no\n")
    assert run("chat", tiny, "--choice", "ja", "--no-stats", input="Hi\nHi\n").stdout == "ja\nja\n"


def with_generation_config(tiny, tmp_path, **values):
    model = changed(tiny, tmp_path)
    (model / "generation_config.json").write_text(json.dumps(values))
    return model


def test_generate_takes_the_models_own_values(tiny, tmp_path):
    model = with_generation_config(tiny, tmp_path, temperature=1.5, repetition_penalty=3.0)
    plain, penalised = (
        LLM(path).generate("Hello", SamplingParams(temperature=0, max_tokens=20))[0].outputs[0].text
        for path in (tiny, model)
    )
    assert plain != penalised
    options = ["--max-tokens", 20, "--no-stats"]
    assert run("generate", model, "Hello", *options).stdout.rstrip("\n") == penalised.rstrip("\n")
    own = run("generate", model, "Hello", *options, "--repetition-penalty", 1)
    assert own.stdout.rstrip("\n") == plain.rstrip("\n")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"temperature": 1.5, "top_k": 40, "top_p": 0.9}),
        (["--temperature", 0.5, "--top-p", 0.5], {"temperature": 0.5, "top_k": 40, "top_p": 0.5}),
    ],
)
def test_chat_takes_the_models_own_values_first(tiny, tmp_path, options, expected):
    model = with_generation_config(tiny, tmp_path, temperature=1.5, top_k=40)
    params = SamplingParams(**expected, seed=3, max_tokens=20)
    answer = LLM(model).chat([{"role": "user", "content": "Hi"}], params)[0].outputs[0].text
    result = run("chat", model, "--seed", 3, "--max-tokens", 20, "--no-stats", *options, input="Hi\n")
    assert result.stdout.rstrip("\n") == answer.rstrip("\n")


def test_chat_of_a_model_that_says_nothing(tiny):
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=3, max_tokens=20)
    answer = LLM(tiny).chat([{"role": "user", "content": "Hi"}], params)[0].outputs[0].text
    result = run("chat", tiny, "--seed", 3, "--max-tokens", 20, "--no-stats", input="Hi\n")
    assert result.stdout.rstrip("\n") == answer.rstrip("\n")


def test_prefix_caching_reaches_the_cache(tiny):
    options = ["--max-tokens", 4, "--no-stats", "--prefix-caching"]
    assert run("chat", tiny, *options, input="Hi\nHi\n").exit_code == 0
    refused = run("generate", tiny, "Hello", *options, "--cache", "BMC")
    assert refused.exit_code == 1
    assert "prefix" in refused.stderr
    assert run("generate", tiny, "Hello", "--max-tokens", 4, "--no-prefix-caching", "--cache", "PAGED").exit_code == 0


def test_options_reach_the_machine(tiny):
    options = [
        "--dtype",
        "bfloat16",
        "--kv-cache-bytes",
        "2M",
        "--cache",
        "PAGED",
        "--threads",
        2,
        "--block-tokens",
        32,
    ]
    result = run("generate", tiny, "Hello", *options, "--ops", '{"mlp": "REFERENCE"}', "--max-tokens", 9)
    assert result.exit_code == 0, result.output
    assert isa.runtime is None or isa.get_num_threads() == 2
    isa.set_num_threads(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0; it must be from 0 to 1000000.0"),
        (["--top-p", "2"], "top_p is 2.0"),
        (["--kv-cache-bytes", "many"], "'many' is no size"),
        (["--kv-cache-bytes", "9" * 400], "is more than any machine has"),
        (["--kv-cache-bytes", "9999999999T"], "is more than any machine has"),
        (["--ops", "{mlp}"], "operators is"),
        (["--ops", '{"mlpp": "NATIVE"}'], "operator 'mlpp' is unknown"),
        (["--threads", "0"], "--threads"),
        (["--regex", "a", "--choice", "b"], "--regex and --choice can't both be followed: give one"),
        (["--json-schema", "no.json"], "json is no JSON schema"),
        (["--choice", ""], "it must be strings that are not empty"),
        (["--colour"], "--colour"),
    ],
)
def test_usage_errors(tiny, options, message):
    result = run("generate", tiny, "Hello", *options)
    assert result.exit_code == 2
    assert message in " ".join(re.sub("[│╭╮╰╯─]", "", result.stderr).split())
    assert "Traceback" not in result.stderr


def changed(tiny, tmp_path, **config):
    shutil.copytree(tiny, tmp_path / "model")
    values = json.loads((tiny / "config.json").read_text()) | config
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    return tmp_path / "model"


def without_config(tiny, tmp_path):
    model = changed(tiny, tmp_path)
    (model / "config.json").unlink()
    return model


def truncated(tiny, tmp_path):
    model = changed(tiny, tmp_path)
    os.truncate(model / "model.safetensors", 50_000)
    return model


def with_weight(value):
    def write(tiny, tmp_path):
        model = changed(tiny, tmp_path)
        tensors = load_file(model / "model.safetensors")
        tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], value)
        save_file(tensors, model / "model.safetensors")
        return model

    return write


def as_it_is(tiny, tmp_path):
    return tiny


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (lambda tiny, path: path / "nowhere.gguf", ["Hi"], "no model '.*nowhere.gguf': give a path"),
        (without_config, ["Hi"], "has no config.json"),
        (lambda *at: changed(*at, model_type="mamba"), ["Hi"], "is 'mamba'; supported are .*llama"),
        (truncated, ["Hi"], "model.safetensors is corrupt or cut short"),
        (with_weight(np.nan), ["Hi"], "model.norm.weight in .* holds NaN"),
        (with_weight(np.inf), ["Hi"], "the model failed after 2 tokens: the logits hold NaN"),
        (as_it_is, ["many " * 200], "the prompt has 1000 tokens; the model's context is 512"),
        (as_it_is, [""], "the prompt is empty"),
        (as_it_is, [b"\xff"], "the prompt is not UTF-8"),
        (as_it_is, ["Hi", "--kv-cache-bytes", "10"], "kv_cache_bytes is 10; one block of this model takes"),
        (as_it_is, ["Hi", "--max-tokens", "500", "--kv-cache-bytes", "200K"], "do not fit the cache's"),
        (as_it_is, ["Hi", "--dtype", "int3"], "dtype is 'int3'; it must be auto, bfloat16 or float32"),
        (as_it_is, ["Hi", "--cache", "BAG"], "cache is 'BAG'; it must be SLAB_POOL, PAGED, BMC, DYNAMIC"),
        (as_it_is, ["Hi", "--regex", "(a"], "structured_outputs can't be followed"),
        (as_it_is, ["Hi", "--block-tokens", "24"], "block_tokens is 24; it must be a multiple of 16"),
    ],
    ids=lambda value: "" if callable(value) or isinstance(value, list) else re.sub(r"\W+", "-", value)[:30],
)
def test_errors_are_one_line(tiny, tmp_path, model, arguments, message):
    arguments = [os.fsdecode(argument) for argument in arguments]
    result = run("generate", model(tiny, tmp_path), *arguments)
    assert result.exit_code == 1
    assert re.fullmatch(rf"pace: .*{message}.*\n", result.stderr), result.stderr


def test_debugging_shows_the_traceback(tmp_path):
    process = pace("generate", tmp_path, "Hi", env=os.environ | {"PACE_DEBUG": "1"})
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert b"Traceback" in errors
    assert b"ModelError" in errors


def test_explanations():
    assert explain(MemoryError()) == "out of memory"
    assert explain(PermissionError(13, "Permission denied", "/secret")) == "/secret: Permission denied"
    assert explain(KeyError("lost")) == "KeyError: 'lost' (unexpected; PACE_DEBUG=1 shows where)"


def test_text_streams_through_a_pipe(endless):
    process = pace("generate", endless, "Hello", "--max-tokens", 100_000)
    first = os.read(process.stdout.fileno(), 4096)
    assert first
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert rest.endswith(b"\n")
    assert b"tok/s" in errors
    assert errors.count(b"\n") == 1


def test_ctrl_c_before_the_answer(endless):
    fifo = endless.parent / "never-written"
    os.mkfifo(fifo)
    process = pace("generate", endless, "-", stdin=os.open(fifo, os.O_RDWR))
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (130, b"", b"")


def test_a_reader_that_leaves(endless):
    process = pace("generate", endless, "Hello", "--max-tokens", 100_000)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(20) == 141


def test_chat_from_a_pipe_keeps_the_conversation(tiny):
    llm, params = LLM(tiny), SamplingParams(temperature=0, max_tokens=8)
    messages, answers = [], []
    for text in ("One", "Two"):
        messages.append({"role": "user", "content": text})
        answers.append(llm.chat([{"role": "system", "content": "S"}, *messages], params)[0].outputs[0].text)
        messages.append({"role": "assistant", "content": answers[-1]})
    options = ["--temperature", 0, "--top-p", 1, "--max-tokens", 8, "--no-stats"]
    result = run("chat", tiny, "--system", "S", *options, input="One\n\nTwo\n/clear\nOne\n/exit\nThree\n")
    expected = [answer + "\n" * (not answer.endswith("\n")) for answer in [*answers, answers[0]]]
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(expected)
    assert result.stderr == ""


def test_chat_goes_on_after_errors(tiny):
    lines = ["/help", "/sing", "x" * 600, "Hi", "/system Be nice.", "Hi"]
    result = run("chat", tiny, "--max-tokens", 5, input="\n".join(lines))
    assert result.exit_code == 0
    assert "/system TEXT" in result.stderr
    assert "pace: no command /sing; there are /clear" in result.stderr
    assert "pace: the conversation has come to 602 tokens and the context holds 512: /clear" in result.stderr
    assert result.stderr.count("first token") == 2
    assert "context 9 of 512" in result.stderr


def test_chat_says_when_the_context_is_full(tiny):
    result = run("chat", tiny, "--seed", 1, input="Hi\n")
    assert "context 512 of 512" in result.stderr
    assert "pace: the context is full: /clear starts" in result.stderr


def test_chat_needs_a_template(tiny, tmp_path):
    model = changed(tiny, tmp_path)
    (model / "tokenizer_config.json").unlink()
    result = run("chat", model)
    assert result.exit_code == 1
    assert result.stderr.startswith("pace: the model has no chat template")


def test_ctrl_c_in_a_chat_stops_the_answer_only(endless, terminal):
    chat = terminal("chat", endless)
    chat.wait_for("/help lists the commands.*" + PROMPT)
    chat.type("Hello\n")
    chat.wait_for("Hello\r\n.{20}")
    chat.type("\x03")
    first = chat.wait_for(r"context (\d+) of 200000.*" + PROMPT)
    chat.type("More\n")
    chat.wait_for("More\r\n.{20}")
    chat.type("\x03")
    second = chat.wait_for(r"context (\d+) of 200000.*" + PROMPT)
    told = [int(re.search(r"context (\d+)", text)[1]) for text in (first, second)]
    assert told[1] > told[0]  # what was stopped is part of the conversation
    chat.type("/clear\n")
    chat.wait_for(PROMPT)
    chat.type("\x1b[A\x1b[A\n")  # twice up in the history
    chat.wait_for("More\r\n.{20}")
    chat.type("\x03")
    chat.wait_for(PROMPT)
    chat.type("\x04")
    assert chat.status() == 0


def test_ctrl_c_at_the_prompt_leaves(tiny, terminal):
    chat = terminal("chat", tiny)
    chat.wait_for(PROMPT)
    for _ in range(10):  # readline misses a Ctrl-C between its prompt and its wait for a key
        chat.type("\x03")
        if chat.ended(2):
            break
    assert chat.status() == 0
    assert "Traceback" not in chat.seen


def test_speculative(tiny):
    """The same text; the figures tell how many tokens a step brought."""
    asked = ["generate", tiny, "Hello Hello", "--max-tokens", 40, "--temperature", 1, "--seed", 3]
    plain = run(*asked)
    draft = json.dumps({"method": "draft_model", "model": str(tiny), "num_tokens": 4, "adaptive": False})
    for speculative in (draft, '{"method": "ngram"}'):
        given = run(*asked, "--speculative", speculative)
        assert given.exit_code == 0
        assert given.stdout == plain.stdout
        assert re.search(r"decode .* \d\.\d(/step| tokens a step)", given.stderr) or speculative != draft
    for speculative, words in (("{", "it must be such as"), ('{"method": "magic"}', "it must be draft_model, ngram")):
        refused = run(*asked, "--speculative", speculative)
        assert refused.exit_code == 2
        assert words in " ".join(re.sub("[│╭╮╰╯─]", "", refused.stderr).split())


@pytest.mark.parametrize("columns", [80, 120])
def test_figures_fit_the_terminal(tiny, terminal, columns):
    shown = terminal("generate", tiny, "Hello", columns=columns)
    assert shown.status() == 0
    last = re.sub(r"\x1b\[[\d;]*m", "", shown.seen).splitlines()[-1]
    assert re.match("prompt .*decode", last)
    assert len(last) <= columns


FIGURES = Figures(312.4, 0.138, 3.847, 71.24, 19.23e9, "avx512")


def test_the_line_of_figures():
    assert FIGURES.line(30.5e9, 120) == (
        "prompt 312 tok/s · first token 0.14 s (3.85 s from start) · decode 71.2 tok/s · 19.2 GB/s (63% of memory)"
        " · avx512"
    )
    short = FIGURES.line(30.5e9, 80)
    assert short == "prompt 312/s · first token 0.14 s · decode 71.2/s · 19.2 GB/s (63%) · avx512"
    assert len(replace(FIGURES, prompt_rate=9999, bytes_per_second=300e9).line(500e9, 80)) <= 80
    one_token = replace(FIGURES, decode_rate=None, bytes_per_second=None)
    assert one_token.line(None, 120) == "prompt 312 tok/s · first token 0.14 s (3.85 s from start) · avx512"


def test_the_reference_rung_has_no_share_of_the_machine(tiny):
    process = pace("generate", tiny, "Hello", "--max-tokens", 4, env=os.environ | {"PACE_ISA": "reference"})
    _, errors = process.communicate(timeout=20)
    assert re.search(rb"GB/s \xc2\xb7 reference\n$", errors), errors


def test_figures_of_a_real_model(smollm2):
    process = pace("generate", smollm2, "Name the capital of France.", "--chat", "--max-tokens", 8)
    output, errors = process.communicate(timeout=60)
    assert b"Paris" in output
    assert errors.startswith(b"prompt ")
    assert errors.count(b"\n") == 1


def test_help_and_version_are_quick():
    for arguments, expected in ((["--help"], b"generate"), (["--version"], b"pace 0.1.0")):
        code = (
            "import sys; from pace.cli.commands import app\n"
            f"try: app({arguments})\n"
            "finally: assert not {'numpy', 'torch', 'pace.llm', 'pace.kernels'} & set(sys.modules)"
        )
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        assert expected in output


def test_the_way_to_a_first_token_needs_no_torch(tiny):
    code = (
        "import sys; sys.modules |= dict.fromkeys(['torch', 'transformers'])\n"
        f"from pace.cli.commands import app; app(['generate', {str(tiny)!r}, 'Hi', '--chat'])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout


def test_a_tokenizer_in_an_older_form_names_the_extra(tiny, tmp_path, monkeypatch):
    model = changed(tiny, tmp_path)
    (model / "tokenizer.json").unlink()
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = run("generate", model, "Hi")
    assert result.exit_code == 1
    assert "pip install 'pace[transformers]'" in result.stderr


def test_pull(monkeypatch, tmp_path):
    monkeypatch.setenv("PACE_CACHE", str(tmp_path))
    assert re.search(r"smollm2 +98 MB +no +Apache-2.0", run("pull", "--list").stdout)
    wrong = run("pull", "gpt-9")
    assert (wrong.exit_code, wrong.stderr) == (
        1,
        "pace: no model 'gpt-9' in the catalogue: it has smollm2, gemma3-270m\n",
    )
    assert run("pull").exit_code == 2
    absent = run("generate", "smollm2", "Hi")
    assert absent.stderr == "pace: smollm2 is not on this machine yet: run `pace pull smollm2`\n"


def test_pull_of_what_is_there_prints_its_path(smollm2):
    assert run("pull", "smollm2").stdout == f"{smollm2}\n"


def test_info():
    assert isa.RUNG in run("info").stdout
    assert re.search("qkv_projection .*bf16 fp32", run("info", "--operators").stdout)
    found = json.loads(run("info", "--json", "--operators", "--roofline").stdout)
    assert found["operators"]["norm"]["REFERENCE"] == ["bfloat16", "float32"]
    assert found["operators"]["norm"]["NATIVE"] == ([] if isa.RUNG == "reference" else ["bfloat16", "float32"])
    assert found["roofline"]["read_bytes_per_second"] > 1e8
    assert found["l3_domains"] is None or found["l3_domains"] >= 1
    assert found["place"] is None or found["place"]["cpus"]
