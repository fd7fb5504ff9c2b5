"""What clients send: OpenAI's requests, and the fields that vLLM's users know.

A field that is not here is refused by name. One that is here has an effect, or takes only the value that has none.
"""

from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pace.engine.sampling_params import SamplingParams
from pace.engine.structured import StructuredOutputsParams

INT64 = 2**63 - 1
DEEPEST = 100  # levels of lists and objects
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
Integer = Annotated[int, Field(ge=-INT64 - 1, le=INT64)]
Stop = Annotated[str, Field(max_length=1024)]  # looked for at each token, as are those below
Number = Annotated[float, Field(allow_inf_nan=False)]
Label = Annotated[str, Field(max_length=512)]  # goes to the log, as what is in Labels does
Labels = Annotated[dict[Annotated[str, Field(max_length=64)], Label], Field(max_length=16)]


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _is_sound(cls, value: Any) -> Any:
        _check(value)
        return value


def _check(value: Any) -> None:
    """ValueError for half of a surrogate pair, or for what is nested so deep that who walks it would stumble."""
    level = [value]
    for _ in range(DEEPEST):
        texts = [each for each in level if isinstance(each, str) and not each.isascii()]
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
            raise ValueError("a text in it is not Unicode: half of a surrogate pair")
        inner = [each for each in level if isinstance(each, dict | list)]
        level = [item for each in inner for item in (chain(*each.items()) if isinstance(each, dict) else each)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")


class StreamOptions(Schema):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False

    @model_validator(mode="after")
    def _includes_what_is_continuous(self) -> "StreamOptions":
        if self.continuous_usage_stats and not self.include_usage:
            raise ValueError("continuous_usage_stats goes with include_usage: true")
        return self


class StructuredOutputs(Schema):
    """vLLM's form; exactly one is given."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def params(self) -> StructuredOutputsParams:
        given = {name: value for name, value in self.model_dump(by_alias=True).items() if value is not None}
        return StructuredOutputsParams(**given)


class JsonSchema(Schema):
    name: str = Field("schema", max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Schema):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema")
        return self

    def params(self) -> StructuredOutputsParams | None:
        if self.json_schema is not None:
            return StructuredOutputsParams(json=self.json_schema.schema_)
        return StructuredOutputsParams(json_object=True) if self.type == "json_object" else None


class Sampled(Schema):
    """What completions and chats have in common."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=INT64)] | None = 1
    seed: Integer | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=64)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    frequency_penalty: Number | None = 0.0
    presence_penalty: Number | None = 0.0
    logit_bias: Annotated[dict[str, Number], Field(max_length=4096)] | None = None
    user: Label | None = None
    """Kept in the log line."""
    # --- as vLLM has them ---
    best_of: Annotated[int, Field(ge=1, le=INT64)] | None = None
    top_k: Integer | None = None
    min_p: Number | None = None
    typical_p: Number | None = None
    repetition_penalty: Number | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT64)] | None = 0
    stop_token_ids: Annotated[list[TokenId], Field(max_length=4096)] | None = None
    bad_words: Annotated[list[Stop], Field(max_length=1024)] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: Literal[True] = True
    prompt_logprobs: Annotated[int, Field(ge=0, le=100)] | None = None
    return_token_ids: bool | None = False
    truncate_prompt_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] = 0
    request_id: Annotated[str, Field(max_length=128, pattern=r"^[!-~]+$")] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> "Sampled":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise ValueError(f"best_of is {self.best_of}: what is chosen at the end can't be streamed")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs is not streamed: leave out stream")
        return self

    def structured(self) -> StructuredOutputsParams | None:
        """What the text must be. ValueError where that is said twice."""
        given = self._forms()
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} can't both be followed: give one")
        return next(iter(given.values()), None)

    @property
    def form(self) -> str | None:
        """The field that says what the text must be."""
        return next(iter(self._forms()), None)

    def _forms(self) -> dict[str, StructuredOutputsParams]:
        named: dict[str, StructuredOutputsParams | None] = {
            "response_format": self.response_format.params() if self.response_format else None,
            "structured_outputs": self.structured_outputs.params() if self.structured_outputs else None,
        }
        for name in ("json", "regex", "choice", "grammar"):
            value = getattr(self, f"guided_{name}")
            named[f"guided_{name}"] = None if value is None else _guided(name, value)
        return {name: params for name, params in named.items() if params is not None}

    def sampling(self, **changes: Any) -> SamplingParams:
        """ValueError for what can't be sampled by."""
        bias = self.logit_bias
        fields = {
            "n": self.n or 1,
            "best_of": self.best_of,
            "seed": None if self.seed is None else self.seed % 2**64,
            "stop": self.stop,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "presence_penalty": self.presence_penalty or 0.0,
            "logit_bias": None if bias is None else {_token_of(key): value for key, value in bias.items()},
            "min_tokens": self.min_tokens or 0,
            "structured_outputs": self.structured(),
        }
        same: tuple[str, ...] = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "typical_p",
            "repetition_penalty",
            "stop_token_ids",
        )
        same += ("bad_words", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "prompt_logprobs")
        return SamplingParams(**(fields | {name: getattr(self, name) for name in same} | changes))


def _guided(name: str, value: Any) -> StructuredOutputsParams:
    try:
        return StructuredOutputsParams(**{name: value})
    except ValueError as error:
        raise ValueError(f"guided_{error}") from None  # which begins with the name


def _token_of(key: str) -> int:
    if not key.isdecimal() or len(key) > 9:
        raise ValueError(f"logit_bias has {key[:20]!r}; its keys must be token ids")
    return int(key)


def _listed(prompts: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One prompt, a text or its tokens, as a list of one."""
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        return [prompts]
    return prompts  # type: ignore[return-value]


class CompletionRequest(Sampled):
    prompt: str | Annotated[list[str], Field(min_length=1)] | Tokens | Annotated[list[Tokens], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0, le=INT64)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = False
    suffix: None = None
    """Not served: the models here do not fill in."""
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _writes_or_echoes(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which is for echo: true")
        if self.echo and self.stream and self.logprobs is not None:
            raise ValueError("echo with logprobs is not streamed: leave out stream")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        return _listed(self.prompt)


class FunctionCall(Schema):
    name: str
    arguments: str
    parsed_arguments: Any = Field(None, exclude=True)
    """What openai's client made of the arguments; it sends that back."""


class ToolCallMessage(Schema):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ImageURL(Schema):
    url: str
    """The image itself, data:image/png;base64,…: nothing is fetched."""
    detail: Literal["auto", "low", "high"] | None = None
    """Whichever is said: a model sees images in one size."""


class ContentPart(Schema):
    type: Literal["text", "refusal", "image_url"]
    text: str | None = None
    refusal: str | None = None
    image_url: ImageURL | None = None

    @model_validator(mode="after")
    def _holds_its_type(self) -> "ContentPart":
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type} needs {self.type}")
        return self


class Message(Schema):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCallMessage] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    parsed: Any = Field(None, exclude=True)
    """What openai's client made of the content; it sends that back."""

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role} needs content")
        if self.images and self.role != "user":
            raise ValueError(f"a message of role {self.role} has an image; only a user's may")
        return self

    @property
    def characters(self) -> int:
        """Of its text."""
        if isinstance(self.content, list):
            return sum(len(part.text or part.refusal or "") for part in self.content)
        return len(self.content or "")

    @property
    def images(self) -> int:
        parts = self.content if isinstance(self.content, list) else []
        return sum(part.type == "image_url" for part in parts)


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT64)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    include_reasoning: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    metadata: Labels | None = None
    """Kept in the log line."""

    @model_validator(mode="after")
    def _agrees(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        if (
            self.continue_final_message
            and self.add_generation_prompt
            and "add_generation_prompt" in self.model_fields_set
        ):
            raise ValueError("continue_final_message and add_generation_prompt can't both be true")
        return self


class EmbeddingRequest(Schema):
    model: str | None = None
    input: str | Annotated[list[str], Field(min_length=1)] | Tokens | Annotated[list[Tokens], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: None = None
    """Not served: a prefix of an embedding is one only for models trained so."""
    user: Label | None = None
    pooling: Literal["last", "mean"] = "last"
    normalize: bool = True
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] = 0

    @property
    def prompts(self) -> list[str | list[int]]:
        return _listed(self.input)


class TokenizeRequest(Schema):
    """`prompt`, or `content` as llama-server has it, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    """For a prompt they are, unless this says otherwise; for `content` and chats, which bring their own, not."""
    add_special: bool | None = None
    parse_special: Literal[True] = True
    add_generation_prompt: bool = True
    with_pieces: bool = False
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _has_one(self) -> "TokenizeRequest":
        if sum(value is not None for value in (self.prompt, self.content, self.messages)) != 1:
            raise ValueError("give one of prompt, content and messages")
        return self

    @property
    def special(self) -> bool:
        said = self.add_special if self.add_special_tokens is None else self.add_special_tokens
        return self.prompt is not None if said is None else said


class DetokenizeRequest(Schema):
    model: str | None = None
    tokens: list[TokenId]


_FIELDS = CompletionRequest.model_fields.keys() | ChatRequest.model_fields.keys()


def field_of(message: str) -> str | None:
    """The field that an error speaks of: most messages begin with its name."""
    word = message.partition(" ")[0]
    return word if word in _FIELDS else None
