"""The HTTP application: routes, keys, limits, errors in OpenAI's shape, server-sent events."""

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from qspec_llm.llm import LLM
from qspec_llm.server.errors import APIError, bad_request
from qspec_llm.server.metrics import Metrics
from qspec_llm.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Options,
    TokenizeRequest,
)
from qspec_llm.server.service import Service
from qspec_llm.server.worker import Worker
from qspec_llm.version import __version__

__all__ = ["ServerOptions", "create_app"]

logger = logging.getLogger("qspec")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

# A page of the same origin, a load balancer and a scraper have no key.
OPEN_PATHS = frozenset({"/", "/health", "/version", "/metrics"})
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for status, text in (
        (400, "a wrong option"),
        (401, "no valid key"),
        (404, "no such model"),
        (413, "the body is too large"),
        (429, "too many requests wait"),
        (500, "the engine failed"),
        (503, "the engine has failed"),
    )
}
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How to serve.

    Attributes:
        names: what the model is called, the first in responses.
        api_keys: any of them opens the server; empty for an open one.
        max_waiting: completions that may wait for a place.
        max_body_bytes: of a request.
    """

    names: Sequence[str]
    api_keys: Sequence[str] = ()
    max_waiting: int = 1024
    max_body_bytes: int = 4 << 20


def create_app(llm: LLM, options: ServerOptions) -> FastAPI:
    """The application; the engine's thread lives as long as its lifespan."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        worker = Worker(llm.engine, loop, metrics, options.max_waiting)
        worker.start()
        app.state.service = Service(llm, worker, options.names)
        app.state.service.prepare()
        yield
        worker.stop()
        await asyncio.to_thread(worker.join, 10.0)

    app = FastAPI(
        title="QSpec", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.metrics = metrics
    _add_error_handlers(app)
    _add_information(app)
    _add_generation(app)
    _describe_errors(app)
    app.add_middleware(_Guard, options=options)
    return app


def _describe_errors(app: FastAPI) -> None:
    """Put the error's schema where the routes' descriptions point to."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        schema = describe()
        schema.setdefault("components", {}).setdefault("schemas", {})["Error"] = ERROR_SCHEMA
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # what FastAPI says; ours is a 400
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _error(error: APIError) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(APIError)
    async def api_error(_: Request, error: APIError) -> JSONResponse:
        return _error(error)

    @app.exception_handler(RequestValidationError)
    async def wrong_body(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        # "body", then names of fields and of the alternatives that were tried
        path = [part for part in first["loc"][1:] if isinstance(part, str | int)]
        param = str(path[0]) if path and isinstance(path[0], str) else None
        where = ".".join(str(part) for part in path)
        text = f"{where}: {first['msg']}" if where else f"the body: {first['msg']}"
        if first["type"] == "extra_forbidden":
            text = f"{where} is no option here"
        elif not path and first["type"] in ("missing", "model_attributes_type"):
            text = "the body must be a JSON object, sent as application/json"
        return _error(bad_request(text[:1000], param))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        text = str(error.detail)
        if error.status_code == 404:
            text = f"there is no {request.url.path[:200]} here"
        if error.status_code == 405:
            text = f"{request.method} does not work on {request.url.path[:200]}"
        response = _error(APIError(error.status_code, text))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def any_error(_: Request, error: Exception) -> JSONResponse:
        logger.exception("a request failed", exc_info=error)
        return _error(APIError(500, "internal error"))


def _add_information(app: FastAPI) -> None:
    page = resources.files("qspec_llm.server").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        policy += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> dict[str, str]:
        worker: Worker = app.state.service.worker
        if not worker.is_healthy:
            raise APIError(503, f"the engine has failed: {worker.error!r}", code="engine_dead")
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(app.state.metrics.render(), media_type="text/plain; version=0.0.4")

    some: dict[int | str, dict[str, Any]] = {
        status: ERRORS[status] for status in (400, 401, 404, 413)
    }

    @app.get("/v1/models", responses=some)
    async def models() -> dict[str, Any]:
        return app.state.service.models()  # type: ignore[no-any-return]

    @app.get("/v1/models/{name:path}", responses=some)
    async def model(name: str) -> dict[str, Any]:
        return app.state.service.model(name)  # type: ignore[no-any-return]

    @app.post("/tokenize", responses=some)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        return await asyncio.to_thread(app.state.service.tokenize, body)

    @app.post("/detokenize", responses=some)
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        return await asyncio.to_thread(app.state.service.detokenize, body)


def _add_generation(app: FastAPI) -> None:
    @app.post("/v1/chat/completions", responses=ERRORS, response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _generate(app.state.service, body, request)

    @app.post("/v1/completions", responses=ERRORS, response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _generate(app.state.service, body, request)


async def _generate(service: Service, body: Options, request: Request) -> Response:
    if body.stream:
        chunks = await service.stream(body)
        return StreamingResponse(_events(chunks), media_type="text/event-stream")
    answer = asyncio.create_task(service.answer(body))
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(answer.result())
    finally:
        answer.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    """Return once the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """Chunks as server-sent events; the client's going closes `chunks`, which cancels its work."""
    try:
        async for chunk in chunks:
            yield f"data: {chunk}\n\n"
        yield "data: [DONE]\n\n"
    except APIError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    finally:
        await chunks.aclose()  # type: ignore[attr-defined]


class _Guard:
    """Before any route: the key, and the size of the body as it comes."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app, self._limit = app, options.max_body_bytes
        self._keys = [key.encode() for key in options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._keys and scope["path"] not in OPEN_PATHS and not self._has_key(headers):
            error = APIError(401, "the API key is missing or wrong", code="invalid_api_key")
            await _error(error)(scope, receive, send)
            return
        too_large = APIError(413, f"the body is longer than {self._limit} bytes")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._limit:
            await _error(too_large)(scope, receive, send)
            return
        num_read = 0

        async def counted() -> Message:
            nonlocal num_read
            message = await receive()
            num_read += len(message.get("body", b""))
            if num_read > self._limit:
                raise HTTPException(413, too_large.message)
            return message

        await self._app(scope, counted, send)

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        """Compared in constant time, every key, whether one was right already or not."""
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        found = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return kind.lower() == b"bearer" and any(found)
