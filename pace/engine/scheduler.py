"""Who is in the next batch: every text that is being written with one token, and the prompts with as many as there is
room for; the lower priority number first, then who came first.

A sequence is let in when the cache has room for its prompt and a reserve. Where the cache runs out all the same, the
last in the order gives back what it holds, and computes it again later: same tokens, same bits.
"""

from bisect import insort
from collections import abc
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import attrgetter

import numpy as np

from pace.cache import CacheFull, KVCache, Placement
from pace.cache.base import Ints

from .chunks import Chunks
from .config import EngineConfig
from .request import Request
from .sequence import Sequence
from .speculation import Speculation

Drafts = dict[Sequence, list[int]]

_ORDER = attrgetter("order")


@dataclass(frozen=True)
class Batch:
    """One forward pass: new tokens of each sequence, end to end, and where their keys and values go."""

    sequences: list[Sequence]
    counts: list[int]
    num_decoding: int  # of the sequences, those at the beginning, which go on with the one token that was drawn last
    tokens: Ints
    placement: Placement
    ready: list[int]  # the indices of those that have no token left to compute
    drafts: list[list[int]]  # behind the last token, of those that decode

    @property
    def drawing(self) -> list[int]:
        """Of those that are ready, those whose next token is drawn: all that write."""
        return [i for i in self.ready if self.sequences[i].max_tokens]

    @property
    def decoding_rows(self) -> int:
        """Tokens of those that decode, drafts among them."""
        return int(self.placement.starts[self.num_decoding])

    def drafts_of(self, index: int) -> list[int]:
        return self.drafts[index] if index < self.num_decoding else []

    def drawn_rows(self, indices: list[int]) -> Ints:
        """Of each in turn, the row of its last token, and of its drafts."""
        ends = self.placement.starts[1:]
        if not any(self.drafts):
            rows: Ints = ends[indices] - 1
            return rows
        return np.concatenate([np.arange(ends[i] - 1 - len(self.drafts_of(i)), ends[i]) for i in indices])

    def in_parts(self, indices: list[int], most_rows: int) -> abc.Iterator[list[int]]:
        """Those whose tokens are drawn, so many that they have at most so many rows, or one by itself."""
        part, rows = list[int](), 0
        for i in indices:
            more = 1 + len(self.drafts_of(i))
            if part and rows + more > most_rows:
                yield part
                part, rows = [], 0
            part.append(i)
            rows += more
        if part:
            yield part

    def goes_on(self, index: int, accepted: list[int]) -> bool:
        """Whether the token that was drawn last is the sequence's next draft, and not its end."""
        drafts, sequence = self.drafts_of(index), self.sequences[index]
        if not drafts or sequence.finish_reason is not None or accepted[index] == len(drafts):
            return False
        return sequence.token_ids[-1] == drafts[accepted[index]]


class Scheduler:
    def __init__(self, cache: KVCache, config: EngineConfig, speculation: Speculation | None = None) -> None:
        self.cache, self.config = cache, config
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._refused: tuple[Sequence, int] | None = None  # who found no room, and how much there was
        self.speculation = speculation
        self._chunks = Chunks(config.stretch)
        self._tokens = np.empty(config.max_batch_tokens + config.max_sequences, np.int32)

    # --- who comes and goes ---

    def add(self, sequences: abc.Iterable[Sequence]) -> None:
        for sequence in sequences:
            insort(self.waiting, sequence, key=_ORDER)

    def withdraw(self, request: Request) -> None:
        """Take out what is left of a request, wherever it is, and give back what it holds."""
        request.followers.clear()
        for sequence in request.sequences:
            if sequence.slot is not None:
                self._release(sequence)
            elif sequence in self.waiting:
                self.waiting.remove(sequence)

    def retire(self, batch: Batch) -> None:
        """After a step: whoever has ended gives back what it held, and whoever is to be computed anew waits for it; the
        other texts of a request follow its first.
        """
        for sequence in batch.sequences:
            if sequence.index == 0 and (sequence.token_ids or sequence.finish_reason):
                self.add(sequence.request.followers)
                sequence.request.followers.clear()
            if sequence.finish_reason is not None:
                self._release(sequence)
            elif sequence.outgrown:
                sequence.begin_anew()
                self._release(sequence)
                self.add([sequence])

    def take_back(self) -> None:
        """Forget a step that was not brought to its end."""
        for sequence in self.running:
            assert sequence.slot is not None
            sequence.computed = sequence.whole(min(sequence.computed, len(sequence.ids) - 1))
            self.cache.truncate(sequence.slot, sequence.computed)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.cache.free(sequence.slot)
        self.running.remove(sequence)
        sequence.slot, sequence.computed, sequence.encoded = None, 0, None
        if self.speculation is not None:
            self.speculation.forget(sequence)

    # --- the next batch ---

    def next_batch(self) -> Batch | None:
        """Of those who have been let in; None where there is nothing to do. CacheFull where the one sequence that is
        left has no room.
        """
        drafts = self._drafts()
        while self.running:
            sequences, counts, decoding = self._pieces(drafts)
            if not sequences:
                return None
            try:
                return self._place(sequences, counts, decoding, drafts)
            except CacheFull:
                if drafts:
                    drafts = {}  # nobody gives way to them
                elif len(self.running) == 1:
                    raise
                else:
                    self._preempt()
        return None

    def observe(self, batch: Batch, accepted: list[int], seconds: float) -> None:
        """What a batch took, and how many drafts were right, for the policy to learn from."""
        if self.speculation is not None and batch.num_decoding:
            alone = batch.num_decoding == len(batch.sequences)
            decoding, drafted = batch.sequences[: batch.num_decoding], [len(drafts) for drafts in batch.drafts]
            self.speculation.observe(decoding, drafted, accepted, seconds, alone)
        rows = batch.decoding_rows
        self._chunks.observe(rows, len(batch.tokens) - rows, seconds)

    def admit(self) -> None:
        """Let in those who wait, as there is room."""
        while self.waiting:
            sequence = self.waiting[0]
            if self._has_room(sequence):
                self._begin(sequence)
                del self.waiting[0]
            elif (behind := self._behind(sequence)) and self._has_room(sequence, behind):
                self._preempt()
            else:
                return

    def _behind(self, sequence: Sequence) -> list[Sequence]:
        """Those who run that make room for it."""
        return [other for other in self.running if other.request.priority > sequence.request.priority]

    def _has_room(self, sequence: Sequence, gone: abc.Sequence[Sequence] = ()) -> bool:
        """Whether it can be let in, once those who are `gone` are."""
        if len(self.running) - len(gone) >= self.config.max_sequences:
            return False
        if len(self.running) == len(gone):
            return True  # whoever is alone fits, or would not have been taken on
        goal = self._goal(sequence)
        chunk = self._chunk(sequence)
        room = self.cache.free_tokens() - self._promised(gone) + self._held(gone)
        if self.cache.tokens_needed(goal, chunk=chunk) <= room:
            return True
        if self._forks(sequence) and sequence.request.sequences[0] not in gone:
            forked_at = sequence.whole(sequence.num_prompt - 1)
            return self.cache.tokens_needed(goal, forked_at=forked_at, chunk=chunk) <= room
        # Whose prompt has to go through the model whole begins with nothing that others hold.
        if sequence.request.whole_prompt or (sequence, room) == self._refused:
            return False
        fits = self.cache.tokens_needed(goal, sequence.keys, chunk=chunk) <= room
        self._refused = None if fits else (sequence, room)  # a long prompt is not looked up again at every step
        return fits

    def _forks(self, sequence: Sequence) -> bool:
        """Whether it can begin as a fork of its request's first, which has been through the prompt, and whose windows
        still have the end of it.
        """
        first = sequence.request.sequences[0]
        if sequence.token_ids or first.slot is None or first.computed < sequence.num_prompt:
            return False
        least = self.cache.shortest(first.slot)
        return first.first_length == sequence.first_length and least <= sequence.whole(sequence.num_prompt - 1)

    def _goal(self, sequence: Sequence) -> int:
        """The length for which a sequence must find room before it is let in."""
        return min(len(sequence.ids) + self.config.reserve_tokens, sequence.most_tokens)

    def _chunk(self, sequence: Sequence) -> int:
        """The most tokens that a step brings of it from now on."""
        drafts = 0 if self.speculation is None else self.speculation.most
        return max(min(sequence.pending, self.config.max_batch_tokens), 1 + drafts, *map(len, sequence.images))

    def _promised(self, gone: abc.Sequence[Sequence]) -> int:
        """Capacity that those who stay have not taken yet: for the rest of their prompts, and their reserve."""
        staying = [sequence for sequence in self.running if sequence not in gone]
        goals = np.array([self._goal(sequence) for sequence in staying], np.int64)
        chunks = np.array([self._chunk(sequence) for sequence in staying], np.int64)
        return self.cache.tokens_to_come(_slots(staying), goals, chunks)

    def _held(self, sequences: abc.Sequence[Sequence]) -> int:
        return self.cache.held_tokens(_slots(sequences))

    def _begin(self, sequence: Sequence) -> None:
        sequence.slot = self._slot_for(sequence)
        sequence.computed = self.cache.length(sequence.slot)
        if not sequence.request.begun:  # later, it may be what the request itself has left there
            sequence.request.cached_tokens = sequence.computed
        insort(self.running, sequence, key=_ORDER)

    def _slot_for(self, sequence: Sequence) -> int:
        """With what the cache has of its tokens."""
        first = sequence.request.sequences[0].slot
        if first is not None and self._forks(sequence):
            with suppress(CacheFull):
                slot = self.cache.fork(first)
                self.cache.truncate(slot, sequence.whole(sequence.num_prompt - 1))
                return slot
        if sequence.request.whole_prompt:
            return self.cache.allocate()
        slot = self.cache.allocate(sequence.keys)
        length = self.cache.length(slot)
        if (whole := sequence.whole(length)) < length:  # what is found ends within an image
            self.cache.truncate(slot, whole if whole >= self.cache.shortest(slot) else 0)
        return slot

    def _preempt(self) -> None:
        """The last in the order goes back to the queue."""
        sequence = self.running[-1]
        self._release(sequence)
        self.add([sequence])
        self.preemptions += 1

    def _decoding(self) -> list[Sequence]:
        return [sequence for sequence in self.running if sequence.decodes]

    def _drafts(self) -> Drafts:
        """Of those that decode, where there are any."""
        if self.speculation is None:
            return {}
        decoding = self._decoding()
        return self.speculation.drafts(decoding, self.config.max_batch_tokens - len(decoding))

    def _pieces(self, drafts: Drafts) -> tuple[list[Sequence], list[int], int]:
        """Who is in the batch, with how many tokens each; and how many of them decode."""
        sequences = self._decoding()
        decoding = len(sequences)
        counts = [1 + len(drafts.get(sequence, ())) for sequence in sequences] if drafts else [1] * decoding
        if decoding == len(self.running):
            return sequences, counts, decoding
        left = self._prompt_tokens(sum(counts))
        for sequence in self.running:
            if left > 0 and not sequence.decodes and (count := sequence.piece(left)):
                sequences.append(sequence)
                counts.append(count)
                left -= count
        return sequences, counts, decoding

    def _prompt_tokens(self, decoding: int) -> int:
        """How many tokens of prompts the next batch takes."""
        left = max(1, self.config.max_batch_tokens - decoding)
        if decoding and self.config.policy == "decode_first":
            return min(left, self._chunks.tokens(decoding))
        return left

    def _place(self, sequences: list[Sequence], counts: list[int], decoding: int, drafts: Drafts) -> Batch:
        if len(self._tokens) < sum(counts):  # an image goes through whole
            self._tokens = np.empty(sum(counts), np.int32)
        tokens = self._tokens[: sum(counts)]
        drafted = [drafts.get(sequence, []) for sequence in sequences[:decoding]]
        decoded = [
            token for sequence, more in zip(sequences, drafted, strict=False) for token in (sequence.ids[-1], *more)
        ]
        ready, at = list(range(decoding)), len(decoded)
        tokens[:at] = decoded
        for i in range(decoding, len(sequences)):
            sequence, count = sequences[i], counts[i]
            tokens[at : at + count] = sequence.ids[sequence.computed : sequence.computed + count]
            at += count
            if count == sequence.pending:
                ready.append(i)
        placement = self.cache.append(_slots(sequences), counts, _keys(sequences, counts, tokens, drafted))
        spans, lengths = _spans(sequences, placement), _text_lengths(sequences, counts, placement)
        if spans is not None or lengths is not None:
            placement = replace(placement, spans=spans, text_lengths=lengths)
        return Batch(sequences, counts, decoding, tokens, placement, ready, drafted)


def _slots(sequences: abc.Iterable[Sequence]) -> list[int]:
    """Of those who run."""
    return [sequence.slot for sequence in sequences if sequence.slot is not None]


def _keys(sequences: list[Sequence], counts: list[int], tokens: Ints, drafts: list[list[int]]) -> Ints:
    """What the cache knows the tokens of a batch by."""
    if all(sequence.keys is sequence.ids for sequence in sequences):
        return tokens
    keys: list[int] = []
    for i, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        keys += sequence.keys[sequence.computed : sequence.computed + count]
        keys += sequence.keys_behind(drafts[i]) if i < len(drafts) else []
    return np.array(keys, np.int32)


def _spans(sequences: list[Sequence], placement: Placement) -> Ints | None:
    """The images that tokens belong to, for Placement; None where none does."""
    if not any(sequence.images for sequence in sequences):
        return None
    spans = None
    for sequence, (start, end) in zip(sequences, pairwise(placement.starts.tolist()), strict=True):
        first = start - sequence.computed  # the row of the sequence's first token, were it there
        for image in sequence.images:
            if start <= first + image.begin < end:
                spans = np.zeros((len(placement.positions), 2), np.int32) if spans is None else spans
                spans[first + image.begin : first + image.end] = image.begin, image.end
    return spans


def _text_lengths(sequences: list[Sequence], counts: list[int], placement: Placement) -> Ints | None:
    """Of the texts when these tokens were new to them, for Placement; None where all have the usual positions."""
    stretch = sequences[0].stretch
    if stretch is None:
        return None
    first = np.array([sequence.first_length for sequence in sequences], np.int32)
    lengths: Ints = np.maximum(first.repeat(counts), placement.positions + 1)
    return lengths if lengths.max() > stretch.beyond else None
