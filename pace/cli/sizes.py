"""Sizes as people write them."""

import re

import typer


def as_bytes(text: str) -> int:
    """ "4G", "512M", "1.5GiB", or plain bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise typer.BadParameter(f"{text!r} is no size: write 4G, 512M or a number of bytes")
    size = float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " ")
    if size >= 2**63:
        raise typer.BadParameter(f"{found[0][:20]}… is more than any machine has")
    return int(size)
