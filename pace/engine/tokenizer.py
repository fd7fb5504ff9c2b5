"""Text to token ids and back, and chats to token ids. Knows text; the model below knows token ids only.

Built on the `tokenizers` library itself: importing it takes 30 ms, where transformers takes a second.
"""

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as Backend

from pace.errors import ModelError
from pace.models.checkpoint import read_json

from . import harmony

Message = Mapping[str, Any]

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """special_tokens: role ("bos_token", "eos_token", ...) → text. eos_token_ids: all that end a text or a turn.
    chat_templates: Jinja sources by name; "default" is what `chat` uses, "tool_use" where tools are given.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._pieces: dict[int, bytes] = {}
        self._form = _PieceForm(backend)
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        eos = self._id("eos_token")
        self.eos_token_ids = frozenset(eos_token_ids) | ({eos} if eos is not None else set())
        self.bos_token_id = self._id("bos_token")
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The tokenizer of a Hugging Face directory or of a GGUF file."""
        path = Path(path)
        if path.is_file():
            return cls._of_gguf(path)
        if not path.is_dir():
            raise ModelError(f"no tokenizer at {path}: give a Hugging Face directory or a GGUF file")
        return cls._of_directory(path)

    @classmethod
    def _of_gguf(cls, path: Path) -> Self:
        from pace.models.gguf import GGUFFile, end_token_ids

        from .gguf_vocabulary import build

        file = GGUFFile(path)
        metadata = file.metadata
        try:
            backend = build(file)
        except KeyError as missing:
            raise ModelError(f"{path} does not say {missing}: it has no whole tokenizer, download another") from None
        roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {role: metadata.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
        prefix = "tokenizer.chat_template"
        named = {key[len(prefix) + 1 :]: text for key, text in metadata.items() if key.startswith(prefix + ".")}
        default = {"default": metadata[prefix]} if metadata.get(prefix) else {}
        return cls(
            backend,
            special_tokens={role: str(backend.id_to_token(i)) for role, i in ids.items() if i is not None},
            eos_token_ids=end_token_ids(metadata),
            chat_templates=named | default,
        )

    @classmethod
    def _of_directory(cls, path: Path) -> Self:
        config = read_json(path / "special_tokens_map.json") | read_json(path / "tokenizer_config.json")
        texts = {role: _text(config[role]) for role in _SPECIAL if config.get(role)}
        generation = read_json(path / "config.json") | read_json(path / "generation_config.json")
        eos = generation.get("eos_token_id")
        return cls(
            _backend(path),
            special_tokens=texts,
            eos_token_ids=eos if isinstance(eos, list) else [] if eos is None else [eos],
            chat_templates=_chat_templates(path, config.get("chat_template")),
        )

    def _id(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        found: int | None = None if text is None else self._backend.token_to_id(text)
        return found

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Special tokens written in the text are taken as such, as everywhere in the field. Other threads go on: of the
        library's ways to encode, those of a batch alone release the GIL, and the fast one leaves out offsets.
        """
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of the tokens; bytes that are not UTF-8 become U+FFFD, ids without a token nothing."""
        detokenizer = Detokenizer(self, skip_special_tokens)
        return "".join(map(detokenizer.push, ids)) + detokenizer.flush()

    def piece(self, token_id: int) -> bytes:
        """The bytes that a token stands for, a space at the beginning included; b"" for an id without a token."""
        piece = self._pieces.get(token_id)
        if piece is None:
            token = self._backend.id_to_token(token_id)
            piece = self._pieces[token_id] = b"" if token is None else self._form.to_bytes(token)
        return piece

    @property
    def strips_first_space(self) -> bool:
        """Whether encoding puts a space before the text, which decoding takes away again."""
        return self._form.strips_first_space

    @property
    def needs_harmony(self) -> bool:
        """Whether there is no chat template, and the vocabulary is made for OpenAI's harmony format."""
        return not self.chat_templates and all(map(self._backend.token_to_id, harmony.SPECIAL_TOKENS))

    def chat_text(self, messages: Sequence[Message], add_generation_prompt: bool = True, **kwargs: Any) -> str:
        """The messages as the model's own template writes them; of GPT-OSS without one, as its format is. `kwargs` go
        to the template (tools, documents, ...).
        """
        from .chat_template import compile_template, render

        if self.needs_harmony:
            return harmony.render(messages, add_generation_prompt, **kwargs)
        name = "tool_use" if kwargs.get("tools") and "tool_use" in self.chat_templates else "default"
        if name not in self.chat_templates:
            raise ModelError("the model has no chat template: it is not made for chats, give it plain text")
        if name not in self._templates:
            self._templates[name] = compile_template(self.chat_templates[name])
        context = {"tools": None, "documents": None} | self.special_tokens | kwargs
        chat = list(map(dict, messages))
        return render(self._templates[name], messages=chat, add_generation_prompt=add_generation_prompt, **context)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, **kwargs: Any) -> list[int]:
        """The token ids of `chat_text`; the template writes the special tokens, so none are added."""
        return self.encode(self.chat_text(messages, add_generation_prompt, **kwargs), add_special_tokens=False)

    @cached_property
    def _templates(self) -> dict[str, Any]:
        return {}


class Detokenizer:
    """Turns the tokens of one sequence into text as they come, each in constant time.

    `push` gives the text that is final: characters whose bytes have not all come wait. What `push` and `flush` give,
    end to end, is `decode` of all the ids. With `follows_text` the first token continues some text, and keeps a
    space at its beginning that `decode` would take for the one that encoding adds.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, follows_text: bool = False) -> None:
        self._piece = tokenizer.piece
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._strips = tokenizer.strips_first_space and not follows_text
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._piece(token_id)
        if self._strips and piece:
            piece = piece.removeprefix(b" ")
            self._strips = False
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character whose last bytes never came."""
        return self._decoder.decode(b"", final=True)


class _PieceForm:
    """How a vocabulary writes bytes: read from the decoder of the tokenizer."""

    def __init__(self, backend: Backend) -> None:
        steps = _decoder_steps(backend)
        kinds = {step["type"] for step in steps}
        self.byte_level = kinds == {"ByteLevel"}
        if not self.byte_level and (
            not steps or not kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
        ):
            raise ModelError(f"a tokenizer that decodes by {sorted(kinds)} is not supported: ByteLevel or Metaspace is")
        self.byte_fallback = "ByteFallback" in kinds
        self.replaced = [(s["pattern"]["String"], s["content"]) for s in steps if s["type"] == "Replace"]
        self.replaced += [(s["replacement"], " ") for s in steps if s["type"] == "Metaspace"]
        self.strips_first_space = any(
            step["type"] == "Strip" or step.get("prepend_scheme", "never") != "never" for step in steps
        )

    def to_bytes(self, token: str) -> bytes:
        if self.byte_level:
            try:
                return bytes(_BYTE_OF[character] for character in token)
            except KeyError:  # a token that was added as plain text
                return token.encode()
        if self.byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes.fromhex(token[3:5])
        for old, new in self.replaced:
            token = token.replace(old, new)
        return token.encode()


def _decoder_steps(backend: Backend) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others the characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of_character()


def _backend(path: Path) -> Backend:
    file = path / "tokenizer.json"
    if not file.exists():
        return _converted(path)
    try:
        return Backend.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{file} is not a tokenizer ({error}): download it again") from None


def _converted(path: Path) -> Backend:
    """A tokenizer in an older form (vocab.json and merges.txt, tokenizer.model), which transformers can convert."""
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError:
        raise ModelError(
            f"{path} has no tokenizer.json; for tokenizers in older forms, pip install 'pace[transformers]'"
        ) from None
    try:
        backend: Backend = AutoTokenizer.from_pretrained(path, local_files_only=True).backend_tokenizer
        return backend
    except (OSError, ValueError, ImportError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{path} has no tokenizer.json, and nothing that can be converted to one: {reason}") from None


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _chat_templates(path: Path, configured: Any) -> dict[str, str]:
    """From chat_template.jinja, chat_template.json, or the tokenizer's config, where it is one template or a list."""
    if (file := path / "chat_template.jinja").exists():
        return {"default": file.read_text(encoding="utf-8")}
    configured = read_json(path / "chat_template.json").get("chat_template", configured)
    if isinstance(configured, list):
        return {entry["name"]: entry["template"] for entry in configured}
    return {"default": configured} if configured else {}
