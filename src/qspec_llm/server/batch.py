"""OpenAI batch files without a server: a line of JSON in, a line of JSON out.

In:  {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}
Out: {"id": ..., "custom_id": ..., "response": {"status_code", "request_id", "body"}, "error": null}

Answers are written as they come, so their order may differ: `custom_id` says whose they are.
"""

import asyncio
import json
import secrets
from collections.abc import Callable, Iterator
from typing import Any, Literal, TextIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qspec_llm.errors import QSpecError
from qspec_llm.llm import LLM
from qspec_llm.server.errors import APIError, bad_request
from qspec_llm.server.metrics import Metrics
from qspec_llm.server.protocol import ChatRequest, CompletionRequest
from qspec_llm.server.service import Service
from qspec_llm.server.worker import Worker

__all__ = ["BatchLine", "read_lines", "run_batch"]

BODIES: dict[str, type[ChatRequest] | type[CompletionRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}


class BatchLine(BaseModel):
    """One request of a batch file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    custom_id: str = Field(min_length=1)
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: dict[str, Any]


def read_lines(text: str, name: str) -> list[BatchLine]:
    """The requests of a batch file; blank lines are skipped.

    Raises:
        QSpecError: a line is no request, or two have the same `custom_id`.
    """
    lines = list(_parse(text, name))
    seen: set[str] = set()
    for line in lines:
        if line.custom_id in seen:
            raise QSpecError(f"{name} has the custom_id {line.custom_id!r} twice")
        seen.add(line.custom_id)
    return lines


def _parse(text: str, name: str) -> Iterator[BatchLine]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield BatchLine.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise QSpecError(
                f"line {number} of {name}: {where + ': ' if where else ''}{first['msg']}"
            ) from None


async def run_batch(
    llm: LLM, names: list[str], lines: list[BatchLine], out: TextIO, advance: Callable[[], None]
) -> int:
    """Answer every line; returns how many were refused or failed.

    Args:
        llm: the model; its engine is used up.
        names: what the model may be called.
        lines: the requests.
        out: where answers are written, a line each.
        advance: called after each.
    """
    worker = Worker(llm.engine, asyncio.get_running_loop(), Metrics(), max_waiting=1 << 30)
    worker.start()
    service = Service(llm, worker, names)
    room = asyncio.Semaphore(4 * llm.config.max_batch)
    num_failed = 0

    async def answer(line: BatchLine) -> None:
        nonlocal num_failed
        async with room:
            status, body = await _answer(service, line)
        num_failed += status != 200
        record = {
            "id": f"batch_req_{secrets.token_hex(12)}",
            "custom_id": line.custom_id,
            "response": {
                "status_code": status,
                "request_id": f"req_{secrets.token_hex(12)}",
                "body": body,
            },
            "error": None,
        }
        out.write(json.dumps(record, ensure_ascii=False) + "\n")
        out.flush()
        advance()

    try:
        await asyncio.gather(*map(answer, lines))
    finally:
        worker.stop()
        await asyncio.to_thread(worker.join, 10.0)
    return num_failed


async def _answer(service: Service, line: BatchLine) -> tuple[int, dict[str, Any]]:
    """Status and body of one line's response."""
    try:
        body = BODIES[line.url].model_validate(line.body)
        if body.stream:
            raise bad_request("a batch has no streams", "stream")
        return 200, await service.answer(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        param = str(first["loc"][0]) if first["loc"] else None
        return 400, bad_request(f"{where}: {first['msg']}"[:1000], param).body()
    except APIError as error:
        return error.status, error.body()
