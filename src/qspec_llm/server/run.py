"""Running the application under uvicorn: signals, draining, logs."""

import contextlib
import gc
import logging
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import uvicorn

from qspec_llm.llm import LLM
from qspec_llm.server.app import ServerOptions, create_app

__all__ = ["serve"]

# How long a thread may keep Python's lock while another waits for it, in seconds. By default it is
# 5 ms: half a decoding step of a small model.
SWITCH_INTERVAL = 0.0005


class _Server(uvicorn.Server):
    """The first SIGTERM or SIGINT lets what runs finish, the second ends at once."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.should_exit:
            self.force_exit = True
        else:
            logging.getLogger("qspec").info("finishing what runs; once more stops at once")
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        kinds = (signal.SIGINT, signal.SIGTERM)
        before = {kind: signal.signal(kind, self.handle_exit) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)


def serve(llm: LLM, options: ServerOptions, *, host: str, port: int, log_level: str) -> None:
    """Serve until told to stop."""
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    sys.setswitchinterval(SWITCH_INTERVAL)
    # What is loaded stays: a look through it for garbage stops everything for 100 ms at times.
    gc.collect()
    gc.freeze()
    config = uvicorn.Config(
        create_app(llm, options),
        host=host,
        port=port,
        log_config=None,
        log_level=log_level,
        access_log=log_level == "debug",
        server_header=False,
        timeout_keep_alive=75,
    )
    _Server(config).run()
