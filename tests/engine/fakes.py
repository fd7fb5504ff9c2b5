"""Small stand-ins for the real thing: a tokenizer of bytes, a model that says what it is told to."""

import json

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from pace import LLM, SamplingParams
from pace.cache import CacheShape
from pace.engine.engine import Engine
from pace.models import Model
from tests.models.tiny import llama

from .eyes import IMAGE, Eyes

SPECIALS = ["<pad>", "<s>", "</s>"]
BOS, EOS = 1, 2
WORDS = ["wxyz", "hello", " world", "ab", "STOP", "OPS"]  # pieces of more than a byte
FIRST_BYTE = len(SPECIALS)
FIRST_WORD = FIRST_BYTE + 256
VOCABULARY = FIRST_WORD + len(WORDS) + 2  # two ids that are nobody's


def byte_tokens(text):
    """The text, a token for each byte."""
    return [FIRST_BYTE + byte for byte in text.encode()]


def word(text):
    return FIRST_WORD + WORDS.index(text)


def write_tokenizer(path):
    alphabet = [
        chr(byte) if chr(byte).isprintable() and byte not in (0x20, 0xA0, 0xAD) else None for byte in range(256)
    ]
    others = iter(range(256, 512))
    characters = [character or chr(next(others)) for character in alphabet]
    in_alphabet = ["".join(characters[byte] for byte in word.encode()) for word in WORDS]
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *characters, *in_alphabet])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 72,
    "intermediate_size": 136,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "initializer_range": 0.15,
}


def write_model(path, *args, **changes):
    """A tiny random Llama with the tokenizer of bytes; returns transformers' form of it."""
    model = llama(*args, **(TINY | changes)).eval()
    model.save_pretrained(path)
    write_tokenizer(path)
    return model


class Scripted(Model):
    """Says the tokens of `script` one after the other, whatever was said before, from the first new token on."""

    def __init__(self, script, dtype, prompt_tokens=1):
        self.script, self.prompt_tokens, self.dtype = script, prompt_tokens, dtype
        self.cache_shape = CacheShape(2, 2, 24, dtype, 512)
        self.vocabulary, self.max_positions = VOCABULARY, 512
        self.weight_bytes = self.step_bytes = 0

    def forward(self, tokens, placement, cache):
        return placement.positions.astype(np.float32)[:, None]

    def logits(self, hidden):
        logits = np.zeros((len(hidden), self.vocabulary), np.float32)
        for row, position in enumerate(hidden[:, 0].astype(int)):
            # The second best is a plain letter, for when the script's token is banned.
            logits[row, FIRST_BYTE + ord("x")] = 10
            logits[row, self.script[(position - self.prompt_tokens + 1) % len(self.script)]] = 20
        return logits


def scripted(llm: LLM, script):
    """Have an LLM's model replaced by a script for prompts of one token."""
    llm.model = llm.engine.model = Scripted(script, llm.model.dtype)
    return llm


def give_eyes(llm: LLM):
    """Have an LLM's model see, and count what it encodes."""
    eyes = Eyes(TINY["hidden_size"], llm.model.dtype)
    llm.model.images, llm.model.encoded = IMAGE, 0

    def encode_images(pixels):
        llm.model.encoded += 1
        return eyes(pixels)

    llm.model.encode_images = encode_images
    llm.engine = Engine(llm.model, llm.cache, llm.tokenizer, llm.engine.config)
    return llm


def greedy(**changes):
    return SamplingParams(**({"temperature": 0, "max_tokens": 40} | changes))


def one(llm, params, prompt=(FIRST_BYTE,)):
    return llm.generate([list(prompt)], params)[0].outputs[0]
