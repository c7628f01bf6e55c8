"""The thread that owns the engine. Nobody else touches it.

Requests and cancellations come in through a queue; news goes out to callbacks on the event loop,
all of a step's, or of a few short steps', in one hop. If the engine fails, everything in flight is
told so and nothing more is taken: a cache in an unknown state answers no one.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from qspec_llm.engine.emit import emit
from qspec_llm.engine.engine import Engine
from qspec_llm.engine.request import Request
from qspec_llm.errors import QSpecError
from qspec_llm.server.jobs import EngineFailedError, Job, News
from qspec_llm.server.metrics import Metrics

__all__ = ["Worker"]

logger = logging.getLogger("qspec")

# Where many answers grow at once and steps are short, news of several steps travel together: a
# chunk costs the cores that the kernels share, in this process and the client's.
MANY_RUNNING = 4  # requests
CHUNK_SECONDS = 100e-6  # of a core, measured with SmolLM2 on two cores
CHUNK_SHARE = 0.025  # of the time, what chunks may take
LONGEST_WAIT = 0.1  # seconds; what begins or ends an answer waits for nothing
# Requests that come together begin together: the first step after a rest waits so long for those
# that are being read. Nobody waits for a client alone.
GATHER_SECONDS = 0.005


@dataclass(eq=False)
class _Entry:
    """A request in flight."""

    job: Job
    index: int
    request: Request
    arrived: float
    last_token: float | None = None
    num_told: int = 0  # output tokens that news were given of
    # by the step before
    num_drafted: int = 0
    num_accepted: int = 0


class Worker(threading.Thread):
    """Steps the engine while there is work, sleeps while there is none.

    Args:
        engine: owned by this thread from `start` on.
        loop: where callbacks run.
        metrics: told of every step.
        max_waiting: completions in flight beyond those that run; more are refused.
    """

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        metrics: Metrics,
        max_waiting: int = 1024,
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self.error: BaseException | None = None
        self._engine, self._loop, self._metrics = engine, loop, metrics
        self._max_waiting = max_waiting
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._entries: dict[int, _Entry] = {}
        self._queued: dict[int, _Entry] = {}  # of them, those that have not begun
        self._jobs: set[Job] = set()  # submitted, not ended
        self._grown: dict[int, _Entry] = {}  # those with news to deliver
        self._delivered = 0.0  # when news went out last
        # when requests came that are being read; wrong ones fall out as others come
        self._reading: deque[float] = deque(maxlen=max(max_waiting, 1))

    @property
    def is_healthy(self) -> bool:
        """Whether the engine takes requests."""
        return self.error is None and self.is_alive()

    @property
    def is_full(self) -> bool:
        """Whether so many completions wait that more should be refused."""
        return len(self._queued) >= self._max_waiting

    def expect(self) -> None:
        """Say that a request is being read, and will be submitted unless it is wrong."""
        self._reading.append(time.perf_counter())

    def submit(self, job: Job) -> None:
        """Queue a job; its completions are refused together or taken together."""
        if self._reading:
            self._reading.popleft()
        self._commands.put(partial(self._add, job))

    def cancel(self, job: Job) -> None:
        """End a job's completions, wherever they are; news on its way is dropped."""
        job.is_cancelled = True
        self._commands.put(partial(self._abort, job))

    def stop(self) -> None:
        """End the thread after the step at hand."""
        self._commands.put(None)

    def run(self) -> None:
        """The thread itself."""
        try:
            while self._obey():
                if self._engine.has_work:
                    self._step()
        except BaseException as error:  # whatever it was, those in flight must hear of it
            logger.exception("the engine failed")
            self._fail(error)
        else:
            self._fail(None)

    def _obey(self) -> bool:
        """Carry out what was asked; waits if there is nothing else to do. False: stop."""
        gathering_until = 0.0
        while True:
            is_idle = not self._engine.has_work
            left = gathering_until - time.perf_counter()
            must_wait = is_idle or (left > 0 and self._is_expecting())
            try:
                command = self._commands.get(must_wait, None if is_idle else max(left, 0.0))
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            if is_idle:
                gathering_until = time.perf_counter() + GATHER_SECONDS

    def _is_expecting(self) -> bool:
        """Whether a request that came a moment ago is still being read."""
        return bool(self._reading) and time.perf_counter() - self._reading[-1] < GATHER_SECONDS

    def _add(self, job: Job) -> None:
        self._jobs.add(job)
        if job.is_cancelled:
            self._jobs.discard(job)
            return
        now = time.perf_counter()
        try:
            for each in job.submissions:
                request = self._engine.add(
                    each.prompt,
                    each.params,
                    gamma=each.gamma,
                    sample=each.sample,
                    seed=each.seed,
                    salt=each.salt,
                    grammar=each.grammar,
                )
                job.requests.append(request)
        except Exception as error:
            if not isinstance(error, QSpecError):
                logger.exception("a request could not be taken")
            self._abort(job)
            self._post(partial(job.on_failure, error))
            return
        for index, request in enumerate(job.requests):
            entry = _Entry(job, index, request, now)
            self._entries[request.request_id] = self._queued[request.request_id] = entry

    def _abort(self, job: Job) -> None:
        for request in job.requests:
            if self._engine.abort(request.request_id) is not None:
                self._metrics.finished("abort")
            self._forget(request)
            self._grown.pop(request.request_id, None)
        self._jobs.discard(job)
        self._metrics.state(self._engine)

    def _forget(self, request: Request) -> None:
        self._entries.pop(request.request_id, None)
        self._queued.pop(request.request_id, None)

    def _step(self) -> None:
        grown = self._engine.advance()
        now = time.perf_counter()
        for entry in [entry for entry in self._queued.values() if entry.request.committed]:
            del self._queued[entry.request.request_id]
            self._metrics.started(now - entry.arrived, entry.request)
        num_running = len(self._engine.scheduler.running)
        is_urgent = num_running < MANY_RUNNING
        for request, num_before in grown:
            entry = self._grown[request.request_id] = self._entries[request.request_id]
            is_urgent |= entry.last_token is None or request.is_finished
            self._note(entry, len(request.output) - num_before, now)
            if request.is_finished:
                self._forget(request)
                if all(each.is_finished for each in entry.job.requests):
                    self._jobs.discard(entry.job)
        self._metrics.state(self._engine)
        wait = min(num_running * CHUNK_SECONDS / CHUNK_SHARE, LONGEST_WAIT)
        if self._grown and (is_urgent or now - self._delivered >= wait):
            self._deliver()
            self._delivered = now

    def _note(self, entry: _Entry, num_new: int, now: float) -> None:
        """Tell the metrics what one request did in this step."""
        request, metrics = entry.request, self._metrics
        num_drafted = request.num_drafted - entry.num_drafted
        metrics.cycle(num_drafted, request.num_accepted - entry.num_accepted, num_new)
        entry.num_drafted, entry.num_accepted = request.num_drafted, request.num_accepted
        if entry.last_token is None:
            metrics.first_token(now - entry.arrived)
        else:
            metrics.tokens((now - entry.last_token), num_new)
        entry.last_token = now
        if request.finish_reason:
            metrics.finished(request.finish_reason, now - entry.arrived)

    def _deliver(self) -> None:
        """Hand out what happened since the last time, to all in one hop."""
        news: dict[Job, list[News]] = {}
        for entry in self._grown.values():
            news.setdefault(entry.job, []).append(_news(entry))
        self._grown.clear()
        self._post(partial(_hand_out, news))

    def _fail(self, error: BaseException | None) -> None:
        """Tell everything in flight, and what is asked from now on, that it is over."""
        self.error = error
        text = "the server is stopping" if error is None else f"the engine failed: {error!r}"
        while True:
            for job in self._jobs:
                self._post(partial(job.on_failure, EngineFailedError(text)))
            self._jobs.clear()
            self._entries.clear()
            self._queued.clear()
            self._grown.clear()
            try:
                command = self._commands.get(block=error is not None)
            except queue.Empty:  # stopped on purpose: nobody will ask any more
                return
            if command is None:
                return
            if isinstance(command, partial) and command.func == self._add:
                self._jobs.add(command.args[0])

    def _post(self, call: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is closed: nobody listens
            logger.debug("news for a closed event loop")


def _news(entry: _Entry) -> News:
    """What is new since the last news of a completion; text becomes certain once."""
    request, start = entry.request, entry.num_told
    entry.num_told = len(request.output)
    return News(
        entry.index,
        emit(request, start),
        tuple(request.logprobs[start:]),
        tuple(request.prompt_logprobs) if start == 0 else (),
        tuple(request.text.ends[start:]),
        request.gamma,
        request if request.is_finished else None,
    )


def _hand_out(news: dict[Job, list[News]]) -> None:
    for job, items in news.items():
        if not job.is_cancelled:
            job.on_news(items)
