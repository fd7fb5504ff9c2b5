"""`pace bench`: what the machine makes of a model."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .terminal import reported, stderr

if TYPE_CHECKING:
    from pace.models import Checkpoint

bench = typer.Typer(no_args_is_help=True, help="Measure, beside the limits of this machine.")


@bench.command()
@reported()
def model(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="As of `pace generate`.", show_default=False)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="In place of MODEL: a config.json, with --random.")
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="Random weights, made while they are packed.")] = False,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the weights and the tokens.")] = 0,
    layers: Annotated[int | None, typer.Option(min=1, metavar="N", help="With --random: so many layers only.")] = None,
    prompt_tokens: Annotated[str, typer.Option(metavar="N,N…", help="The lengths of prompts.")] = "128,512",
    output_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Steps of decoding.")] = 32,
    batch: Annotated[str, typer.Option(metavar="N,N…", help="How many sequences decode at a time.")] = "1,8",
    seconds: Annotated[float, typer.Option(min=0, help="Begin rounds of all this for so long; one at least.")] = 20.0,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, or auto: the checkpoint's own.")] = "auto",
    cache: Annotated[str, typer.Option(help="SLAB_POOL, PAGED, BMC or DYNAMIC.")] = "SLAB_POOL",
    ops: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="The backend of each operator, one name for all, or a file."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads to compute on.")] = None,
    write_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here as well.")
    ] = None,
) -> None:
    """Prefill, decode and memory of a model, real or of random weights: a config.json is enough for those."""
    prompts, batches = _counts(prompt_tokens, "--prompt-tokens"), _counts(batch, "--batch")
    if (model is None) == (config is None):
        raise typer.BadParameter("give a MODEL, or --config FILE --random")
    if random != (config is not None):
        raise typer.BadParameter("--config and --random go together: a config.json has no weights")
    if layers is not None and not random:
        raise typer.BadParameter("--layers needs --random")
    from rich.console import Console

    from pace.bench import Plan, measure, render
    from pace.isa import set_num_threads
    from pace.ops import OperatorConfig

    try:
        operators = OperatorConfig.parse(ops)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if threads is not None:
        set_num_threads(threads)
    plan = Plan(prompts, output_tokens, batches, seconds, seed)
    with stderr().status("loading") as status, _checkpoint(model, config, dtype, layers, seed) as checkpoint:
        name = config.stem if config is not None else str(model)
        report = measure(checkpoint, name, plan, dtype, cache, operators, tell=status.update)
    Console().print(render(report))
    if write_json is not None:
        write_json.write_text(json.dumps(asdict(report), indent=2) + "\n")


@bench.command()
@reported()
def operators(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="As of `pace generate`.", show_default=False)
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="In place of MODEL: a config.json.")] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N,N…",
            help="Of a step: 1 is decoded, more are a prompt; 1,512 unless texts are shorter.",
            show_default=False,
        ),
    ] = None,
    backends: Annotated[
        str | None, typer.Option(metavar="NAME,NAME…", help="Of these; all that can run here.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32, or auto: the checkpoint's own.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads to compute on.")] = None,
    write_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here as well.")
    ] = None,
) -> None:
    """Every operator on every backend, in the shapes of a model. Weights are random."""
    counts = None if tokens is None else _counts(tokens, "--tokens")
    if (model is None) == (config is None):
        raise typer.BadParameter("give a MODEL, or --config FILE")
    from rich.console import Console

    from pace.isa import set_num_threads
    from pace.tuning import measure, render

    if threads is not None:
        set_num_threads(threads)
    names = None if backends is None else backends.split(",")
    with stderr().status("loading") as status:
        try:
            report = measure(model, dtype, counts, names, status.update, config)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    Console().print(render(report))
    if write_json is not None:
        write_json.write_text(json.dumps(asdict(report), indent=2) + "\n")


def _checkpoint(model: str | None, config: Path | None, dtype: str, layers: int | None, seed: int) -> "Checkpoint":
    from pace.models import open_checkpoint
    from pace.models.hub import resolve
    from pace.models.random_weights import random_checkpoint

    if config is not None:
        return random_checkpoint(config, dtype, layers, seed)
    assert model is not None
    return open_checkpoint(resolve(model))


def _counts(text: str, option: str) -> list[int]:
    """ "128,512" """
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise typer.BadParameter(f"{option} is {text!r}; it must be like 128,512")
    return counts
