"""The limits of an engine."""

from dataclasses import dataclass, fields

POLICIES = ("prefill_first", "decode_first")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine takes on at once, and in which order.

    policy: prefill_first gives prompts all of a step's budget, so that they are answered soon; decode_first, while
    there are texts being written, only as much as keeps a step within `stretch` times what it takes without them.
    Results do not depend on any of this.
    """

    policy: str = "prefill_first"
    max_batch_tokens: int = 1024  # of a forward pass: past a few hundred the products gain nothing
    max_sequences: int = 256  # that run at once
    reserve_tokens: int = 64  # of output, for which a sequence must find room before it is let in
    max_waiting: int | None = None  # requests that have not begun; None: any number
    max_waiting_tokens: int | None = None  # of their prompts
    stretch: float = 2.0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy is {self.policy!r}; it must be {' or '.join(POLICIES)}")
        if not self.stretch > 1:
            raise ValueError(f"stretch is {self.stretch!r}; it must be above 1")
        for field in fields(self):
            value = getattr(self, field.name)
            if "int" not in str(field.type) or value is None:
                continue
            least = 0 if field.name == "reserve_tokens" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field.name} is {value!r}; it must be an integer, at least {least}")
