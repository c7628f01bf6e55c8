"""Which requests run in a step, and how far; then what becomes of them.

There is no prefill or decode phase. A step closes the gap between a request's known tokens and its
computed ones; where the gap is the one token just generated, drafts may follow. What a request
drafts depends on the request alone, never on the load, so a seeded request gives the same tokens
in any company.
"""

from collections import deque
from collections.abc import Sequence
from itertools import chain

from qspec_llm.engine.accept import Accepted
from qspec_llm.engine.batch import Batch, Span
from qspec_llm.engine.request import Request
from qspec_llm.kv.blocks import BlockAllocator, blocks_for

__all__ = ["Scheduler"]


class Scheduler:
    """First come, first served; when blocks run out the youngest request is recomputed later.

    Attributes:
        running: requests that hold blocks, oldest first.
        waiting: requests that hold none, in the order to admit them.
    """

    def __init__(self, blocks: BlockAllocator, max_batch: int, max_rows: int) -> None:
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self._blocks, self._max_batch, self._max_rows = blocks, max_batch, max_rows

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def abort(self, request_id: int) -> Request | None:
        """End a request wherever it is; None if it is not here (any more)."""
        for request in chain(self.running, self.waiting):
            if request.request_id == request_id:
                request.finish_reason = "abort"
                self._remove(request)
                return request
        return None

    def schedule(self) -> Batch:
        """The next step's spans: those running, oldest first, then as many waiting ones as fit."""
        num_rows = 0
        spans: list[Span] = []
        for request in tuple(self.running):
            is_preempted = request not in self.running  # an older one took its blocks
            if not is_preempted and (span := self._span(request, self._max_rows - num_rows)):
                spans.append(span)
                num_rows += len(span.tokens) + span.gamma
        while self._can_admit(num_rows):
            request = self.waiting.popleft()
            self.running.append(request)
            span = self._span(request, self._max_rows - num_rows)
            assert span is not None
            spans.append(span)
            num_rows += len(span.tokens) + span.gamma
        assert spans or not self.has_work, "a request waits for what will never come"
        return Batch(tuple(spans))

    def _can_admit(self, num_rows: int) -> bool:
        if not self.waiting or len(self.running) >= self._max_batch or num_rows >= self._max_rows:
            return False
        first = self.waiting[0]
        num_tokens = min(first.num_tokens + 1 + first.gamma, first.max_total)
        return blocks_for(num_tokens) <= self._blocks.num_free

    def _span(self, request: Request, max_rows: int) -> Span | None:
        """The rows of one request in this step, its blocks secured; None if it cannot run."""
        if max_rows <= 0:
            return None
        gap, gamma = request.num_uncomputed, 0
        # Tokens generated before a preemption are computed again first and decide nothing.
        is_recomputing = bool(request.output) and gap > 1
        num_tokens = min(gap - is_recomputing, max_rows)
        num_logits = int(num_tokens == gap)
        if request.output and gap == 1:
            gamma = min(request.gamma, request.max_total - request.num_tokens - 1)
        start = request.committed
        if not self._secure(request, start + num_tokens + gamma):
            return None
        tokens = tuple(request.tokens(start, start + num_tokens))
        return Span(request, start, tokens, num_logits, gamma)

    def _secure(self, request: Request, num_tokens: int) -> bool:
        """Give a request blocks for its first `num_tokens`, taking them from younger requests."""
        while not self._blocks.grow(request.blocks, num_tokens):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Forget a request's KV; its tokens stay and are recomputed when there is room."""
        self._blocks.release(request.blocks)
        request.committed = 0
        self.running.remove(request)
        self.waiting.appendleft(request)

    def commit(self, batch: Batch, accepted: Sequence[Accepted]) -> None:
        """Move watermarks and append tokens; finished requests give their blocks back."""
        for span, outcome in zip(batch.spans, accepted, strict=True):
            request = span.request
            request.committed = span.stop + outcome.num_accepted
            if not outcome.tokens:
                continue
            num_before = len(request.output)
            for index, token in enumerate(outcome.tokens):
                request.append(token, is_drafted=index < outcome.num_accepted)
                if request.is_finished:
                    break
            num_kept = len(request.output) - num_before
            request.logprobs.extend(outcome.logprobs[:num_kept])
            request.num_cycles += 1
            request.num_drafted += span.gamma
            request.num_tested += min(outcome.num_accepted + 1, span.gamma, num_kept)
            request.num_accepted += min(outcome.num_accepted, num_kept)
            if request.is_finished:
                self._remove(request)
        if not self.has_work:
            self._blocks.check_idle()

    def _remove(self, request: Request) -> None:
        self._blocks.release(request.blocks)
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
