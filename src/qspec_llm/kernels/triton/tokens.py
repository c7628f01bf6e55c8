"""What stands between two forward passes of a cycle: where rows sit, the choice, and acceptance.

A cycle advances B sequences, the lines, by up to G drafts and a token each. A line's state is its
last known token, that token's position, how many tokens may be drafted, at how many tokens it ends
and how many its blocks hold. A line is live while it is below its end and its blocks hold all that
the cycle may write; the others are computed with the rest and change nothing.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qspec_llm.kernels.triton.launch import next_power, options, start

__all__ = ["PLAN", "Lines", "Places", "accept", "choose", "place", "uniform"]

CHUNK = 4096  # logits of one program
PLAN = 9  # entries of a line's plan before its blocks
MAX_ROWS = 1 << 14  # rows of one launch of `choose`


@dataclass(frozen=True)
class Lines:
    """State of B sequences.

    Attributes:
        state: [B, 2] int64: the last known token, and its position. All before it is final.
        plan: [B, 9 + blocks] int64: tokens to draft, tokens at which the sequence ends, tokens that
            its blocks hold, its seed's 64 bits, which completion it is; float64 bits of its
            temperature, top_p and min_p; its top_k; then its blocks.
    """

    state: Tensor
    plan: Tensor

    @property
    def tables(self) -> Tensor:
        """[B, blocks] int64."""
        return self.plan[:, PLAN:]

    @property
    def real_options(self) -> Tensor:
        """[3, B] float64: temperature, top_p, min_p."""
        return self.plan[:, 5:8].T.contiguous().view(torch.float64)

    @property
    def top_k(self) -> Tensor:
        """[B] int64."""
        return self.plan[:, 8]


@dataclass(frozen=True)
class Places:
    """Where the rows of one cycle sit; W = G + 1.

    Attributes:
        by_line: [3, B, W] int64: tokens (the last known one, then drafts), positions, slots.
        by_step: [3, W, B] int64: the same, a draft step's rows side by side.
        contexts: [W + 1, B] int64: keys seen in each draft step; at last, in the verify step.
        drafts: [B] int64, drafts that count, -1 for a line that is not live.
    """

    by_line: Tensor
    by_step: Tensor
    contexts: Tensor
    drafts: Tensor

    @classmethod
    def empty(cls, num_lines: int, num_drafts: int, device: torch.device) -> "Places":
        """Room for the rows of a cycle."""
        width = num_drafts + 1

        def room(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return cls(
            room(3, num_lines, width),
            room(3, width, num_lines),
            room(width + 1, num_lines),
            room(num_lines),
        )


@triton.jit
def _place_kernel(
    state, plan, stride, by_line, by_step, contexts, drafts, num_lines,
    PLAN: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    line = tl.arange(0, BLOCK)
    is_in = line < num_lines
    mine = plan + line * stride
    start(OVERLAP)
    last = tl.load(state + 2 * line + 1, is_in, other=0)
    room = tl.load(mine + 1, is_in, other=0) - last - 2  # drafts before the last token
    num_drafts = tl.minimum(tl.load(mine, is_in, other=0), tl.minimum(room, WIDTH - 1))
    is_live = is_in & (room >= 0) & (last + 1 + num_drafts <= tl.load(mine + 2, is_in, other=0))
    tl.store(drafts + line, tl.where(is_live, num_drafts, -1), is_in)
    known = tl.load(state + 2 * line, is_in, other=0)
    tl.store(by_line + line * WIDTH, known, is_in)
    tl.store(by_step + line, known, is_in)
    size = num_lines * WIDTH
    for step in tl.static_range(WIDTH):
        is_row = is_live & (step <= num_drafts)
        at = last + step
        block = tl.load(mine + PLAN + at // BLOCK_SIZE, is_row, other=0)
        slot = tl.where(is_row, block * BLOCK_SIZE + at % BLOCK_SIZE, -1)
        at = tl.where(is_row, at, 0)
        tl.store(by_line + size + line * WIDTH + step, at, is_in)
        tl.store(by_line + 2 * size + line * WIDTH + step, slot, is_in)
        tl.store(by_step + size + step * num_lines + line, at, is_in)
        tl.store(by_step + 2 * size + step * num_lines + line, slot, is_in)
        tl.store(contexts + step * num_lines + line, tl.where(is_row, at + 1, 0), is_in)
    whole = tl.where(is_live, last + num_drafts + 1, 0)
    tl.store(contexts + size + line, whole, is_in)


def place(lines: Lines, places: Places, block_size: int) -> None:
    """Lay out the rows of a cycle; drafted tokens come later."""
    width, num_lines = places.by_step.shape[1:]
    _place_kernel[(1,)](
        lines.state, lines.plan, lines.plan.stride(0), places.by_line, places.by_step,
        places.contexts, places.drafts, num_lines,
        PLAN=PLAN, WIDTH=width, BLOCK=next_power(num_lines), BLOCK_SIZE=block_size, **options(1),
    )  # fmt: skip


@triton.jit
def _choose_kernel(
    logits, tops, indices, counters, first, first_stride, second, second_stride, num_cols,
    CHUNK: tl.constexpr, NUM_CHUNKS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    col = chunk * CHUNK + tl.arange(0, CHUNK)
    start(OVERLAP)
    value = tl.load(logits + row * num_cols + col, col < num_cols, other=float("-inf"))
    top = tl.max(value, 0)
    index = tl.min(tl.where(value == top, col, num_cols - 1), 0)
    tl.store(tops + row * NUM_CHUNKS + chunk, top)
    tl.store(indices + row * NUM_CHUNKS + chunk, index)
    tl.debug_barrier()
    if tl.atomic_add(counters + row, 1, sem="acq_rel") == NUM_CHUNKS - 1:
        tl.store(counters + row, 0)
        every = tl.arange(0, BLOCK)
        is_in = every < NUM_CHUNKS
        at = row * NUM_CHUNKS + every
        found = tl.load(tops + at, is_in, other=float("-inf"), cache_modifier=".cg")
        where = tl.load(indices + at, is_in, other=num_cols - 1, cache_modifier=".cg")
        best = tl.min(tl.where(is_in & (found == tl.max(found, 0)), where, num_cols - 1), 0)
        tl.store(first + row * first_stride, best.to(tl.int64))
        tl.store(second + row * second_stride, best.to(tl.int64))


@cache
def _counters(device: torch.device) -> Tensor:
    """Zeros; kernels leave them as they were."""
    return torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)


def choose(logits: Tensor, *targets: Tensor) -> None:
    """Write the most likely token of each row, the first of several, to one or two vectors.

    Args:
        logits: [R, V] float32.
        targets: [R] int64 each, elements any distance apart.
    """
    (num_rows, num_cols), device = logits.shape, logits.device
    num_chunks = -(-num_cols // CHUNK)
    first, second = targets[0], targets[-1]
    _choose_kernel[(num_chunks, num_rows)](
        logits,
        torch.empty((num_rows, num_chunks), device=device),
        torch.empty((num_rows, num_chunks), dtype=torch.int32, device=device),
        _counters(device), first, first.stride(0), second, second.stride(0), num_cols,
        CHUNK=CHUNK, NUM_CHUNKS=num_chunks, BLOCK=next_power(num_chunks), **options(4),
    )  # fmt: skip


@triton.jit
def _philox(c0, c1, c2, c3, seed):
    """The first word of Philox4x32-10 (Salmon et al. 2011): engine/random.py, on 32-bit words."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (p1 >> 32).to(tl.uint32) ^ c1 ^ k0,
            (p1 & 0xFFFFFFFF).to(tl.uint32),
            (p0 >> 32).to(tl.uint32) ^ c3 ^ k1,
            (p0 & 0xFFFFFFFF).to(tl.uint32),
        )
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0


@triton.jit
def _uniform_kernel(
    out, state, plan, stride, num_lines, offset, STREAM: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_in = index < num_lines * WIDTH
    line = index // WIDTH
    start(OVERLAP)
    at = tl.load(state + 2 * line + 1, is_in, other=0) + 1 + offset + index % WIDTH
    word = _philox(
        at.to(tl.uint32),
        tl.full((BLOCK,), STREAM, tl.uint32),
        tl.load(plan + line * stride + 4, is_in, other=0).to(tl.uint32),
        tl.zeros((BLOCK,), tl.uint32),
        tl.load(plan + line * stride + 3, is_in, other=0),
    )
    tl.store(out + index, word.to(tl.float64) * 2.3283064365386963e-10, is_in)


def uniform(lines: Lines, width: int, offset: int, stream: int) -> Tensor:
    """Uniform numbers [B, width] float64 in [0, 1), those of engine/random.uniform.

    Args:
        lines: whose seeds, completions and positions key the draws.
        width: consecutive tokens to decide for each line.
        offset: 0 where the first of them is the token after the last known one.
        stream: what is decided.
    """
    num_lines = lines.state.shape[0]
    out = torch.empty((num_lines, width), dtype=torch.float64, device=lines.state.device)
    _uniform_kernel[(-(-num_lines * width // 128),)](
        out, lines.state, lines.plan, lines.plan.stride(0), num_lines, offset,
        STREAM=stream, BLOCK=128, WIDTH=width, **options(4),
    )  # fmt: skip
    return out


@triton.jit
def _accept_kernel(
    choices, tokens, drafts, draws, chance, state, out, num_lines,
    WIDTH: tl.constexpr, IS_COIN: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    line = tl.arange(0, BLOCK)
    is_in = line < num_lines
    start(OVERLAP)
    num_drafts = tl.load(drafts + line, is_in, other=-1)
    is_live = num_drafts >= 0
    mine = out + line * (WIDTH + 2)
    num_accepted = tl.zeros((BLOCK,), tl.int64)
    stands = is_live
    for step in tl.static_range(WIDTH - 1):
        drafted = tl.load(tokens + line * WIDTH + step + 1, is_in, other=0)
        if IS_COIN:
            is_same = tl.load(draws + line * (WIDTH - 1) + step, is_in, other=1) < chance
        else:
            is_same = drafted == tl.load(choices + line * WIDTH + step, is_in, other=-1)
        stands = stands & is_same & (step < num_drafts)
        num_accepted += stands.to(tl.int64)
        tl.store(mine + 2 + step, drafted, is_in)
    last = tl.load(choices + line * WIDTH + num_accepted, is_in, other=0)
    at = tl.load(state + 2 * line + 1, is_in, other=0)
    tl.store(mine, tl.where(is_live, num_accepted, -1), is_in)
    tl.store(mine + 1, at, is_in)
    tl.store(mine + 2 + num_accepted, last, is_in)
    tl.store(state + 2 * line, last, is_in & is_live)
    tl.store(state + 2 * line + 1, at + num_accepted + 1, is_in & is_live)


def accept(
    lines: Lines,
    places: Places,
    choices: Tensor,
    out: Tensor,
    draws: Tensor | None = None,
    chance: float = 0.0,
) -> None:
    """Greedy acceptance: a draft stands while it is the verify view's own choice; moves the state.

    Args:
        lines: whose state moves on.
        places: with the drafted tokens.
        choices: [B, W] int64, the verify view's choices.
        out: [B, W + 2] int64: how many drafts stand (-1: the line was not live), the position the
            line started from, the drafts that stand, the token after them; the rest means nothing.
        draws: [B, W - 1] float64: for benchmarks only, a draft stands where its draw is below
            `chance`, whatever the verify view chose.
        chance: see there.
    """
    num_lines, width = choices.shape
    _accept_kernel[(1,)](
        choices, places.by_line, places.drafts, out if draws is None else draws, chance,
        lines.state, out, num_lines,
        WIDTH=width, IS_COIN=draws is not None, BLOCK=next_power(num_lines), **options(1),
    )  # fmt: skip
