"""One HTTP request at the least cost to the machine that also runs the server.

A load of 16 streams is thousands of small chunks. What general clients spend on each is taken from
the kernels, whose cores they share; here a chunk costs a parser in C, a clock and a list entry, and
what the chunks say is read when the load is over.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

__all__ = ["Answer", "ask"]


@dataclass
class Answer:
    """A response: its status, and the pieces of its body with the time each came."""

    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        """All of it."""
        return b"".join(piece for _, piece in self.pieces)

    def events(self) -> list[tuple[float, dict[str, Any]]]:
        """Server-sent events that are JSON objects, each with the time its end came.

        Raises:
            ValueError: one is broken.
        """
        found, rest = [], b""
        for at, piece in self.pieces:
            *lines, rest = (rest + piece).split(b"\n")
            found += [(at, json.loads(line[6:])) for line in lines if line.startswith(b"data: {")]
        return found


class _Exchange(asyncio.Protocol):
    """A connection that carries one request."""

    def __init__(self, request: bytes, answer: Answer, done: "asyncio.Future[None]") -> None:
        self._request, self._answer, self._done = request, answer, done
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the server does not speak HTTP: {error}")

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._answer.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        if not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the server hung up: {error}" if error else "the server hung up")

    def _fail(self, reason: str) -> None:
        if not self._done.done():
            self._done.set_exception(ConnectionError(reason))


async def ask(
    url: str, body: Mapping[str, Any], headers: Mapping[str, str], timeout: float
) -> Answer:
    """POST a JSON body.

    Raises:
        OSError: the server cannot be reached, hung up, or took longer than `timeout` seconds.
    """
    where = urlsplit(url)
    is_secure = where.scheme == "https"
    port = where.port or (443 if is_secure else 80)
    data = json.dumps(body).encode()
    lines = {
        "host": where.netloc,
        "content-type": "application/json",
        "content-length": str(len(data)),
        **headers,
    }
    head = f"POST {where.path} HTTP/1.1\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    loop, answer = asyncio.get_running_loop(), Answer()
    done = loop.create_future()
    request = head.encode("latin-1") + b"\r\n" + data
    async with asyncio.timeout(timeout):
        transport, _ = await loop.create_connection(
            lambda: _Exchange(request, answer, done),
            where.hostname or "",
            port,
            ssl=is_secure or None,
        )
        try:
            await done
        finally:
            transport.close()
    return answer
