"""What the endpoints do, without HTTP: a body in; a response, or the chunks of one, out."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence

from qspec_llm.engine.request import Request
from qspec_llm.errors import QSpecError
from qspec_llm.llm import LLM
from qspec_llm.server.convert import MAX_PROMPTS, Converter
from qspec_llm.server.errors import APIError, bad_request
from qspec_llm.server.jobs import EngineFailedError, Job, News, Submission
from qspec_llm.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Options,
    TokenizeRequest,
)
from qspec_llm.server.responses import Body, Choice, metrics, origins, usage
from qspec_llm.server.worker import Worker
from qspec_llm.server.writers import Plan, Writer, echo, writer_of

__all__ = ["Service"]


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

    def prepare(self) -> None:
        """Do what would hold up everybody when the first request needs it."""
        self._convert.prepare()

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
        write = writer_of(self._llm.tokenizer, plan).whole
        return {
            **plan.header,
            "choices": await asyncio.to_thread(lambda: [write(choice) for choice in choices]),
            "usage": _usage(plan, requests),
            "metrics": metrics(requests),
        }

    async def stream(self, body: Options) -> AsyncIterator[str]:
        """The chunks of a response as JSON; closing the iterator cancels it."""
        plan = await self._plan(body)
        return self._chunks(plan, writer_of(self._llm.tokenizer, plan))

    async def _chunks(self, plan: Plan, writer: Writer) -> AsyncIterator[str]:
        options = plan.body.stream_options
        has_usage = options is not None and options.include_usage
        has_origins = options is not None and options.include_origins
        header = _json({**plan.header, **({"usage": None} if has_usage else {})})[:-1]
        requests = []
        for chunk in writer.begin():
            yield f"{header},{_json(chunk)[1:]}"
        async for news in self._run(plan):
            if news.finished is not None:
                requests.append(news.finished)
                _check_grammars([news.finished])
            written = writer.chunk(news)
            if written is not None:
                if has_origins:
                    written["speculative"] = origins(news)
                yield f"{header},{_json(written)[1:]}"
        if has_usage:
            final = {"usage": _usage(plan, requests), "metrics": metrics(requests)}
            yield _json({**plan.header, "choices": [], **final})

    async def _plan(self, body: Options) -> Plan:
        """Read a body; what takes time is done beside the event loop."""
        self._check_model(body.model)
        if body.stream_options is not None and not body.stream:
            raise bad_request("stream_options needs stream: true", "stream_options")
        if not self.worker.is_healthy:
            raise APIError(503, f"the engine has failed: {self.worker.error!r}", code="engine_dead")
        if self.worker.is_full:
            raise APIError(429, "too many requests are waiting; try again later", code="queue_full")
        self.worker.expect()
        return await asyncio.to_thread(self._read, body)

    def _read(self, body: Options) -> Plan:
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
        is_echoing = isinstance(body, CompletionRequest) and body.echo
        return Plan(
            body=body,
            prompts=prompts,
            params=params,
            grammar=self._convert.grammar(body, tools),
            tools=tools,
            header={
                "id": f"{prefix}-{secrets.token_hex(16)}",
                "object": kind,
                "created": int(time.time()),
                "model": body.model or self.names[0],
                "system_fingerprint": None,
            },
            salt=(body.cache_salt or "").encode(),
            echoes=[echo(self._llm.tokenizer, each) for each in prompts] if is_echoing else [],
        )

    def _submissions(self, plan: Plan) -> list[Submission]:
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

    async def _run(self, plan: Plan) -> AsyncIterator[News]:
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


def _usage(plan: Plan, requests: Sequence[Request]) -> Body:
    num_generated = 0 if plan.is_echo_alone else sum(len(r.output) for r in requests)
    return usage(sum(map(len, plan.prompts)), requests, num_generated)


_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


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
