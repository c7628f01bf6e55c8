"""What steps cost on this machine: measured once by running them, kept on disk, interpolated.

A cost covers all of a step's work between schedule and commit: kernels, proposing and accepting. On
a GPU it is a forward pass of a captured graph, beside which the rest of a cycle is small.
"""

import contextlib
import json
import os
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from qspec_llm import kernels
from qspec_llm.engine.accept import accept
from qspec_llm.engine.batch import Batch, Span
from qspec_llm.engine.captured import captured, gpu_seconds, rows_after
from qspec_llm.engine.draft import Drafts, draft
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.request import Request
from qspec_llm.engine.runner import Runner
from qspec_llm.engine.text import TextStream, Tokenizer
from qspec_llm.kv.blocks import BLOCK_SIZE, blocks_for
from qspec_llm.weights.view import VERIFY, View

__all__ = [
    "COST_TOKENS",
    "StepCosts",
    "kernel_build",
    "load_costs",
    "measure_costs",
    "save_costs",
]

SHORT, LONG = 64, 1024  # keys before the rows of a measured step
COST_TOKENS = LONG + 32  # tokens in the cache that a measurement wants
GAMMAS = (0, 1, 2, 3, 4, 6, 8)
FEW_GAMMAS = (0, 1, 4)  # where steps take so long that all of them cannot be afforded
MOST_ROWS = 96  # rows of the largest measured verify step
ROUNDS = 5
FORMAT = 2  # of the file
KERNEL_FILES = {".py", ".so", ".pyd", ".cu", ".cuh"}  # what steps run through


@dataclass(frozen=True)
class StepCosts:
    """Seconds of draft and verify steps.

    Attributes:
        batches: batch sizes measured, ascending, the first is 1.
        gammas: drafts verified for each request, ascending, the first is 0; each batch size has a
            beginning of them.
        draft: seconds of a draft step, one a batch size.
        verify: seconds of a verify step, one a batch size and gamma.
        draft_per_key: more seconds for each key that a row of a draft step sees beyond `SHORT`.
        verify_per_key: the same for a verify step.
    """

    batches: tuple[int, ...]
    gammas: tuple[int, ...]
    draft: tuple[float, ...]
    verify: tuple[tuple[float, ...], ...]
    draft_per_key: float
    verify_per_key: float

    def draft_step(self, num_requests: int, num_keys: float) -> float:
        """Seconds of a draft step of some requests that see `num_keys` keys in all."""
        extra = max(num_keys - SHORT * num_requests, 0) * self.draft_per_key
        return _interpolate(self.batches, self.draft, num_requests) + extra

    def verify_step(self, num_requests: int, num_rows: int, num_keys: float) -> float:
        """Seconds of a verify step: its rows, and the keys that all rows together see."""
        gamma = num_rows / num_requests - 1
        left, right, share = _between(self.batches, num_requests)
        seconds = self._verify_row(left, gamma)
        if right != left:
            seconds += share * (self._verify_row(right, gamma) - seconds)
        return seconds + max(num_keys - SHORT * num_rows, 0) * self.verify_per_key

    def _verify_row(self, index: int, gamma: float) -> float:
        """Seconds at one measured batch size."""
        row = self.verify[index]
        return _interpolate(self.gammas[: len(row)], row, gamma)


def _between(at: Sequence[int], where: float) -> tuple[int, int, float]:
    """Two neighbours among what was measured, and how far from the first to the second."""
    if len(at) == 1:
        return 0, 0, 0.0
    right = min(max(bisect_right(at, where), 1), len(at) - 1)
    left = right - 1
    share = (where - at[left]) / (at[right] - at[left])
    return (left, left, 0.0) if share == 0 else (left, right, share)


def _interpolate(at: Sequence[int], values: Sequence[float], where: float) -> float:
    """Linear between what was measured, and beyond it."""
    left, right, share = _between(at, where)
    return values[left] + share * (values[right] - values[left])


def measure_costs(
    runner: Runner, tokenizer: Tokenizer, view: View, max_batch: int, budget: float = 20.0
) -> StepCosts:
    """Time steps on an idle engine's runner, interleaved; its cache is overwritten.

    Args:
        runner: of an engine that has published no blocks.
        tokenizer: of the engine.
        view: the draft view.
        max_batch: requests that may run at once.
        budget: seconds that this may take, roughly; slow models are measured at fewer points.
    """
    capacity = runner.kv[0].keys.shape[0] - max(GAMMAS) - 2
    num_positions = runner.decoder.cos.shape[0]  # that it has angles for
    long = min(LONG, capacity, num_positions - max(GAMMAS) - 2)
    short = min(SHORT, long)
    is_on_gpu = runner.decoder.ops.device.type == "cuda"
    steps = _CapturedSteps(runner, view) if is_on_gpu else _Steps(runner, tokenizer, view)
    clock = gpu_seconds if is_on_gpu else _seconds
    steps.verify(1, 0, short)  # buffers are allocated, pages touched
    plain = clock(lambda: steps.verify(1, 0, short))
    is_slow = plain * 600 > budget
    gammas = FEW_GAMMAS if is_slow else GAMMAS
    batches = [1, max_batch] if is_slow else [*(1 << i for i in range(12)), max_batch]
    batches = sorted({size for size in batches if size <= max_batch})
    cases: dict[tuple[Any, ...], Callable[[], object]] = {}
    for size in batches:
        cases["draft", size, short] = _bind(steps.draft, size, short)
        for gamma in gammas:
            if gamma < 2 or size * (gamma + 1) <= MOST_ROWS:
                cases["verify", size, gamma, short] = _bind(steps.verify, size, gamma, short)
    cases["draft", 1, long] = _bind(steps.draft, 1, long)
    cases["verify", 1, 0, long] = _bind(steps.verify, 1, 0, long)
    seconds = _measure(cases, budget, clock)
    more_keys = max(long - short, 1)
    verify_per_key = max(seconds["verify", 1, 0, long] - seconds["verify", 1, 0, short], 0)
    draft_per_key = max(seconds["draft", 1, long] - seconds["draft", 1, short], 0)
    return StepCosts(
        batches=tuple(batches),
        gammas=gammas,
        draft=tuple(seconds["draft", size, short] for size in batches),
        verify=tuple(
            tuple(
                seconds[key] for gamma in gammas if (key := ("verify", size, gamma, short)) in cases
            )
            for size in batches
        ),
        # A draft reads no more of a key than verifying does. What noise adds here would keep drafts
        # from ever being tried, and so corrected, at a long context.
        draft_per_key=min(draft_per_key, verify_per_key) / more_keys,
        verify_per_key=verify_per_key / more_keys,
    )


def _bind(call: Callable[..., object], *args: int) -> Callable[[], object]:
    return lambda: call(*args)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _measure(
    cases: Mapping[tuple[Any, ...], Callable[[], object]],
    budget: float,
    clock: Callable[[Callable[[], object]], float],
) -> dict[tuple[Any, ...], float]:
    """Median seconds over rounds of all cases, one round at least."""
    started = time.perf_counter()
    seconds: dict[tuple[Any, ...], list[float]] = {key: [] for key in cases}
    for done in range(1, ROUNDS + 1):
        for key, call in cases.items():
            seconds[key].append(clock(call))
        if (time.perf_counter() - started) * (done + 1) / done > budget:
            break
    return {key: statistics.median(values) for key, values in seconds.items()}


class _CapturedSteps:
    """Forward passes as CUDA graphs, which is how cycles run them; sequences share their blocks."""

    def __init__(self, runner: Runner, view: View) -> None:
        self._runner, self._view = runner, view
        self._passes: dict[tuple[View, int, int, int], Callable[[], None]] = {}

    def draft(self, size: int, context: int) -> None:
        """One row of each of `size` sequences, in the draft view."""
        self._pass(self._view, size, 1, context)

    def verify(self, size: int, gamma: int, context: int) -> None:
        """`gamma` + 1 rows of each of `size` sequences, in the verify view."""
        self._pass(VERIFY, size, gamma + 1, context)

    def _pass(self, view: View, size: int, num_rows: int, context: int) -> None:
        key = view, size, num_rows, context
        if key not in self._passes:
            self._passes[key] = captured(self._forward(*key))
        self._passes[key]()

    def _forward(self, view: View, size: int, num_rows: int, context: int) -> Callable[[], object]:
        decoder, kv = self._runner.decoder, self._runner.kv
        rows = rows_after(context, num_rows, size).to(decoder.ops.device)
        tokens = torch.ones(size * num_rows, dtype=torch.int64, device=decoder.ops.device)

        def forward() -> None:
            with torch.inference_mode():
                decoder.forward(tokens, rows, kv, view, None)

        return forward


class _Steps:
    """Steps of requests that exist only to be timed; they share their blocks."""

    def __init__(self, runner: Runner, tokenizer: Tokenizer, view: View) -> None:
        self._runner, self._tokenizer, self._view = runner, tokenizer, view

    def draft(self, size: int, context: int) -> None:
        """Propose one token for each of `size` requests."""
        draft(self._runner, self._batch(size, context, gamma=1), self._view)

    def verify(self, size: int, gamma: int, context: int) -> None:
        """Verify `gamma` tokens of each of `size` requests and decide."""
        batch = self._batch(size, context, gamma)
        drafts = Drafts([[1] * gamma for _ in range(size)], [[] for _ in range(size)])
        accept(batch, drafts, self._runner.forward(batch.extend(drafts.tokens), VERIFY))

    def _batch(self, size: int, context: int, gamma: int) -> Batch:
        blocks = list(range(blocks_for(context + max(GAMMAS) + 2)))
        capacity = self._runner.kv[0].keys.shape[0] // BLOCK_SIZE
        requests = [
            Request(
                request_id=index,
                prompt=(1,) * context,
                params=SamplingParams(temperature=0),
                seed=0,
                sample=0,
                gamma=gamma,
                max_total=context + 32,
                stop_ids=frozenset(),
                text=TextStream(self._tokenizer, ()),
                output=[1],
                committed=context,
                blocks=blocks[:capacity],
            )
            for index in range(size)
        ]
        return Batch(tuple(Span(request, context, (1,), 1, gamma) for request in requests))


def kernel_build() -> str:
    """A hash of the kernels as they are installed: compiled extensions and sources, by name."""
    found = {
        str(path.relative_to(root)): path
        for root in map(Path, kernels.__path__)
        for path in root.rglob("*")
        if path.suffix in KERNEL_FILES
    }
    state = blake2b(digest_size=12)
    for name, path in sorted(found.items()):
        state.update(f"{name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return state.hexdigest()


def _file(directory: Path, key: Mapping[str, Any]) -> Path:
    name = blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()
    return directory / f"costs-{name}.json"


def load_costs(directory: Path, key: Mapping[str, Any]) -> StepCosts | None:
    """Costs measured before for the same machine, model and options; None if there are none.

    A file that cannot be read is as good as none: it is measured and written again.
    """
    try:
        values = json.loads(_file(directory, key).read_text(encoding="utf-8"))
        if values["format"] != FORMAT or values["key"] != dict(key):
            return None
        costs = values["costs"]
        return StepCosts(
            tuple(costs["batches"]),
            tuple(costs["gammas"]),
            tuple(map(float, costs["draft"])),
            tuple(tuple(map(float, row)) for row in costs["verify"]),
            float(costs["draft_per_key"]),
            float(costs["verify_per_key"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_costs(directory: Path, key: Mapping[str, Any], costs: StepCosts) -> None:
    """Keep costs for the next start; a directory that cannot be written to is no error."""
    path = _file(directory, key)
    text = json.dumps({"format": FORMAT, "key": dict(key), "costs": asdict(costs)}, indent=1)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
