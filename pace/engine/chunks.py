"""How much of the prompts a step takes along while texts are being written (the policy decode_first)."""

LEAST, GRANULE = 4, 4  # tokens: a step's time is a line in them from the first on (8 rows 19 ms, 16 26, 32 42)
MARGIN = 0.9  # of the time that is allowed, since one step is not like the other
NEWEST = 0.3  # the weight of the newest measurement in what is known
FRESH = 64  # steps: then a step without prompts is measured again, since texts have become longer


class Chunks:
    """Learns from the steps before how many tokens of prompts keep the next within `stretch` times one without."""

    def __init__(self, stretch: float) -> None:
        self._stretch = stretch
        self._alone: dict[int, float] = {}  # seconds of a step that only decodes, by the bits of how many sequences
        self._per_token = 0.0  # seconds that a token of a prompt adds
        self._last = LEAST
        self._since = 0  # steps with prompts since the last without

    def tokens(self, decoding: int) -> int:
        """For a step in which so many sequences decode; 0 where it is to show what it takes without prompts."""
        alone = self._alone.get(decoding.bit_length())
        if alone is None or self._since >= FRESH:
            return 0
        if not self._per_token:
            return self._last
        fits = (self._stretch - 1) * MARGIN * alone / self._per_token
        # Up in steps: the first tokens of a prompt are nearly free, while the step waits for weights.
        self._last = max(LEAST, min(int(fits), 2 * self._last) // GRANULE * GRANULE)
        return self._last

    def observe(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """What a step took."""
        if not decoding:
            return
        size = decoding.bit_length()
        alone = self._alone.get(size)
        if not prompt_tokens:
            self._alone[size], self._since = _mixed(alone, seconds), 0
            return
        self._since += 1
        if alone is not None:
            # At least a hundredth of a step a chunk, or one lucky measurement would let a whole prompt through.
            self._per_token = _mixed(self._per_token or None, max(seconds - alone, alone / 100) / prompt_tokens)


def _mixed(known: float | None, seconds: float) -> float:
    return seconds if known is None else (1 - NEWEST) * known + NEWEST * seconds
