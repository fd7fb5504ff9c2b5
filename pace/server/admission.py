"""How many requests may wait for their first token. Counted before anything is done for a request."""

from .errors import APIError

BYTES_PER_TOKEN = 4  # what a text is reckoned at before it is encoded


class Admission:
    """For one event loop."""

    def __init__(self, max_waiting: int, max_waiting_tokens: int) -> None:
        self.max_waiting, self.max_waiting_tokens = max_waiting, max_waiting_tokens
        self.waiting = self.waiting_tokens = self.in_flight = 0
        self.closed = False

    def enter(self, texts: int, tokens: int) -> "Ticket":
        """APIError 429 where the queue is full, 503 where the server is about to end."""
        if self.closed:
            raise APIError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        if self.waiting and self.waiting + texts > self.max_waiting:
            raise self._full(f"{self.waiting} requests wait, and max_waiting is {self.max_waiting}")
        if self.waiting and self.waiting_tokens + tokens > self.max_waiting_tokens:
            raise self._full(
                f"about {self.waiting_tokens} tokens of prompts wait, and max_waiting_tokens is "
                f"{self.max_waiting_tokens}: no room for {tokens} more"
            )
        return Ticket(self, texts, tokens)

    @staticmethod
    def _full(message: str) -> APIError:
        return APIError(429, f"{message}; try again later", code="queue_full", retry_after=1)


class Ticket:
    """Of one HTTP request, which may be several texts. To be left once."""

    def __init__(self, admission: Admission, texts: int, tokens: int) -> None:
        self._admission, self.texts, self._tokens = admission, texts, tokens
        admission.waiting += texts
        admission.waiting_tokens += tokens
        admission.in_flight += 1
        self._waits = True

    def begun(self) -> None:
        """There is a first token."""
        if self._waits:
            self._waits = False
            self._admission.waiting -= self.texts
            self._admission.waiting_tokens -= self._tokens

    def leave(self) -> None:
        self.begun()
        self._admission.in_flight -= 1
