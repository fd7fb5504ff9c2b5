"""The models of benchmarks/configs with random weights, one after the other: `python -m benchmarks.models`.

Each is measured by `pace bench model` in a process of its own, since peak memory is a process's. stdout gets a table
in Markdown, for benchmarks/LOG.md; stderr tells how far it is. A model that cannot be measured, for want of memory say,
has the reason in place of its figures, and the exit status is 1.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from pace.info import describe_roofline
from pace.roofline import Roofline

CONFIGS = Path(__file__).parent / "configs"
HEADER = """\
| model | weights, 10⁹ | load | memory: packed, peak, GB | prefill, tokens/s | decode, tokens/s | of the machine |
|---|---|---|---|---|---|---|"""


def main() -> None:
    known = sorted(path.stem for path in CONFIGS.glob("*.json"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; none: all")
    parser.add_argument("--options", default="", help='of `pace bench model`: --options "--dtype float32 --threads 1"')
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(known):
        parser.error(f"no configuration {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    print(HEADER, flush=True)
    measured = [row(name, shlex.split(arguments.options)) for name in arguments.names or known]
    sys.exit(0 if all(measured) else 1)


def row(name: str, options: Sequence[str]) -> bool:
    """Measure a model and print its row; whether it could be measured."""
    print(name, end=" … ", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        config = os.path.relpath(CONFIGS / f"{name}.json")
        command = [
            sys.executable,
            "-m",
            "pace",
            "bench",
            "model",
            "--config",
            config,
            "--random",
            "--json",
            out,
            *options,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = " ".join(done.stderr.split()).removeprefix("pace: ")
            print(f"| {name} | {reason} | | | | | |", flush=True)
        else:
            print(markdown(json.loads(out.read_text())), flush=True)
    print("measured" if done.returncode == 0 else "failed", file=sys.stderr)
    return done.returncode == 0


def markdown(report: Mapping[str, Any]) -> str:
    """A row of the table, of what `pace bench model --json` writes."""
    memory, prefill, decode = report["memory"], report["prefill"], report["decode"]
    peak = "?" if memory["peak"] is None else f"{memory['peak'] / 1e9:.2f}"
    cells = [
        f"{report['model']}, {report['dtype']}",
        f"{report['num_weights'] / 1e9:.2f}",
        f"{report['load_seconds']:.1f} s",
        f"{memory['weights'] / 1e9:.2f}, {peak}",
        speeds(prefill, "{tokens}: {rate:.0f} ({share:.0%} of {bound})"),
        speeds(decode, "×{tokens}: {rate:.1f} ({share:.0%} of {bound})"),
        Text.from_markup(describe_roofline(Roofline(**report["limits"]))).plain,
    ]
    return f"| {' | '.join(cells)} |"


def speeds(passes: Sequence[Mapping[str, Any]], form: str) -> str:
    return ", ".join(form.format(**each, rate=each["tokens"] / each["seconds"]) for each in passes)


if __name__ == "__main__":
    main()
