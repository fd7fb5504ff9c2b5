"""Speculative decoding: who proposes drafts. Who verifies them is the engine."""

from .base import Draft, Proposer, SpeculativeConfig, Text
from .draft_model import DraftModel
from .ngram import NGram
from .pard import PARD

# The name in `speculative={"method": …}` → the class. Others put theirs here.
PROPOSERS: dict[str, type[Proposer]] = {"ngram": NGram, "draft_model": DraftModel, "pard": PARD}

__all__ = ["PARD", "PROPOSERS", "Draft", "DraftModel", "NGram", "Proposer", "SpeculativeConfig", "Text"]
