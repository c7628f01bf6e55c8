"""What the endpoints do, without HTTP: a body in; a response, or the chunks of one, out."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from qspec_llm.engine.grammar import GuidedGrammar
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.request import Request
from qspec_llm.engine.text import TextStream
from qspec_llm.errors import QSpecError
from qspec_llm.llm import LLM
from qspec_llm.server.convert import MAX_PROMPTS, Converter, Tools
from qspec_llm.server.errors import APIError, bad_request
from qspec_llm.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Options,
    TokenizeRequest,
)
from qspec_llm.server.responses import (
    Choice,
    ToolCallReader,
    chat_logprobs,
    completion_logprobs,
    metrics,
    origins,
    usage,
)
from qspec_llm.server.worker import EngineFailedError, Job, News, Submission, Worker

__all__ = ["Service"]

Body = dict[str, Any]


@dataclass(frozen=True)
class _Plan:
    """One body, read: its prompts, each with `n` completions, and how to answer."""

    body: Options
    prompts: list[list[int]]
    params: SamplingParams
    grammar: GuidedGrammar | None
    tools: Tools | None
    header: Body
    salt: bytes

    @property
    def n(self) -> int:
        return self.body.n or 1


class Service:
    """Answers for one model.

    Args:
        llm: the model.
        worker: the thread that runs its engine, started.
        names: what the model is called in requests, the first in responses.
    """

    def __init__(self, llm: LLM, worker: Worker, names: Sequence[str]) -> None:
        self.worker, self.names = worker, tuple(names)
        self._llm, self._convert = llm, Converter(llm)
        self._created = int(time.time())

    # What the model is

    def models(self) -> Body:
        """/v1/models."""
        return {"object": "list", "data": [self.model(name) for name in self.names]}

    def model(self, name: str) -> Body:
        """/v1/models/{name}."""
        self._check_model(name)
        config = self._llm.config
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "qspec",
            "max_model_len": self._convert.longest,
            "target": str(config.target),
            "draft": str(config.draft),
            "gamma": config.gamma,
            "backend": config.backend,
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            raise APIError(
                404,
                f"the model {name!r} is not served here; {self.names[0]!r} is",
                param="model",
                code="model_not_found",
            )

    def tokenize(self, body: TokenizeRequest) -> Body:
        """/tokenize."""
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("give either prompt or messages", "prompt")
        if body.messages is not None:
            tokens = self._convert.chat_prompt(body.messages)
        else:
            assert body.prompt is not None
            tokens = self._llm.tokenizer.encode(
                body.prompt, has_special_tokens=body.add_special_tokens
            )
        return {
            "tokens": tokens,
            "count": len(tokens),
            "max_model_len": self._convert.longest,
        }

    def detokenize(self, body: DetokenizeRequest) -> Body:
        """/detokenize."""
        self._check_model(body.model)
        size = self._llm.model_config.vocab_size
        for token in body.tokens:
            if token >= size:
                raise bad_request(f"token {token} is outside the vocabulary of {size}", "tokens")
        return {"prompt": self._llm.tokenizer.decode(body.tokens)}

    # Generating

    async def answer(self, body: Options) -> Body:
        """The whole response of /v1/completions or /v1/chat/completions."""
        plan = await self._plan(body)
        choices = [Choice(index) for index in range(len(plan.prompts) * plan.n)]
        async for news in self._run(plan):
            choices[news.index].add(news)
        requests = [choice.request for choice in choices if choice.request is not None]
        _check_grammars(requests)
        write = self._chat_choice if isinstance(body, ChatRequest) else self._completion_choice
        return {
            **plan.header,
            "choices": await asyncio.to_thread(lambda: [write(plan, c) for c in choices]),
            "usage": self._usage(plan, requests),
            "metrics": metrics(requests),
        }

    async def stream(self, body: Options) -> AsyncIterator[Body]:
        """The chunks of a response; closing the iterator cancels it."""
        plan = await self._plan(body)
        writer = _ChatStream if isinstance(body, ChatRequest) else _CompletionStream
        return self._chunks(plan, writer(self, plan))

    async def _chunks(self, plan: _Plan, writer: "_Stream") -> AsyncIterator[Body]:
        options = plan.body.stream_options
        has_usage = options is not None and options.include_usage
        extra = {"usage": None} if has_usage else {}
        requests = []
        for chunk in writer.begin():
            yield {**plan.header, **chunk, **extra}
        async for news in self._run(plan):
            if news.finished is not None:
                requests.append(news.finished)
                _check_grammars([news.finished])
            written = writer.write(news)
            if written is not None:
                if options is not None and options.include_origins:
                    written["speculative"] = origins(news)
                yield {**plan.header, **written, **extra}
        if has_usage:
            final = {"usage": self._usage(plan, requests), "metrics": metrics(requests)}
            yield {**plan.header, "choices": [], **final}

    async def _plan(self, body: Options) -> _Plan:
        """Read a body; what takes time is done beside the event loop."""
        self._check_model(body.model)
        if body.stream_options is not None and not body.stream:
            raise bad_request("stream_options needs stream: true", "stream_options")
        if not self.worker.is_healthy:
            raise APIError(503, f"the engine has failed: {self.worker.error!r}", code="engine_dead")
        if self.worker.is_full:
            raise APIError(429, "too many requests are waiting; try again later", code="queue_full")
        return await asyncio.to_thread(self._read, body)

    def _read(self, body: Options) -> _Plan:
        tools = self._convert.tools(body) if isinstance(body, ChatRequest) else None
        if isinstance(body, ChatRequest):
            prompts = [self._convert.chat_prompt(body.messages, tools)]
            kind, prefix = "chat.completion", "chatcmpl"
        else:
            assert isinstance(body, CompletionRequest)
            prompts = self._convert.completion_prompts(body)
            kind, prefix = "text_completion", "cmpl"
            if body.best_of not in (None, body.n or 1):
                raise bad_request("best_of must equal n: all completions are returned", "best_of")
        if len(prompts) * (body.n or 1) > MAX_PROMPTS:
            raise bad_request(f"prompts times n must be at most {MAX_PROMPTS}", "n")
        params = self._convert.params(body, max(map(len, prompts)))
        if body.stream and kind == "chat.completion":
            kind = "chat.completion.chunk"
        return _Plan(
            body,
            prompts,
            params,
            self._convert.grammar(body, tools),
            tools,
            {
                "id": f"{prefix}-{secrets.token_hex(16)}",
                "object": kind,
                "created": int(time.time()),
                "model": body.model or self.names[0],
                "system_fingerprint": None,
            },
            (body.cache_salt or "").encode(),
        )

    def _submissions(self, plan: _Plan) -> list[Submission]:
        seed = plan.params.seed if plan.params.seed is not None else secrets.randbits(64)
        return [
            Submission(
                prompt=prompt,
                params=plan.params,
                gamma=self._convert.gamma(plan.body),
                sample=sample,
                seed=seed,
                salt=plan.salt,
                grammar=plan.grammar.fresh() if plan.grammar else None,
            )
            for prompt in plan.prompts
            for sample in range(plan.n)
        ]

    async def _run(self, plan: _Plan) -> AsyncIterator[News]:
        """News of all completions of a body until the last has ended."""
        inbox: asyncio.Queue[Sequence[News] | Exception] = asyncio.Queue()
        submissions = self._submissions(plan)
        job = Job(submissions, inbox.put_nowait, inbox.put_nowait)
        num_left = len(submissions)
        self.worker.submit(job)
        try:
            while num_left:
                items = await inbox.get()
                if isinstance(items, Exception):
                    raise _api_error(items)
                for news in items:
                    num_left -= news.finished is not None
                    yield news
        finally:
            if num_left:
                self.worker.cancel(job)

    # Writing

    def _usage(self, plan: _Plan, requests: Sequence[Request]) -> Body:
        num_generated = 0 if self._is_echo_alone(plan) else sum(len(r.output) for r in requests)
        return usage(sum(map(len, plan.prompts)), requests, num_generated)

    @staticmethod
    def _is_echo_alone(plan: _Plan) -> bool:
        """Whether the one token that was generated is not wanted."""
        return isinstance(plan.body, CompletionRequest) and plan.body.max_tokens == 0

    def _chat_choice(self, plan: _Plan, choice: Choice) -> Body:
        assert choice.request is not None
        message: Body = {"role": "assistant", "content": choice.text, "refusal": None}
        reason: str | None = choice.request.finish_reason
        if plan.tools is not None:
            text, calls = ToolCallReader().push(choice.text, is_final=True)
            if calls:
                listed = [{k: v for k, v in call.items() if k != "index"} for call in calls]
                message |= {"content": text.strip() or None, "tool_calls": listed}
                reason = "tool_calls" if reason == "stop" else reason
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self.chat_logprobs(plan, choice.logprobs),
            "finish_reason": reason,
        }

    def chat_logprobs(self, plan: _Plan, entries: Sequence[Any]) -> Body | None:
        """`logprobs` of a chat choice or delta, None where they were not asked for."""
        num_top = plan.params.logprobs
        if num_top is None:
            return None
        return chat_logprobs(self._llm.tokenizer, entries, num_top)

    def _completion_choice(self, plan: _Plan, choice: Choice) -> Body:
        assert isinstance(plan.body, CompletionRequest)
        assert choice.request is not None
        is_alone = self._is_echo_alone(plan)
        text = "" if is_alone else choice.text
        logprobs = None
        if plan.params.logprobs is not None:
            shown = 0 if is_alone else len(choice.token_ids)
            logprobs = self.completion_logprobs(plan, choice, 0, shown)
        if plan.body.echo:
            text = self.echo(plan, choice.index)[0] + text
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": "length" if is_alone else choice.request.finish_reason,
        }

    def echo(self, plan: _Plan, index: int) -> tuple[str, list[int]]:
        """The prompt of a completion as text, and where each of its tokens begins there."""
        stream = TextStream(self._llm.tokenizer, ())
        for token in plan.prompts[index // plan.n]:
            stream.push(token)
        stream.finish()
        return stream.text, [0, *stream.ends[:-1]]

    def completion_logprobs(self, plan: _Plan, choice: Choice, start: int, stop: int) -> Body:
        """`logprobs` of output tokens start .. stop - 1, after those of an echoed prompt."""
        assert isinstance(plan.body, CompletionRequest)
        tokens = choice.token_ids[start:stop]
        entries: list[Any] = choice.logprobs[start:stop]
        offsets = [0, *choice.ends][start:stop]
        if plan.body.echo:
            text, begins = self.echo(plan, choice.index)
            offsets = [len(text) + offset for offset in offsets]
            if start == 0:
                prompt = plan.prompts[choice.index // plan.n]
                tokens, offsets = [*prompt, *tokens], [*begins, *offsets]
                entries = [None, *choice.prompt_logprobs, *entries]
        return completion_logprobs(self._llm.tokenizer, tokens, entries, offsets)


def _check_grammars(requests: Sequence[Request]) -> None:
    for request in requests:
        if request.grammar is not None and request.grammar.error is not None:
            raise APIError(500, f"the grammar became too complex: {request.grammar.error}")


def _api_error(error: Exception) -> APIError:
    if isinstance(error, QSpecError):
        return bad_request(str(error))
    if isinstance(error, EngineFailedError):
        return APIError(500, str(error), code="engine_dead")
    return APIError(500, f"internal error: {error!r}")


class _Stream:
    """Writes chunks of one body."""

    def __init__(self, service: Service, plan: _Plan) -> None:
        self._service, self._plan = service, plan
        self._choices = [Choice(index) for index in range(len(plan.prompts) * plan.n)]

    def begin(self) -> list[Body]:
        """Chunks before any news."""
        return []

    def write(self, news: News) -> Body | None:
        """A step's chunk, None if there is nothing to say yet."""
        raise NotImplementedError


class _ChatStream(_Stream):
    def __init__(self, service: Service, plan: _Plan) -> None:
        super().__init__(service, plan)
        self._readers = [ToolCallReader() for _ in self._choices]

    def begin(self) -> list[Body]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        choice = {"delta": delta, "logprobs": None, "finish_reason": None}
        return [{"choices": [{"index": each.index, **choice}]} for each in self._choices]

    def write(self, news: News) -> Body | None:
        text, calls = news.emission.text, list[Body]()
        reason: str | None = news.emission.finish_reason
        if self._plan.tools is not None:
            reader = self._readers[news.index]
            text, calls = reader.push(text, is_final=reason is not None)
            reason = "tool_calls" if reason == "stop" and reader.calls else reason
            text = "" if reader.calls and not text.strip() else text
        delta: Body = {"content": text} if text or (not calls and reason is None) else {}
        if calls:
            delta["tool_calls"] = calls
        logprobs = self._service.chat_logprobs(self._plan, news.logprobs)
        if not text and not calls and reason is None and logprobs is None:
            return None
        return {
            "choices": [
                {
                    "index": news.index,
                    "delta": delta,
                    "logprobs": logprobs,
                    "finish_reason": reason,
                }
            ]
        }


class _CompletionStream(_Stream):
    def __init__(self, service: Service, plan: _Plan) -> None:
        super().__init__(service, plan)
        self._has_begun = [False] * len(self._choices)

    def write(self, news: News) -> Body | None:
        plan, choice, body = self._plan, self._choices[news.index], self._plan.body
        assert isinstance(body, CompletionRequest)
        before = len(choice.token_ids)
        choice.add(news)
        is_alone = body.max_tokens == 0
        text = "" if is_alone else news.emission.text
        logprobs = None
        if plan.params.logprobs is not None:
            stop = before if is_alone else len(choice.token_ids)
            logprobs = self._service.completion_logprobs(plan, choice, before, stop)
        reason: str | None = news.emission.finish_reason
        if body.echo and not self._has_begun[news.index]:
            text = self._service.echo(plan, news.index)[0] + text
        self._has_begun[news.index] = True
        if not text and reason is None and logprobs is None:
            return None
        if is_alone and reason is not None:
            reason = "length"
        return {
            "choices": [
                {"index": news.index, "text": text, "logprobs": logprobs, "finish_reason": reason}
            ]
        }
