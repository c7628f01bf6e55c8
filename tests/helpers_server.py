"""A server in this process, for tests: the real application under uvicorn, on a free port."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn

from qspec_llm.llm import LLM
from qspec_llm.server.app import ServerOptions, create_app
from qspec_llm.server.worker import Worker


class RunningServer:
    """A server and how to reach it."""

    def __init__(self, llm: LLM, options: ServerOptions) -> None:
        self.llm = llm
        self.app = create_app(llm, options)
        config = uvicorn.Config(self.app, log_config=None, timeout_graceful_shutdown=2)
        self._server = uvicorn.Server(config)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.run(self._server.serve([self._socket]))

    @property
    def worker(self) -> Worker:
        return self.app.state.service.worker

    def start(self) -> None:
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive(), "the server did not stop"
        self._socket.close()

    def wait_until_idle(self, seconds: float = 20.0) -> None:
        """Until the engine has nothing to do; then every block must have come back."""
        deadline = time.monotonic() + seconds
        while self.llm.engine.has_work or self.worker._entries or self.worker._jobs:
            assert time.monotonic() < deadline, "requests never end"
            time.sleep(0.01)
        self.llm.engine.scheduler.blocks.check_idle()


@contextlib.contextmanager
def running(llm: LLM, **options: object) -> Iterator[RunningServer]:
    """A server of a model while the context lasts."""
    server = RunningServer(llm, ServerOptions(**{"names": ["tiny"], **options}))  # type: ignore[arg-type]
    server.start()
    try:
        yield server
    finally:
        server.stop()
