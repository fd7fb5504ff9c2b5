"""The tokenizer inside a GGUF file, rebuilt from its vocabulary, merges or scores, and kind."""

from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pace.errors import ModelError
from pace.models.gguf import GGUFFile

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> list[Any]:
    return [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]


_GPT2: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
_DIGITS = [pre_tokenizers.Digits(individual_digits=True), *_GPT2]

# tokenizer.ggml.pre: how text is cut before the merges.
PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "llama-bpe": _split(_LLAMA3),
}
_WHOLE_WORDS_FIRST = ("llama-bpe",)  # a word that is a token needs no merges


def build(file: GGUFFile) -> Tokenizer:
    """A `tokenizers.Tokenizer` that encodes and decodes as the model's own."""
    metadata = file.metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"{file.path} has a tokenizer of kind {kind!r}: 'gpt2' and 'llama' can be read")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    tokenizer = _byte_level(file, tokens) if kind == "gpt2" else _sentencepiece(metadata, tokens)
    _add_special(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type", ()))
    by_default = kind == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    tokenizer.post_processor = _begin_and_end(metadata, tokens, begin_by_default=by_default)
    return tokenizer


def _byte_level(file: GGUFFile, tokens: list[str]) -> Tokenizer:
    """BPE over bytes, each byte written as a printable character (GPT-2)."""
    pre = file.metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ModelError(f"{file.path} splits text by {pre!r}, which is unknown: {known} are known; convert it anew")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in file.metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
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


def _add_special(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tokens that are found in the text before anything else."""
    kinds = [(token, kind) for token, kind in zip(tokens, types, strict=False) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens(
        [AddedToken(token, special=kind == _CONTROL, normalized=False) for token, kind in kinds if token]
    )


def _begin_and_end(metadata: dict[str, Any], tokens: list[str], *, begin_by_default: bool) -> Any:
    """Puts the tokens around a text that the model was trained to see there."""

    def wanted(name: str, default: bool) -> list[int]:
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return [token] if token is not None and metadata.get(f"tokenizer.ggml.add_{name}_token", default) else []

    before, after = wanted("bos", begin_by_default), wanted("eos", False)
    single = [*(tokens[i] for i in before), "$A", *(tokens[i] for i in after)]
    return processors.TemplateProcessing(single=single, special_tokens=[(tokens[i], i) for i in before + after])
