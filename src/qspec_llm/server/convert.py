"""From request bodies to what the engine takes: prompts, sampling options, grammars."""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qspec_llm.engine.engine import Gamma
from qspec_llm.engine.grammar import GrammarCompiler, GuidedGrammar
from qspec_llm.engine.params import SamplingParams
from qspec_llm.errors import QSpecError
from qspec_llm.llm import LLM
from qspec_llm.server.errors import bad_request
from qspec_llm.server.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    JsonSchemaFormat,
    Options,
    Tool,
)

__all__ = ["MAX_PROMPTS", "Converter", "Tools"]

MAX_PROMPTS = 256  # of one body
DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI has it
TOOL_TEXT = (
    "You may call these functions:\n{tools}\n"
    "To call one, write a JSON object with its name and arguments between tags:\n"
    '<tool_call>\n{{"name": <function-name>, "arguments": <arguments-object>}}\n</tool_call>'
)


@dataclass(frozen=True)
class Tools:
    """The functions that an answer may call."""

    functions: tuple[dict[str, Any], ...]
    is_required: bool
    is_parallel: bool


class Converter:
    """Reads bodies for one model."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._compiler: GrammarCompiler | None = None
        self.longest = min(llm.model_config.context_length, llm.cache_tokens)

    def completion_prompts(self, body: CompletionRequest) -> list[list[int]]:
        """Token ids of each prompt."""
        prompt = body.prompt
        if isinstance(prompt, str):
            prompts: Sequence[str | Sequence[int]] = [prompt]
        elif prompt and isinstance(prompt[0], int):
            prompts = [prompt]
        else:
            prompts = prompt  # type: ignore[assignment]
        if not 0 < len(prompts) <= MAX_PROMPTS:
            raise bad_request(f"prompt must hold 1 to {MAX_PROMPTS} prompts", "prompt")
        return [self._prompt(each) for each in prompts]

    def _prompt(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            self._check_length(len(prompt), "prompt")
        try:
            tokens = self._llm.encode(prompt)
        except QSpecError as error:
            raise bad_request(str(error), "prompt") from None
        if not isinstance(prompt, str):
            self._check_tokens(tokens, "prompt")
        return tokens

    def _check_length(self, num_characters: int, param: str) -> None:
        """Refuse a text that no tokens that fit could spell; to encode it may take seconds."""
        piece = self._llm.tokenizer.longest_piece
        if piece is not None and num_characters > piece * self.longest:
            raise bad_request(
                f"{param} has {num_characters} characters, and this server holds {self.longest} "
                "tokens of a request",
                param,
                "context_length_exceeded",
            )

    def _check_tokens(self, tokens: Iterable[int], param: str) -> None:
        """Here rather than in the engine, since a stream's status is sent before it hears of it."""
        size = self._llm.model_config.vocab_size
        for token in tokens:
            if not 0 <= token < size:
                what = f"{param} has token {token}, outside the vocabulary of {size}"
                raise bad_request(what, param)

    def chat_prompt(self, messages: Sequence[ChatMessage], tools: Tools | None = None) -> list[int]:
        """Token ids of a conversation."""
        self._check_length(sum(len(_text(each.content)) for each in messages), "messages")
        template = self._llm.tokenizer.chat_template
        knows_tools = "tools" in template
        records = [_message(message, knows_tools=knows_tools) for message in messages]
        functions = tools.functions if tools else ()
        if functions and not knows_tools:
            records = _announce(records, functions)
        described = [{"type": "function", "function": each} for each in functions]
        try:
            return self._llm.tokenizer.encode_chat(records, described if knows_tools else None)
        except QSpecError as error:
            raise bad_request(str(error), "messages") from None

    def tools(self, body: ChatRequest) -> Tools | None:
        """What may be called; None for nothing."""
        choice = body.tool_choice
        if not body.tools:
            if choice not in (None, "none", "auto"):
                raise bad_request("tool_choice needs tools", "tool_choice")
            return None
        if choice == "none":
            return None
        if body.response_format is not None and body.response_format.type != "text":
            raise bad_request("response_format and tools exclude each other", "response_format")
        functions = [_function(tool) for tool in body.tools]
        is_named = choice is not None and not isinstance(choice, str)
        if is_named:
            name = choice.function.name  # type: ignore[union-attr]
            functions = [each for each in functions if each["name"] == name]
            if not functions:
                raise bad_request(
                    f"tool_choice names {name!r}, which is not in tools", "tool_choice"
                )
        return Tools(
            tuple(functions),
            is_required=is_named or choice == "required",
            is_parallel=body.parallel_tool_calls is not False and not is_named,
        )

    def grammar(self, body: Options, tools: Tools | None) -> GuidedGrammar | None:
        """What the answer must follow; takes its time, so not on the event loop."""
        form = getattr(body, "response_format", None)
        if tools is None and (form is None or form.type == "text"):
            return None
        param = "tools" if tools else "response_format"
        try:
            compiler = self._get_compiler()
            if tools is not None:
                return compiler.tool_calls(
                    tools.functions, is_required=tools.is_required, is_parallel=tools.is_parallel
                )
            if isinstance(form, JsonSchemaFormat):
                return compiler.json_schema(form.json_schema.json_schema or {})
            return compiler.json_schema({"type": "object"})
        except QSpecError as error:
            raise bad_request(str(error), param) from None

    def _get_compiler(self) -> GrammarCompiler:
        if self._compiler is None:
            config = self._llm.model_config
            self._compiler = GrammarCompiler(
                self._llm.tokenizer.hf, config.vocab_size, config.eos_token_ids
            )
        return self._compiler

    def prepare(self) -> None:
        """Read the vocabulary for grammars now: it holds Python's lock for a quarter of a second.

        Where grammars cannot be had, who asks for one will hear why.
        """
        with contextlib.suppress(QSpecError):
            self._get_compiler()

    def params(self, body: Options, num_prompt: int) -> SamplingParams:
        """Sampling options of a body whose longest prompt has `num_prompt` tokens."""
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        self._check_tokens(bias, "logit_bias")
        self._check_tokens(body.stop_token_ids or (), "stop_token_ids")
        form = getattr(body, "response_format", None)
        has_grammar = bool(getattr(body, "tools", None)) or (form and form.type != "text")
        if has_grammar and (body.min_tokens or body.ignore_eos):
            what = "a grammar decides where the answer ends: no min_tokens or ignore_eos"
            raise bad_request(what, "min_tokens" if body.min_tokens else "ignore_eos")
        given: dict[str, Any] = {
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": None if body.top_k == -1 else body.top_k,
            "min_p": body.min_p,
            "seed": body.seed,
            "stop": body.stop or None,
            "stop_token_ids": body.stop_token_ids,
            "min_tokens": body.min_tokens,
            "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
            "repetition_penalty": body.repetition_penalty,
            "logit_bias": bias,
            "max_tokens": self._max_tokens(body, num_prompt),
            "ignore_eos": body.ignore_eos,
        }
        if isinstance(body, CompletionRequest):
            given["logprobs"] = body.logprobs
            given["prompt_logprobs"] = body.logprobs if body.echo else None
        elif isinstance(body, ChatRequest):
            if body.top_logprobs is not None and not body.logprobs:
                raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
            given["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
        try:
            return SamplingParams(**{k: v for k, v in given.items() if v is not None})
        except QSpecError as error:
            raise bad_request(str(error), _named(str(error), given)) from None

    def _max_tokens(self, body: Options, num_prompt: int) -> int:
        room = self.longest - num_prompt
        if isinstance(body, ChatRequest):
            if body.max_tokens is not None and body.max_completion_tokens is not None:
                raise bad_request(
                    "max_tokens is the old name of max_completion_tokens; give one", "max_tokens"
                )
            asked, default = body.max_completion_tokens or body.max_tokens, max(room, 1)
        else:
            assert isinstance(body, CompletionRequest)
            asked, default = body.max_tokens, max(min(DEFAULT_MAX_TOKENS, room), 1)
            if asked == 0 and not body.echo:
                raise bad_request("max_tokens is 0, which only echo gives a meaning", "max_tokens")
            asked = max(asked, 1) if asked is not None else None
        if room < 1 or (asked is not None and asked > room):
            raise bad_request(
                f"this server holds {self.longest} tokens of a request; {num_prompt} in the prompt "
                f"and {asked or 1} to generate are more",
                "max_tokens" if room >= 1 else None,
                "context_length_exceeded",
            )
        return asked or default

    def gamma(self, body: Options) -> Gamma | None:
        """Tokens to draft, None for the server's default."""
        wanted = body.speculative
        if wanted is None:
            return None
        if isinstance(wanted, bool):
            return "auto" if wanted else 0
        return wanted.gamma


def _named(message: str, options: Mapping[str, Any]) -> str | None:
    """The option that an error's sentence begins with."""
    first = message.split(" ", 1)[0]
    return first if first in options else None


def _function(tool: Tool) -> dict[str, Any]:
    return tool.function.model_dump(exclude_none=True, exclude={"strict"})


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _message(message: ChatMessage, *, knows_tools: bool) -> dict[str, Any]:
    """A record for the chat template."""
    role = "system" if message.role == "developer" else message.role
    record: dict[str, Any] = {"role": role, "content": _text(message.content)}
    if message.tool_calls:
        calls = [
            {"name": call.function.name, "arguments": _arguments(call.function.arguments)}
            for call in message.tool_calls
        ]
        if knows_tools:
            record["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        else:
            record["content"] += "\n".join(
                f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls
            )
    if role == "tool" and not knows_tools:
        record["role"] = "user"
        record["content"] = f"<tool_response>\n{record['content']}\n</tool_response>"
    return record


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise bad_request(
            f"arguments {text[:40]!r} of a tool call are not JSON", "messages"
        ) from None


def _announce(
    records: list[dict[str, Any]], functions: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Describe functions in the system message, for a template that has no place for them."""
    text = TOOL_TEXT.format(tools="\n".join(json.dumps(each) for each in functions))
    if records and records[0]["role"] == "system":
        first = {**records[0], "content": f"{records[0]['content']}\n\n{text}"}
        return [first, *records[1:]]
    return [{"role": "system", "content": text}, *records]
