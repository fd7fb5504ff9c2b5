"""The tokenizer inside a GGUF file, rebuilt from its vocabulary, merges or scores, and kind."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pace.errors import ModelError
from pace.models.gguf import CONTROL, GGUFFile

_USER_DEFINED = 4  # in tokenizer.ggml.token_type

_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_LLAMA3 = _WORDS % "{1,3}"
_QWEN2 = _WORDS % ""
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT_4O = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?" + f"{_UPPER}*{_LOWER}+{_CONTRACTIONS}?",
        r"[^\r\n\p{L}\p{N}]?" + f"{_UPPER}+{_LOWER}*{_CONTRACTIONS}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        _SPACES,
    )
)
# llama.cpp's own, for files that say nothing better.
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


def _split(*patterns: str) -> list[Any]:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return [*splits, pre_tokenizers.ByteLevel(False, use_regex=False)]


@dataclass(frozen=True)
class Cut:
    """How text becomes the words that are merged."""

    steps: list[Any]
    whole_words_first: bool = False  # a word that is a token needs no merges
    begin: bool = False  # a text begins with BOS unless the file says otherwise
    normalizer: Any = None


_GPT2: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
_LLAMA3_CUT = Cut(_split(_LLAMA3), whole_words_first=True, begin=True)
_QWEN2_CUT = Cut(_split(_QWEN2), normalizer=normalizers.NFC())

# By tokenizer.ggml.pre.
PRE_TOKENIZERS = {
    "gpt-2": Cut(_GPT2),
    "smollm": Cut([pre_tokenizers.Digits(individual_digits=True), *_GPT2]),
    "llama-bpe": _LLAMA3_CUT,
    "llama3": _LLAMA3_CUT,
    "llama-v3": _LLAMA3_CUT,
    "qwen2": _QWEN2_CUT,
    "deepseek-r1-qwen": _QWEN2_CUT,
    "gpt-4o": Cut(_split(_GPT_4O), whole_words_first=True),
    "dbrx": Cut(_split(_LLAMA3)),
    "default": Cut(_split(*_DEFAULT)),
}


_NEVER_SWALLOW = ("<unk>", "<s>", "<|endoftext|>")


def build(file: GGUFFile) -> Tokenizer:
    """A `tokenizers.Tokenizer` that encodes and decodes as the model's own."""
    metadata = file.metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"{file.path} has a tokenizer of kind {kind!r}: 'gpt2' and 'llama' can be read")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    if kind == "gpt2":
        cut = _cut(file)
        tokenizer, begins = _byte_level(metadata, tokens, cut), cut.begin
    else:
        tokenizer, begins = _sentencepiece(metadata, tokens), True
    _add_special(tokenizer, tokens, metadata)
    tokenizer.post_processor = _begin_and_end(metadata, tokens, begin_by_default=begins)
    return tokenizer


def _cut(file: GGUFFile) -> Cut:
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ModelError(f"{file.path} splits text by {pre!r}, which is unknown: {known} are known; convert it anew")
    return PRE_TOKENIZERS[pre]


def _byte_level(metadata: dict[str, Any], tokens: list[str], cut: Cut) -> Tokenizer:
    """BPE over bytes, each byte written as a printable character (GPT-2)."""
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=cut.whole_words_first))
    if cut.normalizer is not None:
        tokenizer.normalizer = cut.normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut.steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """SentencePiece's BPE: pieces with scores, spaces written ▁, unknown characters as bytes."""
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = merges_of_scores(tokens, vocab, metadata["tokenizer.ggml.scores"])
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space_first = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prepend = [normalizers.Prepend("▁")] if space_first else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if space_first else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_of_scores(tokens: list[str], vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Merges that choose as the scores do: the piece with the best score first, out of any two that form it."""
    merges: list[tuple[str, str]] = []
    for index in np.argsort(-np.asarray(scores), kind="stable").tolist():
        piece = tokens[index]
        cuts = range(len(piece) - 1, 0, -1)
        merges += [(left, right) for i in cuts if (left := piece[:i]) in vocab and (right := piece[i:]) in vocab]
    return merges


def _add_special(tokenizer: Tokenizer, tokens: list[str], metadata: dict[str, Any]) -> None:
    """Tokens that are found in the text before anything else."""
    types = metadata.get("tokenizer.ggml.token_type", ())
    kinds = [(token, kind) for token, kind in zip(tokens, types, strict=False) if kind in (CONTROL, _USER_DEFINED)]
    # Phi-3's own tokens swallow the spaces behind them, which no file says; llama.cpp knows it too.
    swallows = metadata["tokenizer.ggml.model"] == "llama" and metadata.get("general.architecture") == "phi3"
    tokenizer.add_tokens(
        [
            AddedToken(
                token, special=kind == CONTROL, normalized=False, rstrip=swallows and token not in _NEVER_SWALLOW
            )
            for token, kind in kinds
            if token
        ]
    )


def _begin_and_end(metadata: dict[str, Any], tokens: list[str], *, begin_by_default: bool) -> Any:
    """Puts the tokens around a text that the model was trained to see there."""

    def wanted(name: str, default: bool) -> list[int]:
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return [token] if token is not None and metadata.get(f"tokenizer.ggml.add_{name}_token", default) else []

    before, after = wanted("bos", begin_by_default), wanted("eos", False)
    single = [*(tokens[i] for i in before), "$A", *(tokens[i] for i in after)]
    return processors.TemplateProcessing(single=single, special_tokens=[(tokens[i], i) for i in before + after])
