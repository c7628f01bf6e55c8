"""Teacher forcing: what every view would say next at each position of known tokens.

At each position the draft views compute their row first, over KV that the verify view wrote; then
the verify view computes the same row and overwrites what they left. So a draft's logits here are,
bit for bit, those of the first token that it would draft there. Sequences run side by side, and a
step's logits are all that is ever held: never [tokens, vocabulary].
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qspec_llm.engine.batch import Batch, Span
from qspec_llm.engine.engine import MAX_ROWS
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.request import Request
from qspec_llm.engine.runner import Runner
from qspec_llm.engine.text import TextStream, Tokenizer
from qspec_llm.kv.blocks import blocks_for
from qspec_llm.kv.pool import allocate
from qspec_llm.model.decoder import Decoder
from qspec_llm.weights.view import VERIFY, View

__all__ = ["OneView", "Script", "Step", "read_along", "runner_for"]


@dataclass(frozen=True)
class Script:
    """Known tokens: a prompt of at least one, and what follows."""

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Of both."""
        return len(self.prompt) + len(self.continuation)


@dataclass(frozen=True)
class Step:
    """One position of each of S scripts.

    Attributes:
        scripts: their indices.
        next_tokens: [S] int64, what follows that position.
        logits: by name of the runner or view, [S, vocabulary] float32.
    """

    scripts: tuple[int, ...]
    next_tokens: Tensor
    logits: dict[str, Tensor]


class OneView(Runner):
    """A runner for which the model is one view of it, prompts and KV included: W4A4 alone, say."""

    def __init__(self, runner: Runner, view: View) -> None:
        super().__init__(runner.decoder, runner.kv)
        self._view = view

    def forward(self, batch: Batch, view: View) -> Tensor:  # noqa: ARG002  # the one there is
        """Logits of a batch in this runner's own view."""
        return super().forward(batch, self._view)


def runner_for(decoder: Decoder, scripts: Sequence[Script], max_batch: int) -> Runner:
    """A runner whose cache holds the `max_batch` longest scripts."""
    lengths = sorted((script.num_tokens for script in scripts), reverse=True)
    num_blocks = sum(blocks_for(length) for length in lengths[:max_batch])
    kv = allocate(decoder.config, max(num_blocks, 1), decoder.dtype, decoder.ops.device)
    return Runner(decoder, kv)


def read_along(
    runners: Mapping[str, Runner],
    scripts: Sequence[Script],
    tokenizer: Tokenizer,
    *,
    drafts: Mapping[str, View] | None = None,
    max_batch: int = 16,
) -> Iterator[Step]:
    """Logits before every token of every continuation.

    Args:
        runners: each computes everything in the verify view, over a cache of its own made by
            `runner_for`; they share a vocabulary.
        scripts: known tokens; those with an empty continuation give no step.
        tokenizer: any; nothing is decoded.
        drafts: views of the first runner's model that compute each row as well.
        max_batch: scripts that run side by side.
    """
    order = [index for index, script in enumerate(scripts) if script.continuation]
    for first in range(0, len(order), max_batch):
        group = order[first : first + max_batch]
        requests = _requests([scripts[index] for index in group], tokenizer)
        for runner in runners.values():
            for request in requests:
                _compute_prompt(runner, request)
        length = max(len(scripts[index].continuation) for index in group)
        for offset in range(length):
            live = [i for i, index in enumerate(group) if len(scripts[index].continuation) > offset]
            spans = [_span(requests[i], scripts[group[i]], offset) for i in live]
            yield Step(
                scripts=tuple(group[i] for i in live),
                next_tokens=torch.tensor([scripts[group[i]].continuation[offset] for i in live]),
                logits=_logits(runners, Batch(tuple(spans)), drafts or {}),
            )


def _requests(scripts: Sequence[Script], tokenizer: Tokenizer) -> list[Request]:
    """Requests that hold consecutive blocks; the caches have room for any `max_batch` of them."""
    requests, num_blocks = [], 0
    for index, script in enumerate(scripts):
        stop = num_blocks + blocks_for(script.num_tokens)
        request = Request(
            request_id=index,
            prompt=script.prompt,
            params=SamplingParams(),
            seed=0,
            sample=0,
            gamma=0,
            max_total=script.num_tokens,
            stop_ids=frozenset(),
            text=TextStream(tokenizer, ()),
            blocks=list(range(num_blocks, stop)),
        )
        requests.append(request)
        num_blocks = stop
    return requests


def _compute_prompt(runner: Runner, request: Request) -> None:
    """KV of all but the prompt's last token, whose row is the first step's."""
    prompt = request.prompt[:-1]
    for start in range(0, len(prompt), MAX_ROWS):
        span = Span(request, start, prompt[start : start + MAX_ROWS], num_logits=0)
        runner.forward(Batch((span,)), VERIFY)


def _span(request: Request, script: Script, offset: int) -> Span:
    """The row before token `offset` of the continuation."""
    token = script.continuation[offset - 1] if offset else script.prompt[-1]
    return Span(request, len(script.prompt) + offset - 1, (token,), num_logits=1)


def _logits(
    runners: Mapping[str, Runner], batch: Batch, drafts: Mapping[str, View]
) -> dict[str, Tensor]:
    first = next(iter(runners.values()))
    logits = {name: first.forward(batch, view).clone() for name, view in drafts.items()}
    return logits | {name: r.forward(batch, VERIFY).clone() for name, r in runners.items()}
