"""What the engine itself accepts: speculative against plain decoding, by position in the draft."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qspec_llm.engine.engine import Engine
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.request import Request
from qspec_llm.llm import LLM

__all__ = ["Acceptance", "decode", "decode_watched"]

Advance = Callable[[int], None]  # requests that have finished since the last call


@dataclass
class Acceptance:
    """Drafted tokens that were tested and that stood, by position in the draft (from 1).

    A draft is tested only where all before it in its cycle stood.
    """

    tested: dict[int, int] = field(default_factory=dict)
    accepted: dict[int, int] = field(default_factory=dict)
    num_cycles: int = 0
    num_tokens: int = 0

    def add(self, num_tested: int, num_accepted: int) -> None:
        """Count one cycle."""
        for position in range(1, num_tested + 1):
            self.tested[position] = self.tested.get(position, 0) + 1
        for position in range(1, num_accepted + 1):
            self.accepted[position] = self.accepted.get(position, 0) + 1

    @property
    def rate(self) -> float | None:
        """Accepted of tested drafts; None where nothing was drafted."""
        num_tested = sum(self.tested.values())
        return sum(self.accepted.values()) / num_tested if num_tested else None

    @property
    def by_position(self) -> list[float]:
        """Share of the tested drafts that stood, at positions 1, 2, ..."""
        return [self.accepted.get(p, 0) / self.tested[p] for p in sorted(self.tested)]

    @property
    def tokens_per_cycle(self) -> float:
        """Output tokens a cycle."""
        return self.num_tokens / max(self.num_cycles, 1)


def decode(
    llm: LLM,
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    advance: Advance | None = None,
) -> list[Request]:
    """Complete prompts (token ids) with an engine; finished requests in their order."""
    return decode_watched(llm, engine, prompts, params, advance)[0]


def decode_watched(
    llm: LLM,
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    advance: Advance | None = None,
) -> tuple[list[Request], Acceptance]:
    """Complete prompts and count, cycle by cycle, what was tested and what stood."""
    requests = [group[0] for group in llm.submit(engine, prompts, params)]
    counts = Acceptance()
    before = [(0, 0)] * len(requests)
    num_finished = 0
    while engine.has_work:
        engine.step()
        for index, request in enumerate(requests):
            now = request.num_tested, request.num_accepted
            if now != before[index]:
                counts.add(now[0] - before[index][0], now[1] - before[index][1])
                before[index] = now
        done = sum(request.is_finished for request in requests)
        if advance is not None and done > num_finished:
            advance(done - num_finished)
        num_finished = done
    counts.num_cycles = sum(request.num_cycles for request in requests)
    counts.num_tokens = sum(len(request.output) for request in requests)
    return requests, counts
