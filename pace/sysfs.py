"""The small text files of /proc and /sys. What is not there, or is not what it should be, is unknown, not an error."""

from collections.abc import Iterable
from pathlib import Path


def read_text(path: Path) -> str | None:
    """A file's text without the white space around it; None where there is no text."""
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def read_fields(path: Path) -> dict[str, str]:
    """The "name : value" lines of a file, each name's first."""
    fields: dict[str, str] = {}
    for line in (read_text(path) or "").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def read_cpu_list(path: Path) -> frozenset[int]:
    """The CPUs or nodes that a file lists; none where they are unknown."""
    return known_cpus(read_text(path))


def known_cpus(text: str | None) -> frozenset[int]:
    try:
        return frozenset(parse_cpu_list(text or ""))
    except ValueError:
        return frozenset()


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """The numbers in "0-3,8", ascending. ValueError for what is no such list; "" lists nothing."""
    numbers: set[int] = set()
    for span in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = span.partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)) or int(last or first) < int(first):
            raise ValueError(f"{text!r} is no list of CPUs: {span!r} must be a number or a span like 0-31")
        numbers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(numbers))


def format_cpu_list(cpus: Iterable[int]) -> str:
    """The inverse of `parse_cpu_list`: "0-3,8"."""
    spans: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if spans and spans[-1][-1] == cpu - 1:
            spans[-1][1:] = [cpu]
        else:
            spans.append([cpu])
    return ",".join("-".join(map(str, span)) for span in spans)


def kib(fields: dict[str, str], name: str) -> int | None:
    """The bytes of a field that is in kB."""
    value = fields.get(name, "").removesuffix(" kB")
    return int(value) * 1024 if value.isdecimal() else None
