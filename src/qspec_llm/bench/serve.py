"""Load on a running server, as clients see it: open or closed loop, percentiles, throughput.

Speaks only /v1/completions with streaming, so that any OpenAI-compatible server can be measured
with the very same load.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qspec_llm.bench.client import Answer, ask
from qspec_llm.errors import QSpecError

__all__ = ["Load", "Outcome", "make_prompts", "plot", "run_load", "summarise"]

ANSWER_SECONDS = 600.0  # that a client waits for an answer
WORDS = (
    "river",
    "stone",
    "copper",
    "garden",
    "winter",
    "letter",
    "market",
    "summer",
    "bridge",
    "window",
    "doctor",
    "engine",
    "forest",
    "harbour",
    "island",
    "kitchen",
    "ladder",
    "mirror",
    "needle",
    "orange",
    "pencil",
    "quarry",
    "railway",
    "silver",
    "teacher",
    "umbrella",
    "village",
    "whistle",
    "yellow",
    "anchor",
    "basket",
    "candle",
)
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What clients do.

    Attributes:
        num_requests: requests in all.
        concurrency: closed loop: clients that ask again as soon as they are answered.
        rate: open loop: requests a second, arriving at random (Poisson); None for a closed loop.
        prompt_words: words of each prompt, its shared beginning included.
        shared_words: words that all prompts begin with.
        max_tokens: tokens of each answer, exactly: end tokens are ignored where the server can.
        is_streamed: answers come as they grow; otherwise at once, which costs a client on the same
            machine less, and the first token is the last.
        body: more options of each body.
        seed: of prompts and arrivals.
    """

    num_requests: int = 64
    concurrency: int = 16
    rate: float | None = None
    prompt_words: int = 48
    shared_words: int = 0
    max_tokens: int = 64
    is_streamed: bool = True
    body: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass
class Outcome:
    """One request as its client saw it, in seconds since the load began."""

    sent: float
    chunks: list[float] = field(default_factory=list)
    ended: float = 0.0
    num_tokens: int = 0
    error: str | None = None

    @property
    def first(self) -> float:
        """Time to the first token."""
        return self.chunks[0] - self.sent

    @property
    def per_token(self) -> float:
        """Mean time between tokens after the first chunk."""
        return (self.chunks[-1] - self.chunks[0]) / max(self.num_tokens - 1, 1)


def make_prompts(load: Load) -> list[str]:
    """Random words, the same for the same seed."""
    rng = random.Random(load.seed)
    shared = rng.choices(WORDS, k=load.shared_words)
    own = max(load.prompt_words - load.shared_words, 1)
    return [" ".join((*shared, *rng.choices(WORDS, k=own))) for _ in range(load.num_requests)]


async def run_load(
    url: str, model: str, load: Load, *, key: str | None, advance: Callable[[], None]
) -> list[Outcome]:
    """Put a load on a server.

    Args:
        url: where it is, without /v1.
        model: its name there.
        load: what to do.
        key: the server's API key.
        advance: called after each request.

    Raises:
        QSpecError: no request succeeded.
    """
    headers = {"authorization": f"Bearer {key}"} if key else {}
    started = time.perf_counter()

    async def send(prompt: str) -> tuple[Outcome, Answer]:
        outcome, answer = Outcome(time.perf_counter() - started), Answer()
        body = _body(model, prompt, load)
        try:
            answer = await ask(f"{url}/v1/completions", body, headers, ANSWER_SECONDS)
        except OSError as error:
            outcome.error = str(error) or repr(error)
        outcome.ended = time.perf_counter() - started
        advance()
        return outcome, answer

    prompts = make_prompts(load)
    if load.rate is None:
        found = await _closed_loop(send, prompts, load.concurrency)
    else:
        found = await _open_loop(send, prompts, load)
    outcomes = [_read(load, outcome, answer, started) for outcome, answer in found]
    if all(outcome.error for outcome in outcomes):
        raise QSpecError(f"no request succeeded; the first said: {outcomes[0].error}")
    return outcomes


async def _closed_loop(
    send: Callable[[str], Any], prompts: Sequence[str], concurrency: int
) -> list[tuple[Outcome, Answer]]:
    waiting = iter(prompts)

    async def client() -> list[tuple[Outcome, Answer]]:
        return [await send(prompt) for prompt in waiting]

    found = await asyncio.gather(*(client() for _ in range(min(concurrency, len(prompts)))))
    return [pair for pairs in found for pair in pairs]


async def _open_loop(
    send: Callable[[str], Any], prompts: Sequence[str], load: Load
) -> list[tuple[Outcome, Answer]]:
    assert load.rate is not None
    rng, tasks = random.Random(load.seed + 1), []
    for prompt in prompts:
        tasks.append(asyncio.create_task(send(prompt)))
        await asyncio.sleep(rng.expovariate(load.rate))
    return list(await asyncio.gather(*tasks))


def _body(model: str, prompt: str, load: Load) -> dict[str, Any]:
    usage = {"stream_options": {"include_usage": True}} if load.is_streamed else {}
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "stream": load.is_streamed,
        **usage,
        **load.body,
    }


def _read(load: Load, outcome: Outcome, answer: Answer, started: float) -> Outcome:
    """Add what an answer says, once the load is over: reading takes time on the server's cores."""
    if outcome.error is not None:
        return outcome
    try:
        if answer.status != 200:
            raise ValueError(f"{answer.status}: {answer.body[:200]!r}")
        if load.is_streamed:
            _read_stream(outcome, answer, started)
        else:
            outcome.num_tokens = json.loads(answer.body)["usage"]["completion_tokens"]
            outcome.chunks.append(outcome.ended)
    except (ValueError, KeyError) as error:
        outcome.error = str(error)
    return outcome


def _read_stream(outcome: Outcome, answer: Answer, started: float) -> None:
    usage = None
    for at, chunk in answer.events():
        if "error" in chunk:
            raise ValueError(str(chunk["error"]))
        usage = chunk.get("usage") or usage
        if chunk["choices"]:
            outcome.chunks.append(at - started)
    if not outcome.chunks:
        raise ValueError("the answer was empty")
    # a server that reports no usage sends a chunk a token
    outcome.num_tokens = usage["completion_tokens"] if usage else len(outcome.chunks)


def summarise(load: Load, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Percentiles in seconds, throughput, errors."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    seconds = max(outcome.ended for outcome in outcomes)
    gaps = [
        late - early
        for outcome in good
        for early, late in zip(outcome.chunks, outcome.chunks[1:], strict=False)
    ]
    return {
        "load": asdict(load),
        "seconds": seconds,
        "requests": len(outcomes),
        "failed": len(outcomes) - len(good),
        "first_error": next((outcome.error for outcome in outcomes if outcome.error), None),
        "output_tokens": sum(outcome.num_tokens for outcome in good),
        "tokens_per_second": sum(outcome.num_tokens for outcome in good) / seconds,
        "requests_per_second": len(good) / seconds,
        "time_to_first_token": _percentiles([outcome.first for outcome in good]),
        "time_per_token": _percentiles([o.per_token for o in good if len(o.chunks) > 1]),
        "between_chunks": _percentiles(gaps),
        "end_to_end": _percentiles([outcome.ended - outcome.sent for outcome in good]),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles, nearest rank."""
    if not values:
        return {}
    ranked = sorted(values)
    found = {
        f"p{percent}": ranked[min(len(ranked) * percent // 100, len(ranked) - 1)]
        for percent in PERCENTILES
    }
    return {"mean": sum(ranked) / len(ranked), **found}


def plot(outcomes: Sequence[Outcome], directory: Path, title: str) -> list[Path]:
    """Draw latencies and throughput as PNG files; returns their paths.

    Raises:
        QSpecError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise QSpecError(
            "--plot needs matplotlib; install it with `pip install matplotlib`"
        ) from None
    directory.mkdir(parents=True, exist_ok=True)
    good = [outcome for outcome in outcomes if outcome.error is None]
    series = {
        "time to first token": [outcome.first for outcome in good],
        "time per token": [outcome.per_token for outcome in good if len(outcome.chunks) > 1],
        "end to end": [outcome.ended - outcome.sent for outcome in good],
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    for axis, (name, values) in zip(axes, series.items(), strict=True):
        share = [(index + 1) / len(values) for index in range(len(values))]
        axis.step(sorted(values), share, where="post")
        axis.set(xlabel=f"{name}, seconds", ylabel="share of requests", ylim=(0, 1))
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    latencies = directory / "latencies.png"
    figure.savefig(latencies, dpi=110)
    pyplot.close(figure)

    figure, axis = pyplot.subplots(figsize=(9, 4))
    width = max(max(outcome.ended for outcome in good) / 60, 0.25)
    counts: dict[int, float] = {}
    for outcome in good:
        for at in outcome.chunks:
            slot = int(at / width)
            counts[slot] = counts.get(slot, 0) + outcome.num_tokens / len(outcome.chunks)
    slots = range(max(counts) + 1)
    axis.plot([slot * width for slot in slots], [counts.get(slot, 0) / width for slot in slots])
    axis.set(xlabel="seconds", ylabel="tokens a second", title=title)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    throughput = directory / "throughput.png"
    figure.savefig(throughput, dpi=110)
    pyplot.close(figure)
    return [latencies, throughput]
