"""A smaller model of the same vocabulary that writes ahead, a token at a time (Leviathan et al., 2023)."""

from collections.abc import Sequence

from .base import Text
from .reader import Reader


class DraftModel(Reader):
    def propose(self, texts: Sequence[Text], counts: Sequence[int]) -> list[list[int]]:
        most = self._able(texts, counts)
        uniforms = {text: text.uniforms(count) for text, count in most.items()}
        written: dict[Text, list[int]] = {text: [] for text in texts}
        pieces = {text: text.ids[self._followed[text].known :] for text in most}
        while pieces:
            hidden, ends = self._forward_of_some(pieces)
            if not pieces:
                break
            live = list(pieces)
            tokens = self._draw(
                self.model.logits(hidden[ends - 1]), live, [uniforms[text][len(written[text])] for text in live]
            )
            for text, token in zip(live, tokens, strict=True):
                self._note(text, written[text])
                del pieces[text]
                if token < 0:
                    continue
                written[text].append(token)
                if len(written[text]) < most[text]:
                    pieces[text] = [token]
        return list(written.values())

    def _note(self, text: Text, written: list[int]) -> None:
        """What was just read: all of the text at first, then a draft at a time."""
        followed = self._followed[text]
        followed.known, followed.guessed = len(text.ids), written[:]
