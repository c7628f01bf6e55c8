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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from qspec_llm.engine.emit import Emission
from qspec_llm.engine.engine import Engine
from qspec_llm.engine.request import Request
from qspec_llm.errors import QSpecError
from qspec_llm.server.jobs import EngineFailedError, Job, News
from qspec_llm.server.metrics import Metrics

__all__ = ["Worker"]

logger = logging.getLogger("qspec")

# A chunk costs some 100 us of the cores that the kernels share, in this process and the client's.
# Where many answers grow at once and steps are short, news of several steps travel together.
MANY_RUNNING = 4  # requests
DELIVER_EVERY = 0.025  # seconds; what begins or ends an answer waits for nothing


@dataclass(eq=False)
class _Entry:
    """A request in flight."""

    job: Job
    index: int
    request: Request
    arrived: float
    started: float | None = None
    last_token: float | None = None
    num_drafted: int = 0
    num_cycles: int = 0


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
        self._news: dict[Job, dict[int, News]] = {}  # to deliver, by completion
        self._delivered = 0.0  # when news went out last

    @property
    def is_healthy(self) -> bool:
        """Whether the engine takes requests."""
        return self.error is None and self.is_alive()

    @property
    def is_full(self) -> bool:
        """Whether so many completions wait that more should be refused."""
        return len(self._queued) >= self._max_waiting

    def submit(self, job: Job) -> None:
        """Queue a job; its completions are refused together or taken together."""
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
        is_waiting = not self._engine.has_work
        while True:
            try:
                command = self._commands.get(block=is_waiting)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            is_waiting = not self._engine.has_work

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
        self._jobs.discard(job)
        self._news.pop(job, None)
        self._metrics.state(self._engine)

    def _forget(self, request: Request) -> None:
        self._entries.pop(request.request_id, None)
        self._queued.pop(request.request_id, None)

    def _step(self) -> None:
        emissions = self._engine.step()
        now = time.perf_counter()
        for entry in [entry for entry in self._queued.values() if entry.request.committed]:
            entry.started = now
            del self._queued[entry.request.request_id]
            self._metrics.started(now - entry.arrived, entry.request)
        is_urgent = len(self._engine.scheduler.running) < MANY_RUNNING
        for emission in emissions:
            entry = self._entries[emission.request_id]
            is_urgent |= entry.last_token is None or entry.request.is_finished
            self._note(entry, emission, now)
            waiting, new = self._news.setdefault(entry.job, {}), _news(entry, emission)
            before = waiting.get(entry.index)
            waiting[entry.index] = new if before is None else before.then(new)
            if entry.request.is_finished:
                self._forget(entry.request)
                if all(request.is_finished for request in entry.job.requests):
                    self._jobs.discard(entry.job)
        self._metrics.state(self._engine)
        if self._news and (is_urgent or now - self._delivered >= DELIVER_EVERY):
            self._post(partial(_deliver, self._news))
            self._news, self._delivered = {}, now

    def _note(self, entry: _Entry, emission: Emission, now: float) -> None:
        """Tell the metrics what one request did in this step."""
        request, metrics = entry.request, self._metrics
        num_drafted = request.num_drafted - entry.num_drafted
        entry.num_drafted = request.num_drafted
        metrics.cycle(num_drafted, emission.num_drafted, len(emission.token_ids))
        if entry.last_token is None:
            metrics.first_token(now - entry.arrived)
        else:
            metrics.tokens((now - entry.last_token), len(emission.token_ids))
        entry.last_token = now
        if request.finish_reason:
            metrics.finished(request.finish_reason, now - entry.arrived)

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


def _news(entry: _Entry, emission: Emission) -> News:
    request, num_new = entry.request, len(emission.token_ids)
    stop = len(request.output)
    return News(
        entry.index,
        emission,
        tuple(request.logprobs[stop - num_new : stop]),
        tuple(request.prompt_logprobs) if stop == num_new else (),
        tuple(request.text.ends[stop - num_new : stop]),
        request.gamma,
        request if request.is_finished else None,
    )


def _deliver(news: dict[Job, dict[int, News]]) -> None:
    for job, items in news.items():
        if not job.is_cancelled:
            job.on_news(list(items.values()))
