"""What the front process and an engine say to each other: msgpack over a local socket, a list of messages at a time.

Front → engine: Generate, Embed, Cancel. Engine → front: Ready, Refused, Progress, Embedded, Load.
"""

from dataclasses import fields
from typing import Any, Literal

import msgspec

from pace.engine.engine import EngineStats
from pace.engine.request import Logprobs
from pace.engine.sampling_params import SamplingParams
from pace.engine.structured import StructuredOutputsParams


class Generate(msgspec.Struct, tag=True, frozen=True):
    """`params` are SamplingParams' fields, those that are not its defaults. images: the values of Pixels, as bytes, so
    that nothing of a file can go wrong in an engine.
    """

    id: str
    prompt: list[int]
    params: dict[str, Any]
    priority: int = 0
    images: list[bytes] = []


class Embed(msgspec.Struct, tag=True, frozen=True):
    id: str
    prompt: list[int]
    params: dict[str, Any]
    priority: int = 0


class Cancel(msgspec.Struct, tag=True, frozen=True):
    id: str


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Said once, when requests are taken."""

    capacity_tokens: int  # of its cache


class Refused(msgspec.Struct, tag=True, frozen=True):
    """A request that was not taken: refused for what it asks, failed for the engine's fault, or busy where the same
    request may be taken later.
    """

    id: str
    reason: str
    kind: Literal["refused", "failed", "busy"] = "refused"


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """What came to one text since the piece before. logprobs: of each token its Logprobs, encoded still: what waits
    for a client that does not read takes a twentieth of what the objects would.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[bytes] | None
    finish_reason: str | None
    stop_reason: int | str | None

    @classmethod
    def of(cls, index: int, text: str, token_ids: list[int], rows: list[Logprobs] | None, *end: Any) -> "Piece":
        return cls(index, text, token_ids, None if rows is None else [encode(row) for row in rows], *end)

    @property
    def rows(self) -> list[tuple[int, Logprobs]]:
        """Each token with its log-probabilities; none where they were not asked for."""
        if self.logprobs is None:
            return []
        return list(zip(self.token_ids, map(_decode_row, self.logprobs), strict=True))


class Progress(msgspec.Struct, tag=True, frozen=True):
    """New pieces of a request; the counts are those of the whole request so far."""

    id: str
    pieces: list[Piece]
    completion_tokens: int
    cached_tokens: int
    finished: bool
    prompt_logprobs: list[Logprobs | None] | None = None  # with the last
    drafted: int = 0
    accepted: int = 0  # of the drafts


class Embedded(msgspec.Struct, tag=True, frozen=True):
    """float32, as bytes; None with what went wrong."""

    id: str
    embedding: bytes | None
    reason: str | None
    cached_tokens: int


class Load(msgspec.Struct, tag=True, frozen=True):
    """How an engine is doing, from time to time."""

    stats: EngineStats


Wish = Generate | Embed | Cancel
News = Ready | Refused | Progress | Embedded | Load

encode = msgspec.msgpack.Encoder().encode
_decode_row = msgspec.msgpack.Decoder(Logprobs).decode
decode_wishes = msgspec.msgpack.Decoder(list[Wish]).decode
decode_news = msgspec.msgpack.Decoder(list[News]).decode


def fields_of(params: SamplingParams | StructuredOutputsParams) -> dict[str, Any]:
    """Those that are not as they would be anyway."""
    values = {each.name: getattr(params, each.name) for each in fields(params)}
    given = {each.name: values[each.name] for each in fields(params) if values[each.name] != each.default}
    if isinstance(structured := given.get("structured_outputs"), StructuredOutputsParams):
        given["structured_outputs"] = fields_of(structured)
    return given


def sampling_params(given: dict[str, Any]) -> SamplingParams:
    """The way back. ValueError for values that can't be."""
    structured = given.get("structured_outputs")
    if structured is None:
        return SamplingParams(**given)
    return SamplingParams(**(given | {"structured_outputs": StructuredOutputsParams(**structured)}))
