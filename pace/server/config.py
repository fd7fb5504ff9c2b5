"""All that `pace serve` can be told: one field for each flag, with its help."""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_origin

from pace.engine.config import EngineConfig


def _flag(default: Any, help: str, panel: str, kind: str = "") -> Any:
    """kind: "bytes" for sizes such as 4G, "secret" for what --print-config leaves out."""
    metadata = {"help": help, "panel": panel, "kind": kind}
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """ValueError for a value that can't be, with what can."""

    model: str = ""
    host: str = _flag("127.0.0.1", "The address to listen on; 0.0.0.0 is all of this machine's.", "HTTP")
    port: int = _flag(8000, "0 takes a free one, and says which.", "HTTP")
    api_key: tuple[str, ...] = _flag((), "A key that clients must send; can be repeated.", "HTTP", "secret")
    api_key_file: str | None = _flag(None, "A file with a key in each line.", "HTTP")
    tls_cert: str | None = _flag(None, "A certificate in PEM, to speak HTTPS.", "HTTP")
    tls_key: str | None = _flag(None, "Its private key.", "HTTP")
    cors_origin: tuple[str, ...] = _flag((), "A web origin whose pages may ask; can be repeated.", "HTTP")
    max_body_bytes: int = _flag(32 << 20, "Of a request; larger ones are refused.", "HTTP", "bytes")
    request_seconds: float = _flag(600.0, "Within which a request must be answered.", "HTTP")
    drain_seconds: float = _flag(30.0, "For running requests to end in, after SIGTERM.", "HTTP")
    served_model_name: str | None = _flag(None, "What clients call the model, instead of MODEL.", "Answers")
    tool_parser: str | None = _flag(
        None, "How the model writes calls of tools; else as its chat template shows.", "Answers"
    )
    reasoning_parser: str | None = _flag(
        None, "How it writes its thinking; else as its chat template shows.", "Answers"
    )
    max_texts: int = _flag(64, "Of one request: its prompts times n or best_of.", "Answers")
    max_images: int = _flag(16, "Of one request.", "Answers")
    max_image_pixels: int = _flag(1 << 26, "Of an image as it comes; larger ones are refused.", "Answers")
    engines: str = _flag("auto", "How many engine processes; auto: one a NUMA node.", "Machine")
    cores: str | None = _flag(None, 'The CPUs of each engine, such as "0-31;32-63".', "Machine")
    threads: int | None = _flag(None, "Of each engine; else one a core.", "Machine")
    dtype: str = _flag("auto", "bfloat16, float32, or auto: the checkpoint's own.", "Machine")
    ops: str | None = _flag(None, 'The backend of each operator, {"mlp": "REFERENCE"}, or one for all.', "Machine")
    speculative: str | None = _flag(
        None, 'Guess tokens ahead: {"method": "ngram"}, or with a draft model. Answers stay the same.', "Machine"
    )
    stall_seconds: float = _flag(600.0, "For which an engine may be silent before it is started anew.", "Machine")
    cache: str = _flag("SLAB_POOL", "SLAB_POOL, PAGED, BMC or DYNAMIC.", "Cache and queue")
    kv_cache_bytes: int | None = _flag(
        None, "Of each engine; else a quarter of what is free for all.", "Cache and queue", "bytes"
    )
    block_tokens: int | None = _flag(None, "The cache's blocks or steps: 16, 32, 48, …", "Cache and queue")
    prefix_caching: bool | None = _flag(
        None, "Keep what was computed for prompts that begin alike; else where the cache can.", "Cache and queue"
    )
    policy: str = _flag(
        "prefill_first", "prefill_first, or decode_first: running texts do not wait.", "Cache and queue"
    )
    max_batch_tokens: int = _flag(1024, "Of a forward pass.", "Cache and queue")
    max_sequences: int = _flag(256, "Texts that an engine writes at once.", "Cache and queue")
    max_waiting: int = _flag(512, "Requests without a first token, beyond which there is a 429.", "Cache and queue")
    max_waiting_tokens: int = _flag(1 << 20, "Of their prompts.", "Cache and queue")
    log_json: bool = _flag(False, "Each line of the log a JSON object.", "Log")
    log_prompts: bool = _flag(False, "Log prompts and answers as well.", "Log")
    otlp_endpoint: str | None = _flag(None, "Where to send OpenTelemetry spans, over HTTP.", "Log")

    def __post_init__(self) -> None:
        for each in fields(self):
            _check_type(each, getattr(self, each.name))
        if not self.model:
            raise ValueError("no model is named: give MODEL, or `model` in the configuration file")
        from pace.engine.loader import check_cache  # heavy, as what else is imported here
        from pace.speculative import SpeculativeConfig

        from .chat.formats import Format, override

        check_cache(self.cache, self.block_tokens)
        SpeculativeConfig.parse(self.speculative)
        override(Format(), self.tool_parser, self.reasoning_parser)
        EngineConfig(**self.limits)
        if self.engines != "auto" and not (self.engines.isdecimal() and int(self.engines) > 0):
            raise ValueError(f"engines is {self.engines!r}; it must be a number, or auto")
        counts = ("max_waiting", "max_waiting_tokens", "max_body_bytes", "max_texts", "max_images", "max_image_pixels")
        for name in ("port", "drain_seconds", *counts):
            if getattr(self, name) < (1 if name in counts else 0):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("request_seconds", "stall_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.port > 65535:
            raise ValueError(f"port is {self.port}; the last is 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: give both, or neither")

    @property
    def limits(self) -> dict[str, Any]:
        """Those of EngineConfig. The queue is limited in the front process."""
        return {name: getattr(self, name) for name in ("policy", "max_batch_tokens", "max_sequences")}

    @property
    def name(self) -> str:
        return self.served_model_name or self.model

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the flags and of the file, without the spaces and line ends around them. ValueError for a file without
        any, and for what no header can carry.
        """
        keys = list(self.api_key)
        if self.api_key_file is not None:
            keys += (lines := Path(self.api_key_file).read_text(encoding="utf-8").splitlines())
            if not any(line.strip() for line in lines):
                raise ValueError(f"{self.api_key_file} holds no key: write one in each line")
        found = tuple(key.strip() for key in keys if key.strip())
        if not all(key.isascii() and key.isprintable() for key in found):
            raise ValueError("an API key has characters that no header can carry: it must be printable ASCII")
        return found

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From a configuration file and flags; names with - or _. ValueError for a name that is nobody's."""
        known = {each.name for each in fields(cls)}
        named = {str(name).replace("-", "_"): value for name, value in values.items()}
        if unknown := named.keys() - known:
            raise ValueError(f"{', '.join(sorted(unknown))} is no option; they are {', '.join(sorted(known))}")
        if "engines" in named:
            named["engines"] = str(named["engines"])
        for name in ("api_key", "cors_origin"):
            if isinstance(given := named.get(name), str | list):
                named[name] = (given,) if isinstance(given, str) else tuple(given)
        for name in ("ops", "speculative"):
            if isinstance(named.get(name), Mapping):
                import json

                named[name] = json.dumps(named[name])
        return cls(**named)

    def as_dict(self) -> dict[str, Any]:
        """What --print-config shows: all but secrets."""
        shown = {each.name: getattr(self, each.name) for each in fields(self) if each.metadata.get("kind") != "secret"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in shown.items()}


def kind_of(each: "Field[Any]") -> type:
    """The type of a field's values, None aside: str, int, float, bool, or tuple, which is of texts."""
    (first, *_) = get_args(each.type) if isinstance(each.type, UnionType) else (each.type,)
    kind: type = get_origin(first) or first
    return kind


def _check_type(each: "Field[Any]", value: Any) -> None:
    kind = kind_of(each)
    if value is None and isinstance(each.type, UnionType):
        return
    if kind is tuple:
        if not isinstance(value, tuple) or not all(isinstance(item, str) and item.strip() for item in value):
            shown = "what it is" if each.metadata["kind"] == "secret" else repr(value)
            raise ValueError(f"{each.name} can't be {shown}; it must be texts that are not empty")
    elif not isinstance(value, (int, float) if kind is float else kind) or (
        kind is not bool and isinstance(value, bool)
    ):
        raise ValueError(f"{each.name} is {value!r}; it must be of type {kind.__name__}")
