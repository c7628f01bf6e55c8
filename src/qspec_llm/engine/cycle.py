"""Whole cycles on the GPU: gamma drafts, the verify pass, acceptance and the next cycle's inputs.

A cycle of up to B requests and G drafts is one captured graph, G = 0 included. The state that it
needs and leaves (the last token and its position) stays on the GPU, so the next cycle is launched
before the results of this one are read: the host commits, emits and schedules while the GPU works,
and reads one small buffer a cycle.

What is launched ahead rests on a guess: that the same requests go on. Every result says from which
position its request started; one that does not fit what the scheduler wants now is dropped and
computed anew. Nothing needs undoing, since a cycle writes KV only past the watermark.

Requests with options that a graph does not cover take the ordinary step, in the same batch.
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from qspec_llm.engine.accept import Accepted
from qspec_llm.engine.batch import Span
from qspec_llm.engine.lottery import Options, draw, judge, tickets
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.random import Stream
from qspec_llm.engine.recorder import Recorder
from qspec_llm.engine.request import Request
from qspec_llm.kernels import LayerKV, Rows
from qspec_llm.kernels.triton.attention import SPLIT
from qspec_llm.kernels.triton.tokens import PLAN, Lines, Places, accept, choose, place, uniform
from qspec_llm.kv.blocks import BLOCK_SIZE, BlockAllocator, blocks_for
from qspec_llm.model.decoder import Decoder
from qspec_llm.weights.view import VERIFY, View

__all__ = ["Cycles", "covers"]

SPLIT_BLOCKS = SPLIT // BLOCK_SIZE  # blocks that attention takes together
# options that a graph covers or that concern the host alone; any other must have its default
HOST_OPTIONS = {"max_tokens", "stop", "stop_token_ids", "ignore_eos", "n"}
COVERED = HOST_OPTIONS | {"temperature", "top_p", "top_k", "min_p", "seed"}


def covers(params: SamplingParams) -> bool:
    """Whether a graph can decide the tokens of requests with these options."""
    others = [field.name for field in fields(params) if field.name not in COVERED]
    usual = SamplingParams()
    return all(getattr(params, name) == getattr(usual, name) for name in others)


class _Choice(IntEnum):
    """How the tokens of a cycle are chosen: one request that needs more costs all of them."""

    GREEDY = 0
    DRAWN = 1  # by temperature and min_p
    FILTERED = 2  # by top_k or top_p too, which need a sort

    @classmethod
    def of(cls, params: SamplingParams) -> "_Choice":
        """The least that these options need."""
        if params.is_greedy:
            return cls.GREEDY
        return cls.FILTERED if params.top_k > 0 or params.top_p < 1 else cls.DRAWN


@dataclass(frozen=True)
class _Shape:
    """What a graph is captured for: lines, drafts, blocks of a line's table, and the choice."""

    num_lines: int
    num_drafts: int
    num_blocks: int
    choice: _Choice


@dataclass(frozen=True)
class _Graph:
    """One captured cycle; `launch` starts it, `out` [B, W + 2] holds its results.

    `places` and `bounds` are what the graph reads and writes besides: they must live as long.
    """

    shape: _Shape
    launch: Callable[[], None]
    out: Tensor
    places: Places
    bounds: Tensor


@dataclass(frozen=True)
class _Flight:
    """A launched cycle: whose it is, with which gammas; its results arrive once it is `done`."""

    requests: tuple[Request, ...]
    gammas: tuple[int, ...]
    results: Tensor  # [B, W + 2] int64, pinned
    begun: Any
    done: Any

    def is_of(self, spans: Iterable[Span]) -> bool:
        """Whether it computes these spans' requests, as they are now."""
        now = [(span.request.request_id, span.request.gamma) for span in spans]
        then = zip((request.request_id for request in self.requests), self.gammas, strict=True)
        return list(then) == now

    def wait(self) -> list[list[int]]:
        """Its results, one list a line."""
        self.done.synchronize()
        rows: list[list[int]] = self.results.tolist()
        return rows


class Cycles:
    """Runs the cycles of those spans of a batch that graphs cover.

    Args:
        decoder: a model whose backend can be captured.
        kv: its cache.
        draft_view: the view that proposes.
        blocks: whence requests get room for a cycle that is launched ahead.
        max_batch: requests that run at once.
        chance: for benchmarks only: a draft stands by a coin with this chance, not by the verify
            view's choice.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: tuple[LayerKV, ...],
        draft_view: View,
        blocks: BlockAllocator,
        max_batch: int,
        chance: float | None = None,
    ) -> None:
        self.gpu_seconds = 0.0  # from the start to the end of every cycle that was waited for
        self._decoder, self._kv, self._draft_view = decoder, kv, draft_view
        self._blocks, self._chance = blocks, chance
        self._device = decoder.ops.device
        num_blocks = min(blocks.num_blocks, blocks_for(decoder.cos.shape[0]))
        self._max_blocks = -(-num_blocks // SPLIT_BLOCKS) * SPLIT_BLOCKS
        num_lines = _bucket(max_batch)
        self._state = self._zeros(num_lines, 2)
        self._plan = self._zeros(num_lines * (PLAN + self._max_blocks))
        self._recorder = Recorder(self._device)
        self._graphs: dict[_Shape, _Graph] = {}
        self._ahead: _Flight | None = None

    def advance(self, spans: Sequence[Span]) -> dict[int, Accepted]:
        """Run one cycle of the spans that graphs cover: outcomes by request id."""
        wanted = {span.request.request_id: span for span in spans if _is_covered(span)}
        outcomes: dict[int, Accepted] = {}
        flight, self._ahead = self._ahead, None
        with torch.inference_mode():
            if flight is not None:
                if flight.is_of(wanted.values()):
                    self._ahead = self._launch_ahead(flight.requests)
                outcomes = self._outcomes(flight, wanted)
            if fresh := [span for key, span in wanted.items() if key not in outcomes]:
                requests = tuple(span.request for span in fresh)
                state = [[span.tokens[0], span.start] for span in fresh]
                self._upload(self._state[: len(fresh)], state)
                flight = self._launch(requests)
                self._ahead = None if outcomes else self._launch_ahead(requests)
                outcomes |= self._outcomes(flight, wanted)
        assert len(outcomes) == len(wanted), "a request's blocks do not hold its cycle"
        return outcomes

    def _outcomes(self, flight: _Flight, wanted: dict[int, Span]) -> dict[int, Accepted]:
        """What a flight decided for the spans that start, and draft, as it supposed."""
        results = flight.wait()
        self.gpu_seconds += flight.begun.elapsed_time(flight.done) / 1e3
        outcomes = {}
        lines = zip(flight.requests, flight.gammas, results, strict=False)  # idle lines come last
        for request, gamma, (num_accepted, start, *tokens) in lines:
            span = wanted.get(request.request_id)
            is_live = num_accepted >= 0
            if span is not None and is_live and (span.start, request.gamma) == (start, gamma):
                tokens = tokens[: num_accepted + 1]
                outcomes[request.request_id] = Accepted(tuple(tokens), num_accepted)
        return outcomes

    def _launch_ahead(self, requests: tuple[Request, ...]) -> _Flight | None:
        """The cycle after the one being computed, unless every request ends in that one."""
        if all(request.num_tokens + 1 >= request.max_total for request in requests):
            return None
        for request in requests:
            # this cycle and the next, every draft accepted; where it fails the line sits out
            num_tokens = request.num_tokens + 2 * (request.gamma + 1)
            self._blocks.grow(request.blocks, min(num_tokens, request.max_total))
        return self._launch(requests)

    def _launch(self, requests: tuple[Request, ...]) -> _Flight:
        num_drafts = max(request.gamma for request in requests)
        longest = max(len(request.blocks) for request in requests)
        num_blocks = min(_bucket(-(-longest // SPLIT_BLOCKS)) * SPLIT_BLOCKS, self._max_blocks)
        choice = max(_Choice.of(request.params) for request in requests)
        shape = _Shape(_bucket(len(requests)), num_drafts, num_blocks, choice)
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._graphs[shape] = self._capture(shape)
        plan = [_plan(request, num_blocks) for request in requests]
        plan += [[0] * (PLAN + num_blocks)] * (shape.num_lines - len(requests))
        self._upload(self._lines(shape).plan, plan)
        begun, done = self._recorder.event(), self._recorder.event()
        begun.record()
        graph.launch()
        results = self._recorder.fetch(graph.out)
        done.record()
        gammas = tuple(request.gamma for request in requests)
        return _Flight(requests, gammas, results, begun, done)

    def _lines(self, shape: _Shape) -> Lines:
        size = shape.num_lines * (PLAN + shape.num_blocks)
        return Lines(self._state[: shape.num_lines], self._plan[:size].view(shape.num_lines, -1))

    def _capture(self, shape: _Shape) -> _Graph:
        """A graph of the cycle; capturing runs it once, with lines that are not live."""
        out = self._zeros(shape.num_lines, shape.num_drafts + 3)
        places = Places.empty(shape.num_lines, shape.num_drafts, self._device)
        bounds = torch.arange(shape.num_lines + 1, device=self._device)
        lines = self._lines(shape)
        kept = lines.plan.clone()
        lines.plan.zero_()
        cycle = self._greedy_cycle if shape.choice is _Choice.GREEDY else self._drawn_cycle
        launch = self._recorder.capture(lambda: cycle(shape, lines, places, bounds, out))
        lines.plan.copy_(kept)
        return _Graph(shape, launch, out, places, bounds)

    def _draft(self, lines: Lines, places: Places, bounds: Tensor, step: int) -> Tensor:
        """Logits [B, V] of a draft step, whose rows are in place."""
        tokens, positions, slots = places.by_step[:, step]
        rows = Rows(positions, slots, bounds, places.contexts[step], lines.tables, False)
        return self._decoder.forward(tokens, rows, self._kv, self._draft_view, None)

    def _verify(self, lines: Lines, places: Places, bounds: Tensor) -> Tensor:
        """Logits [B W, V] of the verify step; overwrites the drafts' KV."""
        width = places.by_step.shape[1]
        tokens, positions, slots = places.by_line.view(3, -1)
        contexts = places.contexts[width]
        rows = Rows(positions, slots, bounds * width, contexts, lines.tables, False)
        return self._decoder.forward(tokens, rows, self._kv, VERIFY, None)

    def _greedy_cycle(
        self, shape: _Shape, lines: Lines, places: Places, bounds: Tensor, out: Tensor
    ) -> None:
        """The most likely token each time: everything on the GPU."""
        place(lines, places, BLOCK_SIZE)
        for step in range(shape.num_drafts):
            logits = self._draft(lines, places, bounds, step)
            choose(logits, places.by_line[0, :, step + 1], places.by_step[0, step + 1])
        choices = torch.empty_like(places.by_line[0])
        choose(self._verify(lines, places, bounds), choices.view(-1))
        if self._chance is None or not shape.num_drafts:
            accept(lines, places, choices, out)
        else:
            draws = uniform(lines, shape.num_drafts, 0, Stream.ACCEPT)
            accept(lines, places, choices, out, draws, self._chance)

    def _drawn_cycle(
        self, shape: _Shape, lines: Lines, places: Places, bounds: Tensor, out: Tensor
    ) -> None:
        """Tokens are drawn, drafts accepted by speculative sampling; greedy lines among them."""
        gamma, has_filters = shape.num_drafts, shape.choice is _Choice.FILTERED
        temperature, top_p, min_p = lines.real_options
        options = Options(temperature, top_p, min_p, lines.top_k)
        place(lines, places, BLOCK_SIZE)
        proposed = []
        for step in range(gamma):
            logits = self._draft(lines, places, bounds, step)
            proposed.append(tickets(logits, options, has_filters=has_filters))
            token = draw(proposed[-1], uniform(lines, 1, step, Stream.PROPOSAL)[:, 0])
            places.by_line[0, :, step + 1] = token
            places.by_step[0, step + 1] = token
        logits = self._verify(lines, places, bounds)
        weights = tickets(logits, options.repeat(gamma + 1), has_filters=has_filters)
        weights = weights.view(shape.num_lines, gamma + 1, -1)
        drafted = places.by_line[0, :, 1:]
        num_accepted, last = judge(
            drafted,
            torch.stack(proposed, 1) if proposed else weights[:, :0],
            weights,
            places.drafts.clamp(min=0),
            uniform(lines, max(gamma, 1), 0, Stream.ACCEPT)[:, :gamma],
            uniform(lines, gamma + 1, 0, Stream.RESIDUAL),
        )
        is_live = places.drafts >= 0
        out[:, 0] = torch.where(is_live, num_accepted, -1)
        out[:, 1] = lines.state[:, 1]
        out[:, 2 : gamma + 2] = drafted
        out.scatter_(1, num_accepted[:, None] + 2, last[:, None])
        moved = torch.stack((last, lines.state[:, 1] + num_accepted + 1), 1)
        lines.state.copy_(torch.where(is_live[:, None], moved, lines.state))

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self._device)

    def _upload(self, target: Tensor, values: list[list[int]]) -> None:
        target.copy_(self._recorder.pinned(values), non_blocking=True)


def _is_covered(span: Span) -> bool:
    """Whether this span is one known token of an answer, of a request that graphs cover."""
    is_decoding = bool(span.request.output) and span.num_logits == len(span.tokens) == 1
    has_grammar = getattr(span.request, "grammar", None) is not None  # the host's to follow
    return is_decoding and not has_grammar and covers(span.request.params)


def _plan(request: Request, num_blocks: int) -> list[int]:
    """A line's plan (kernels/triton/tokens.Lines)."""
    seed = (request.seed + (1 << 63)) % (1 << 64) - (1 << 63)  # the same 64 bits
    held = len(request.blocks) * BLOCK_SIZE
    padding = [0] * (num_blocks - len(request.blocks))
    params = request.params
    reals = struct.unpack("<3q", struct.pack("<3d", params.temperature, params.top_p, params.min_p))
    counts = [request.gamma, request.max_total, held, seed, request.sample]
    return [*counts, *reals, params.top_k, *request.blocks, *padding]


def _bucket(size: int) -> int:
    """The power of two that holds `size`."""
    return 1 << (size - 1).bit_length()
