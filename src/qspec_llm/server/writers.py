"""Writing answers: a whole choice, or the chunks of one as it grows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qspec_llm.engine.grammar import GuidedGrammar
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.text import TextStream
from qspec_llm.server.convert import Tools
from qspec_llm.server.jobs import News
from qspec_llm.server.protocol import ChatRequest, CompletionRequest, Options
from qspec_llm.server.responses import (
    Body,
    Choice,
    ToolCallReader,
    chat_logprobs,
    completion_logprobs,
)
from qspec_llm.tokenizer import HFTokenizer

__all__ = ["ChatWriter", "CompletionWriter", "Echo", "Plan", "Writer", "echo", "writer_of"]

Echo = tuple[str, list[int]]  # a prompt as text, and where each of its tokens begins there


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One body, read: its prompts, each with `n` completions, and how to answer.

    `echoes` has one entry a prompt where the prompt is wanted back.
    """

    body: Options
    prompts: list[list[int]]
    params: SamplingParams
    grammar: GuidedGrammar | None
    tools: Tools | None
    header: Body
    salt: bytes
    echoes: Sequence[Echo]

    @property
    def n(self) -> int:
        """Completions of each prompt."""
        return self.body.n or 1

    @property
    def is_echo_alone(self) -> bool:
        """Whether the one token that was generated is not wanted."""
        return isinstance(self.body, CompletionRequest) and self.body.max_tokens == 0


def echo(tokenizer: HFTokenizer, prompt: Sequence[int]) -> Echo:
    """A prompt as it is echoed; takes 5 us a token, so not on the event loop."""
    stream = TextStream(tokenizer, ())
    for token in prompt:
        stream.push(token)
    stream.finish()
    return stream.text, [0, *stream.ends[:-1]]


class Writer:
    """Writes the choices of one body."""

    def __init__(self, tokenizer: HFTokenizer, plan: Plan) -> None:
        self._tokenizer, self._plan = tokenizer, plan
        self._num_choices = len(plan.prompts) * plan.n

    def whole(self, choice: Choice) -> Body:
        """A choice that has ended."""
        raise NotImplementedError

    def begin(self) -> list[Body]:
        """Chunks before any news."""
        return []

    def chunk(self, news: News) -> Body | None:
        """A step's chunk, None if there is nothing to say yet."""
        raise NotImplementedError


def writer_of(tokenizer: HFTokenizer, plan: Plan) -> Writer:
    """The writer for a body."""
    kind = ChatWriter if isinstance(plan.body, ChatRequest) else CompletionWriter
    return kind(tokenizer, plan)


class ChatWriter(Writer):
    """/v1/chat/completions."""

    def __init__(self, tokenizer: HFTokenizer, plan: Plan) -> None:
        super().__init__(tokenizer, plan)
        self._readers = [ToolCallReader() for _ in range(self._num_choices)]

    def whole(self, choice: Choice) -> Body:
        assert choice.request is not None
        message: Body = {"role": "assistant", "content": choice.text, "refusal": None}
        reason: str | None = choice.request.finish_reason
        if self._plan.tools is not None:
            text, calls = ToolCallReader().push(choice.text, is_final=True)
            if calls:
                listed = [{k: v for k, v in call.items() if k != "index"} for call in calls]
                message |= {"content": text.strip() or None, "tool_calls": listed}
                reason = "tool_calls" if reason == "stop" else reason
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": reason,
        }

    def begin(self) -> list[Body]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        choice = {"delta": delta, "logprobs": None, "finish_reason": None}
        return [{"choices": [{"index": index, **choice}]} for index in range(self._num_choices)]

    def chunk(self, news: News) -> Body | None:
        text, calls = news.emission.text, list[Body]()
        reason: str | None = news.emission.finish_reason
        if self._plan.tools is not None:
            reader = self._readers[news.index]
            text, calls = reader.push(text, is_final=reason is not None)
            reason = "tool_calls" if reason == "stop" and reader.calls else reason
            text = "" if reader.calls and not text.strip() else text
        logprobs = self._logprobs(news.logprobs)
        if not text and not calls and reason is None and logprobs is None:
            return None
        delta: Body = {"content": text} if text or (not calls and reason is None) else {}
        if calls:
            delta["tool_calls"] = calls
        choice = {"index": news.index, "delta": delta, "logprobs": logprobs}
        return {"choices": [{**choice, "finish_reason": reason}]}

    def _logprobs(self, entries: Sequence[Any]) -> Body | None:
        num_top = self._plan.params.logprobs
        return None if num_top is None else chat_logprobs(self._tokenizer, entries, num_top)


class CompletionWriter(Writer):
    """/v1/completions."""

    def __init__(self, tokenizer: HFTokenizer, plan: Plan) -> None:
        super().__init__(tokenizer, plan)
        self._choices = [Choice(index) for index in range(self._num_choices)]
        self._has_begun = [False] * self._num_choices

    def whole(self, choice: Choice) -> Body:
        assert choice.request is not None
        is_alone = self._plan.is_echo_alone
        return {
            "index": choice.index,
            "text": self._echo(choice.index)[0] + ("" if is_alone else choice.text),
            "logprobs": self._logprobs(choice, 0),
            "finish_reason": "length" if is_alone else choice.request.finish_reason,
        }

    def chunk(self, news: News) -> Body | None:
        choice, is_alone = self._choices[news.index], self._plan.is_echo_alone
        before = len(choice.token_ids)
        choice.add(news)
        text = "" if is_alone else news.emission.text
        if not self._has_begun[news.index]:
            text = self._echo(news.index)[0] + text
        self._has_begun[news.index] = True
        logprobs = self._logprobs(choice, before)
        reason: str | None = news.emission.finish_reason
        if not text and reason is None and logprobs is None:
            return None
        reason = "length" if is_alone and reason is not None else reason
        record = {"index": news.index, "text": text, "logprobs": logprobs}
        return {"choices": [{**record, "finish_reason": reason}]}

    def _echo(self, index: int) -> Echo:
        """What a choice begins with."""
        return self._plan.echoes[index // self._plan.n] if self._plan.echoes else ("", [])

    def _logprobs(self, choice: Choice, start: int) -> Body | None:
        """`logprobs` of output tokens from `start` on, after those of an echoed prompt."""
        plan = self._plan
        if plan.params.logprobs is None:
            return None
        stop = start if plan.is_echo_alone else len(choice.token_ids)
        tokens = choice.token_ids[start:stop]
        entries: list[Any] = choice.logprobs[start:stop]
        text, begins = self._echo(choice.index)
        offsets = [len(text) + offset for offset in [0, *choice.ends][start:stop]]
        if plan.echoes and start == 0:
            prompt = plan.prompts[choice.index // plan.n]
            tokens, offsets = [*prompt, *tokens], [*begins, *offsets]
            entries = [None, *choice.prompt_logprobs, *entries]
        return completion_logprobs(self._tokenizer, tokens, entries, offsets)
