"""Which requests run in a step, and how far; then what becomes of them.

There is no prefill or decode phase. A step closes the gap between a request's known tokens and its
computed ones; where the gap is the one token just generated, drafts may follow. Prompts share the
rows that generating requests leave, so a long prompt never stops an answer. A gamma that the caller
chose is never shortened by the load, so a seeded request gives the same tokens in any company.

A request begins with the published blocks that hold its first tokens (`kv/blocks`). That holds for
one that was preempted too: what nobody needed meanwhile is not computed again.
"""

from collections import deque
from collections.abc import Sequence
from itertools import chain

from qspec_llm.engine.accept import Accepted
from qspec_llm.engine.batch import Batch, Span
from qspec_llm.engine.request import Request
from qspec_llm.kv.blocks import BLOCK_SIZE, BlockAllocator

__all__ = ["Scheduler"]

SCORED_ROWS = 64  # rows a step of a prompt whose log-probabilities are wanted: each has logits


class Scheduler:
    """First come, first served; when blocks run out the youngest request is recomputed later.

    Attributes:
        running: requests that hold blocks, oldest first.
        waiting: requests that hold none, in the order to admit them.
        blocks: who holds which.
        num_preempted: how often a request lost its blocks so far.
    """

    def __init__(self, blocks: BlockAllocator, max_batch: int, max_rows: int) -> None:
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.num_preempted = 0
        self.blocks, self._max_batch, self._max_rows = blocks, max_batch, max_rows

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
        # Every answer in progress has its rows; they fit, see `Engine`. Prompts share the rest.
        free = self._max_rows - sum(1 + r.gamma for r in self.running if _is_generating(r))
        spans: list[Span] = []
        for request in tuple(self.running):
            if request not in self.running:  # an older one took its blocks
                continue
            if _is_generating(request):
                span = self._span(request, 1)
            else:
                span = self._span(request, free)
                free -= len(span.tokens) if span else 0
            spans += [span] if span else []
        while free > 0 and (found := self._find_room(free)) is not None:
            request = self.waiting.popleft()
            self._admit(request, found)
            span = self._span(request, free)
            assert span is not None
            free -= len(span.tokens) + span.gamma
            spans.append(span)
        assert spans or not self.has_work, "a request waits for what will never come"
        return Batch(tuple(spans))

    def _find_room(self, max_rows: int) -> list[int] | None:
        """The cached blocks that the next waiting request begins with; None if it has to wait."""
        if not self.waiting or len(self.running) >= self._max_batch:
            return None
        first = self.waiting[0]
        found = self._find(first)
        is_complete = bool(first.output) and len(found) * BLOCK_SIZE == first.num_tokens - 1
        if is_complete and 1 + first.gamma > max_rows:
            return None
        if self._is_being_computed(first, len(found)):
            return None
        num_tokens = min(first.num_tokens + 1 + first.gamma, first.max_total)
        return found if self.blocks.can_hold(found, num_tokens) else None

    def _find(self, request: Request) -> list[int]:
        """Published blocks that a request can begin with; at least one token is left to compute."""
        if request.is_scoring:
            return []  # the logits of every prompt position are wanted
        return self.blocks.find(request.block_keys()[: (request.num_tokens - 1) // BLOCK_SIZE])

    def _is_being_computed(self, request: Request, num_found: int) -> bool:
        """Whether a running request is at the block that this one would have to compute next.

        Completions of one prompt then wait until it has been computed once.
        """
        keys = request.block_keys()[num_found : (request.num_tokens - 1) // BLOCK_SIZE]
        if request.is_scoring or not keys:
            return False
        return any(
            keys[0] in other.block_keys()[other.committed // BLOCK_SIZE :]
            for other in self.running
            if not _is_generating(other)
        )

    def _admit(self, request: Request, found: Sequence[int]) -> None:
        self.blocks.share(request.blocks, found)
        request.committed = len(found) * BLOCK_SIZE
        if not request.output:
            request.num_cached = request.committed
        self.running.append(request)

    def _span(self, request: Request, max_rows: int) -> Span | None:
        """The rows of one request in this step, its blocks secured; None if it cannot run."""
        if max_rows <= 0:
            return None
        gap, gamma = request.num_uncomputed, 0
        # Tokens generated before a preemption are computed again first and decide nothing.
        is_recomputing = bool(request.output) and gap > 1
        max_rows = min(max_rows, SCORED_ROWS) if request.is_scoring else max_rows
        num_tokens = min(gap - is_recomputing, max_rows)
        num_logits = int(num_tokens == gap)
        if request.output and gap == 1:
            gamma = min(request.gamma, request.max_total - request.num_tokens - 1)
        start = request.committed
        if not self._secure(request, start + num_tokens + gamma):
            return None
        tokens = tuple(request.tokens(start, start + num_tokens))
        num_scored = self._num_scored(request, start + num_tokens)
        return Span(request, start, tokens, num_logits + num_scored, gamma, num_scored)

    @staticmethod
    def _num_scored(request: Request, stop: int) -> int:
        """How many rows of a span up to `stop` say how likely the next prompt token was."""
        if not request.is_scoring:
            return 0
        first = max(request.committed, len(request.prompt_logprobs))  # the rest before a preemption
        return max(min(stop, len(request.prompt) - 1) - first, 0)

    def _secure(self, request: Request, num_tokens: int) -> bool:
        """Give a request blocks for its first `num_tokens`, taking them from younger requests."""
        while not self.blocks.grow(request.blocks, num_tokens):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Forget a request's KV; its tokens stay and are recomputed when there is room."""
        self.num_preempted += 1
        self.blocks.release(request.blocks)
        request.committed = 0
        self.running.remove(request)
        self.waiting.appendleft(request)

    def commit(self, batch: Batch, accepted: Sequence[Accepted]) -> None:
        """Move watermarks and append tokens; finished requests give their blocks back."""
        for span, outcome in zip(batch.spans, accepted, strict=True):
            request = span.request
            num_full = request.committed // BLOCK_SIZE
            request.committed = span.stop + outcome.num_accepted
            request.prompt_logprobs.extend(outcome.prompt_logprobs)
            if not outcome.tokens:
                self._publish(request, num_full)
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
            num_accepted = min(outcome.num_accepted, num_kept)
            request.num_accepted += num_accepted
            if span.gamma:
                counts = request.cycles_by_accepted
                counts[num_accepted] = counts.get(num_accepted, 0) + 1
            self._publish(request, num_full)
            if request.is_finished:
                request.text.finish()
                self._remove(request)
        if not self.has_work:
            self.blocks.check_idle()

    def _publish(self, request: Request, num_full: int) -> None:
        """Let the blocks be found that filled up below the watermark; `num_full` did before.

        A draft that was accepted behind the end of an answer is no token of it.
        """
        stop = min(request.committed, request.num_tokens) // BLOCK_SIZE
        if stop > num_full:
            for index, key in enumerate(request.block_keys()[num_full:stop], num_full):
                self.blocks.publish(request.blocks[index], key)

    def _remove(self, request: Request) -> None:
        self.blocks.release(request.blocks)
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)


def _is_generating(request: Request) -> bool:
    """Whether the token generated last is all that is left to compute."""
    return bool(request.output) and request.num_uncomputed == 1
