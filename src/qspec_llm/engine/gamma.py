"""Choosing gamma before each cycle: the one, 0 included, that promises the most tokens a second.

With a request's acceptance a, gamma drafts give E = 1 + a + ... + a^gamma tokens; what a cycle of
the batch at hand costs is known from measured steps (`engine/costs`), corrected by what steps take
while serving. Requests that left gamma to the engine and agree best draft `gamma` tokens, the
others none; both numbers are chosen together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qspec_llm.engine.accept import Accepted
from qspec_llm.engine.batch import Batch
from qspec_llm.engine.corrections import Corrections, draft_shape, verify_shape
from qspec_llm.engine.costs import StepCosts
from qspec_llm.engine.request import Request

__all__ = ["TOP_GAMMA", "Acceptance", "GammaChooser", "expected_tokens"]

TOP_GAMMA = 8
LEAST_GAIN = 1.03  # of expected speed over plain decoding: less is within the noise
CHOOSE_EVERY = 16  # cycles, while the same requests run; sooner at first, when each tells much
ENOUGH_WORSE = 2  # gammas in a row that promise no more than a smaller one: larger ones will not
PROBE_SHARE = 0.01  # of the time, what single drafts may lose where none pays, to notice a change
LEAST_LOST = 0.1  # of what a probe takes, since what it saves is uncertain
OPTIMISM = 0.95  # an acceptance at which drafting must pay for a probe to be worth anything
KEPT = 0.98  # of past evidence, a draft tested: the last 50 of a request or so count
KEPT_OF_ALL = 0.995
PRIOR = 0.8  # acceptance before anything was seen
PRIOR_WEIGHT = 8.0  # drafts that the engine's own acceptance counts for in a new request
# Cycles speed up after a prompt, so the first few are plain and drafted in turn: what is compared
# is of one age.
FEW_PLAIN = 4
SOME_PLAIN = 8  # plain cycles of a size that tell what they take
# Of the time, how much plain cycles may lose where drafts pay, to notice when plain is better: the
# smaller the gain, the less a plain cycle loses and the more it may tell.
PLAIN_SHARE = 0.005
PLAIN_SHARE_AT_FIRST = 0.02  # while fewer than SOME_PLAIN were seen


@dataclass
class Acceptance:
    """Drafts tested and accepted lately."""

    tested: float = 0.0
    accepted: float = 0.0

    def add(self, tested: int, accepted: int, kept: float) -> None:
        """Note one cycle; what came before counts for a little less."""
        self.tested = self.tested * kept**tested + tested
        self.accepted = self.accepted * kept**tested + accepted

    def rate(self, prior: float) -> float:
        """The share accepted, drawn towards `prior` while little is known."""
        return (self.accepted + prior * PRIOR_WEIGHT) / (self.tested + PRIOR_WEIGHT)


def expected_tokens(acceptance: float, gamma: int) -> float:
    """Tokens that a cycle of `gamma` drafts gives, the verifier's own included."""
    return sum(acceptance**i for i in range(gamma + 1))


class GammaChooser:
    """Sets `Request.gamma` of the requests that leave it to the engine (`Request.is_auto`).

    Args:
        costs: measured step costs; None where every request brings its own gamma.
    """

    def __init__(self, costs: StepCosts | None) -> None:
        self.costs = costs
        self._all = Acceptance()
        self._each: dict[int, Acceptance] = {}
        self._corrections = Corrections()
        self._chosen_for: tuple[int, ...] = ()
        self._num_since = 0  # cycles since the last choice
        self._patience = 1  # cycles until the next
        self._num_plain = 0  # cycles since the last draft
        self._num_drafted = 0  # cycles since the last without

    @property
    def acceptance(self) -> float:
        """Chance that a tested draft is accepted, over all requests of late."""
        return self._all.rate(PRIOR)

    def least_acceptance(self) -> float | None:
        """Where one draft begins to pay for a request alone; None without step costs."""
        if self.costs is None:
            return None
        plain = self._seconds((), 1, 0, 0, 0)
        return self._seconds((), 1, 1, 1, 0) / plain - 1

    def choose(self, running: Iterable[Request]) -> None:
        """Set the gammas of the next cycle."""
        if self.costs is None:
            return
        generating = [request for request in running if request.output]
        auto = [request for request in generating if request.is_auto]
        ids = tuple(request.request_id for request in generating)
        self._num_since += 1
        is_same = ids == self._chosen_for
        if is_same and self._num_since < self._patience:
            return
        self._patience = min(2 * self._patience, CHOOSE_EVERY) if is_same else 1
        self._chosen_for, self._num_since = ids, 0
        auto.sort(key=self._rate, reverse=True)
        gain, gamma, count = self._best(generating, auto)
        if count and self._is_plain_due(len(generating), gain):
            count, self._chosen_for = 0, ()
        elif not count and self._is_probe_due(generating, auto):
            gamma, count, self._chosen_for = 1, len(auto), ()
        for index, request in enumerate(auto):
            request.gamma = gamma if index < count else 0

    def _is_plain_due(self, num_requests: int, gain: float) -> bool:
        """Whether to draft nothing although it is expected to pay, to see what that takes.

        Args:
            num_requests: of the cycle.
            gain: expected speed with drafts, in that without.
        """
        seen = self._corrections.count(verify_shape(num_requests, num_requests))
        if seen < FEW_PLAIN and self._num_drafted > 0:
            return True
        share = PLAIN_SHARE if seen >= SOME_PLAIN else PLAIN_SHARE_AT_FIRST
        return self._num_drafted * share >= 1 - 1 / gain

    def _is_probe_due(self, generating: Sequence[Request], auto: Sequence[Request]) -> bool:
        """Whether to draft one token although none is expected to pay."""
        if not auto:
            return False
        fixed = [r.gamma for r in generating if not r.is_auto]
        context = sum(request.num_tokens for request in generating) / len(generating)
        plain = self._seconds(fixed, len(auto), 0, 0, context)
        extra = self._seconds(fixed, len(auto), len(auto), 1, context) - plain
        # accepted drafts save plain steps: the nearer to paying, the less a probe loses
        saved = plain * sum(map(self._rate, auto)) / len(generating)
        lost = max(extra - saved, extra * LEAST_LOST)
        is_affordable = self._num_plain * PROBE_SHARE * plain >= lost
        return is_affordable and self._best(generating, auto, OPTIMISM)[2] > 0

    def _rate(self, request: Request) -> float:
        seen = self._each.get(request.request_id)
        return self.acceptance if seen is None else seen.rate(self.acceptance)

    def _best(
        self, generating: Sequence[Request], auto: Sequence[Request], rate: float | None = None
    ) -> tuple[float, int, int]:
        """What drafting gains, the best gamma, and how many of `auto`, the first, should draft."""
        if not auto:
            return 1.0, 0, 0
        rates = [self._rate(request) if rate is None else rate for request in auto]
        fixed = [r.gamma for r in generating if not r.is_auto]
        context = sum(request.num_tokens for request in generating) / len(generating)
        plain = len(auto) / self._seconds(fixed, len(auto), 0, 0, context)
        best, num_worse = (plain * LEAST_GAIN, 0, 0), 0
        counts = sorted({*(1 << i for i in range(len(auto).bit_length())), len(auto)})
        for gamma in range(1, TOP_GAMMA + 1):
            gains = [expected_tokens(each, gamma) - 1 for each in rates]
            for count in counts:
                tokens = len(auto) + sum(gains[:count])
                seconds = self._seconds(fixed, len(auto), count, gamma, context)
                best = max(best, (tokens / seconds, gamma, count))
            num_worse = 0 if best[1] == gamma else num_worse + 1
            if num_worse == ENOUGH_WORSE:
                break
        return best[0] / plain, best[1], best[2]

    def _seconds(
        self, fixed: Sequence[int], num_auto: int, count: int, gamma: int, context: float
    ) -> float:
        """Seconds of a cycle in which `count` of the `num_auto` requests draft `gamma` tokens."""
        assert self.costs is not None
        live = [
            count * (step < gamma) + sum(each > step for each in fixed)
            for step in range(max([gamma * (count > 0), *fixed], default=0))
        ]
        draft = sum(
            self.costs.draft_step(size, size * context) * self._corrections.of(draft_shape(size))
            for size in live
        )
        num_requests = len(fixed) + num_auto
        num_rows = num_requests + sum(live)
        verify = self.costs.verify_step(num_requests, num_rows, num_rows * context)
        return draft + verify * self._corrections.of(verify_shape(num_requests, num_rows))

    def learn(
        self, batch: Batch, accepted: Sequence[Accepted], seconds: tuple[float, float] | None
    ) -> None:
        """Note what a cycle's drafts were worth and what it took.

        Args:
            batch: the cycle's spans as scheduled, committed by now.
            accepted: their outcomes.
            seconds: of its draft steps, and of its verify step and accepting; None if unknown,
                then costs stay what they were.
        """
        self._num_plain += 1
        is_drafting = any(span.gamma for span in batch.spans)
        self._num_drafted = self._num_drafted + 1 if is_drafting else 0
        for span, outcome in zip(batch.spans, accepted, strict=True):
            request = span.request
            if span.gamma:
                self._num_plain = 0
                tested = min(outcome.num_accepted + 1, span.gamma)
                self._all.add(tested, outcome.num_accepted, KEPT_OF_ALL)
                own = self._each.setdefault(request.request_id, Acceptance())
                own.add(tested, outcome.num_accepted, KEPT)
            if request.is_finished:
                self._each.pop(request.request_id, None)
        if self.costs is not None and seconds is not None:
            self._correct(batch, *seconds)

    def forget(self, request_id: int) -> None:
        """Drop what is known of a request that was aborted."""
        self._each.pop(request_id, None)

    def _correct(self, batch: Batch, draft: float, verify: float) -> None:
        """Move the corrections towards what this cycle took, prompts aside."""
        assert self.costs is not None
        spans = batch.spans
        if not spans or any(len(span.tokens) > 1 or not span.request.output for span in spans):
            return
        if any(span.start < len(span.request.prompt) for span in spans):
            return
        context = sum(span.stop for span in spans) / len(spans)
        live = [
            sum(span.gamma > step for span in spans) for step in range(max(s.gamma for s in spans))
        ]
        num_rows = len(spans) + sum(live)
        expected = self.costs.verify_step(len(spans), num_rows, num_rows * context)
        self._corrections.tick()
        self._corrections.learn(verify_shape(len(spans), num_rows), verify / expected)
        if live:
            expected = sum(self.costs.draft_step(size, size * context) for size in live)
            self._corrections.learn(draft_shape(max(live)), draft / expected)
