"""End-to-end decoding: plain against speculative, every target, with an A/A control."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qspec_llm.bench.measure import run_in_turn, warm_up
from qspec_llm.engine.engine import Engine, Gamma
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.request import Request

__all__ = ["TargetResult", "decode"]

ROUNDS_OF_CYCLES = 3  # of engines that take turns by the round, not by the step


@dataclass(frozen=True)
class TargetResult:
    """One target's figures.

    `aa_ratio` is plain decoding against plain decoding in the same run: how far from 1 noise alone
    may take a ratio.
    """

    plain_tokens_per_second: float
    speculative_tokens_per_second: float
    acceptance_rate: float | None
    identical: bool
    aa_ratio: float

    @property
    def speedup(self) -> float:
        """Speculative over plain."""
        return self.speculative_tokens_per_second / self.plain_tokens_per_second


def decode(
    new_engine: Callable[[Gamma], Engine],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    gamma: Gamma,
) -> TargetResult:
    """Generate the same prompts plainly, plainly again, and with drafts, in turn.

    Engines that launch cycles ahead have done it all once before, so that their times are those of
    answers alone: most of a prompt is found in the cache.

    Args:
        new_engine: makes engines over the same weights, each with a KV cache of its own.
        prompts: token ids.
        params: sampling options.
        gamma: tokens drafted in each cycle of the speculative run.
    """

    def submit(engine: Engine) -> list[Request]:
        return [engine.add(prompt, params) for prompt in prompts]

    engines = [new_engine(0), new_engine(0), new_engine(gamma)]
    warm_up(engines, submit)
    rounds = 1 if engines[0].cycles is None else ROUNDS_OF_CYCLES
    requests: list[list[Request]] = [[] for _ in engines]
    for _ in range(rounds):
        for engine, made in zip(engines, requests, strict=True):
            made += submit(engine)
        run_in_turn(engines)
    plain, again, drafted = (
        _tokens_per_second(engine, group) for engine, group in zip(engines, requests, strict=True)
    )
    num_tested = sum(request.num_tested for request in requests[2])
    num_accepted = sum(request.num_accepted for request in requests[2])
    return TargetResult(
        plain_tokens_per_second=plain,
        speculative_tokens_per_second=drafted,
        acceptance_rate=num_accepted / num_tested if num_tested else None,
        identical=[r.output for r in requests[0]] == [r.output for r in requests[2]],
        aa_ratio=again / plain,
    )


def _tokens_per_second(engine: Engine, requests: Sequence[Request]) -> float:
    return sum(len(request.output) for request in requests) / engine.seconds.total
