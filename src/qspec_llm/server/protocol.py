"""Request bodies, as OpenAI's API has them, and what we add to it.

Types and limits only; unknown options are refused, since an option that does nothing is a lie.
Options without meaning here (`user`, `metadata`, `store: false`) are taken and left aside, as
docs/limits.md says.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "JsonSchemaFormat",
    "Options",
    "SpeculativeOptions",
    "StreamOptions",
    "TextPart",
    "TokenizeRequest",
    "Tool",
    "ToolCall",
]

MAX_CHOICES = 64  # completions of one body
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
# The first wrong item decides: to note each of a million takes a quarter of a second.
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]
TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _WholeBody(_Body):
    """A body of its own: its text must be text."""

    @model_validator(mode="before")
    @classmethod
    def _has_only_characters(cls, value: Any) -> Any:
        """Refuse halves of surrogate pairs, which JSON can write and UTF-8 cannot."""
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise ValueError("a string holds half of a surrogate pair") from None
        return value


class StreamOptions(_Body):
    """What a stream contains besides text.

    `include_origins` adds to each chunk `speculative`: pieces of its text with whether an accepted
    draft or the verifier made them, and the gamma of the cycle.
    """

    include_usage: bool = False
    include_origins: bool = False


class SpeculativeOptions(_Body):
    """Tokens to draft in each cycle."""

    gamma: Annotated[int, Field(ge=0, le=16)] | Literal["auto"]


class Options(_WholeBody):
    """Options that both endpoints have.

    `speculative` is false for plain decoding, {"gamma": n} for drafts of n tokens, true or
    {"gamma": "auto"} for whatever pays best, and the server's default otherwise.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: (
        Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
        | Annotated[list[StopString], Field(max_length=MAX_STOPS)]
        | None
    ) = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=1024)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    speculative: bool | SpeculativeOptions | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None


class CompletionRequest(Options):
    """Body of /v1/completions."""

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    suffix: None = None


class TextPart(_Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class _CalledFunction(_Body):
    name: Name
    arguments: str


class ToolCall(_Body):
    """A call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: _CalledFunction
    index: int | None = None


class ChatMessage(_Body):
    """One message; the last four are what OpenAI's own responses carry and clients send back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CHOICES)] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class _Function(_Body):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body):
    """A function that the model may call."""

    type: Literal["function"]
    function: _Function


class _ChosenFunction(_Body):
    name: Name


class _ToolChoice(_Body):
    type: Literal["function"]
    function: _ChosenFunction


class _NamedSchema(_Body):
    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)
    name: Name
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(_Body):
    """An answer that a JSON schema allows."""

    type: Literal["json_schema"]
    json_schema: _NamedSchema


class _PlainFormat(_Body):
    type: Literal["text", "json_object"]


class ChatRequest(Options):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: JsonSchemaFormat | _PlainFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | _ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None


class TokenizeRequest(_WholeBody):
    """Body of /tokenize: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2048)] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(_Body):
    """Body of /detokenize."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=1 << 20)]
