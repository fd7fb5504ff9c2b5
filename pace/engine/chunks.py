"""How much of the prompts a step takes along while texts are being written (the policy decode_first)."""

LEAST, GRANULE = 16, 8  # tokens: below this a product costs hardly less
MARGIN = 0.9  # of the time that is allowed, since one step is not like the other
NEWEST = 0.3  # the weight of the newest measurement in what is known


class Chunks:
    """Learns from the steps before how many tokens of prompts keep the next within `stretch` times one without."""

    def __init__(self, stretch: float) -> None:
        self._stretch = stretch
        self._alone: dict[int, float] = {}  # seconds of a step that only decodes, by the bits of how many sequences
        self._per_token = 0.0  # seconds that a token of a prompt adds
        self._last = LEAST

    def tokens(self, decoding: int) -> int:
        """For a step in which so many sequences decode."""
        alone = self._known(decoding)
        if alone is None or not self._per_token:
            return self._last
        fits = (self._stretch - 1) * MARGIN * alone / self._per_token
        # Up in steps: the first tokens of a prompt are nearly free, while the step waits for weights.
        self._last = max(LEAST, min(int(fits), 2 * self._last) // GRANULE * GRANULE)
        return self._last

    def _known(self, decoding: int) -> float | None:
        """Of as many sequences, or of the most that are fewer: a shorter time, which is on the safe side."""
        sizes = [size for size in self._alone if size <= decoding.bit_length()]
        return self._alone[max(sizes)] if sizes else None

    def observe(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """What a step took."""
        if not decoding:
            return
        if not prompt_tokens:
            size = decoding.bit_length()
            self._alone[size] = _mixed(self._alone.get(size), seconds)
        elif (alone := self._known(decoding)) is not None:
            # At least a hundredth of a step a chunk, or one lucky measurement would let a whole prompt through.
            self._per_token = _mixed(self._per_token or None, max(seconds - alone, alone / 100) / prompt_tokens)


def _mixed(known: float | None, seconds: float) -> float:
    return seconds if known is None else (1 - NEWEST) * known + NEWEST * seconds
