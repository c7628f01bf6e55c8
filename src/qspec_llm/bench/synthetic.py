"""Decoding at real sizes without a checkpoint: random weights, and a coin instead of acceptance.

Random weights never agree with themselves at two precisions, so whether a draft stands is drawn
with a chosen chance. Everything else is the engine's own: scheduling, graphs, KV. What comes out is
a speed and means nothing as text; whoever prints it must say so.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qspec_llm.engine.costs import COST_TOKENS, StepCosts, measure_costs
from qspec_llm.engine.engine import MAX_GAMMA, MAX_ROWS, Engine, Gamma
from qspec_llm.engine.gamma import TOP_GAMMA, expected_tokens
from qspec_llm.engine.graphs import graphs_of
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.request import Request
from qspec_llm.engine.runner import Runner
from qspec_llm.kv.blocks import blocks_for
from qspec_llm.kv.pool import allocate
from qspec_llm.model.decoder import Decoder
from qspec_llm.weights.view import View

__all__ = ["SyntheticRun", "costs_of", "synthetic_decode", "tokens_before"]

WARM_UP_STEPS = 4  # graphs are captured in the first ones


@dataclass(frozen=True)
class SyntheticRun:
    """One way of decoding: how fast, and what share of the time the GPU waited for the host."""

    batch: int
    gamma: Gamma
    tokens_per_second: float
    seconds_per_cycle: float
    tokens_per_cycle: float
    host_share: float

    def expected_speed(self, chance: float) -> float | None:
        """Tokens a second with a coin of average luck; None where the engine chose gamma."""
        if self.gamma == "auto":
            return None
        return self.batch * expected_tokens(chance, self.gamma) / self.seconds_per_cycle


class _NoText:
    """A tokenizer for tokens that mean nothing."""

    def encode(self, text: str) -> list[int]:  # noqa: ARG002
        return []

    def decode(self, token_ids: Sequence[int]) -> str:  # noqa: ARG002
        return ""

    def piece(self, token_id: int) -> str | None:  # noqa: ARG002
        return None


def tokens_before(batch: int, context: int, gamma: Gamma) -> int:
    """Most tokens that the first request makes before all prompts are read and the clock starts."""
    rows = _most_drafts(gamma) + 1
    # while the last prompt is read, all others generate
    free = max(MAX_ROWS, batch * (MAX_GAMMA + 1)) - (batch - 1) * rows
    return rows * (-(-batch * context // free) + WARM_UP_STEPS)


def _most_drafts(gamma: Gamma) -> int:
    return TOP_GAMMA if gamma == "auto" else gamma


def costs_of(decoder: Decoder, view: View, max_batch: int) -> StepCosts:
    """What the engine needs for gamma "auto"."""
    kv = allocate(decoder.config, blocks_for(COST_TOKENS), decoder.dtype, decoder.ops.device)
    return measure_costs(Runner(decoder, kv), _NoText(), view, max_batch)


def synthetic_decode(
    decoder: Decoder,
    view: View,
    *,
    batch: int,
    gamma: Gamma,
    context: int,
    num_tokens: int,
    chance: float,
    rounds: int = 1,
    costs: StepCosts | None = None,
) -> SyntheticRun:
    """Decode `batch` requests of random prompts, and time the cycles after the first ones.

    Args:
        decoder: on a backend with graphs.
        view: the view that proposes.
        batch: requests that run at once.
        gamma: tokens drafted in each cycle.
        context: tokens of each prompt.
        num_tokens: tokens of each answer, `tokens_before` the clock runs among them.
        chance: of a draft to stand.
        rounds: of other requests each, since a coin takes many cycles to be fair.
        costs: of steps, for gamma "auto".
    """
    most_drafts = _most_drafts(gamma)
    num_blocks = batch * (blocks_for(context + num_tokens) + 2)
    kv = allocate(decoder.config, num_blocks, decoder.dtype, decoder.ops.device)
    graphs = graphs_of(decoder, kv, view, batch, chance)
    assert graphs is not None, "only a backend with graphs can let a coin decide"
    engine = Engine(
        Runner(decoder, kv),
        _NoText(),
        view,
        gamma=gamma,
        max_batch=batch,
        graphs=graphs,
        costs=costs,
    )
    rng = torch.Generator().manual_seed(0)
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, seed=0)
    vocabulary = decoder.config.vocab_size
    seconds, busy, num_made, num_cycles = 0.0, 0.0, 0, 0
    for index in range(rounds):
        requests = [
            engine.add(
                torch.randint(vocabulary, (context,), generator=rng).tolist(),
                params,
                seed=index * batch + i,
            )
            for i in range(batch)
        ]
        while not all(request.output for request in requests):
            engine.step()
        for _ in range(WARM_UP_STEPS):
            engine.step()
        assert engine.cycles is not None
        started, busy_before = time.perf_counter(), engine.cycles.gpu_seconds
        num_before = _num_made(requests)
        # until the first request nears its end, so that all cycles have one shape
        while all(r.max_total - r.num_tokens > 2 * (most_drafts + 1) for r in requests):
            engine.step()
            num_cycles += 1
        seconds += time.perf_counter() - started
        busy += engine.cycles.gpu_seconds - busy_before
        num_made += _num_made(requests) - num_before
        for request in requests:
            engine.abort(request.request_id)
    return SyntheticRun(
        batch=batch,
        gamma=gamma,
        tokens_per_second=num_made / seconds,
        seconds_per_cycle=seconds / num_cycles,
        tokens_per_cycle=num_made / num_cycles / batch,
        host_share=1 - busy / seconds,
    )


def _num_made(requests: Sequence[Request]) -> int:
    return sum(len(request.output) for request in requests)
