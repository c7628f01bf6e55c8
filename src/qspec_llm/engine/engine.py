"""The engine: add requests, step until they are finished."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from qspec_llm.engine.accept import Accepted, accept, in_order
from qspec_llm.engine.batch import Span
from qspec_llm.engine.costs import StepCosts
from qspec_llm.engine.draft import draft
from qspec_llm.engine.emit import Emission, emit
from qspec_llm.engine.gamma import GammaChooser
from qspec_llm.engine.grammar import Grammar
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.request import Request
from qspec_llm.engine.runner import Runner
from qspec_llm.engine.scheduler import Scheduler
from qspec_llm.engine.text import TextStream, Tokenizer
from qspec_llm.errors import QSpecError
from qspec_llm.kv.blocks import BLOCK_SIZE, BlockAllocator
from qspec_llm.weights.view import VERIFY, View

__all__ = ["MAX_GAMMA", "MAX_ROWS", "Advancer", "Engine", "Gamma", "StepSeconds", "check_gamma"]

Gamma = int | Literal["auto"]  # tokens to draft in each cycle, or whatever pays best at the moment

MAX_GAMMA = 16  # tokens drafted in a cycle
MAX_ROWS = 512  # rows computed in a step: a longer prompt is processed in chunks


class Advancer(Protocol):
    """Runs whole cycles of the spans that it can, and leaves the rest (`engine/cycle`)."""

    gpu_seconds: float  # busy with them

    def advance(self, spans: Sequence[Span]) -> dict[int, Accepted]:
        """Outcomes by request id."""


@dataclass
class StepSeconds:
    """Where the time of all steps went."""

    cycles: float = 0.0  # waiting for whole cycles that ran as graphs
    draft: float = 0.0
    verify: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.cycles + self.draft + self.verify + self.other


class Engine:
    """Batched speculative generation over one runner.

    Args:
        runner: the decoder and its cache.
        tokenizer: turns output tokens into text.
        draft_view: the view that proposes.
        gamma: tokens to draft in each cycle, unless a request says otherwise; 0 for none; "auto"
            for the choice of `engine.gamma` before each cycle.
        max_batch: requests that run at once.
        max_rows: rows computed in one step.
        graphs: makes what runs whole cycles at once, where the backend has that; None for none.
        costs: what steps cost here; needed where any request has "auto".
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        draft_view: View,
        *,
        gamma: Gamma,
        max_batch: int,
        max_rows: int = MAX_ROWS,
        graphs: Callable[[BlockAllocator], Advancer] | None = None,
        costs: StepCosts | None = None,
    ) -> None:
        num_blocks = runner.kv[0].keys.shape[0] // BLOCK_SIZE
        self.seconds = StepSeconds()
        self._runner, self._tokenizer, self._draft_view = runner, tokenizer, draft_view
        self.gammas = GammaChooser(costs)
        self._gamma = self._check_gamma(gamma)
        # room for every running request's cycle, so that load never shortens a draft
        max_rows = max(max_rows, max_batch * (MAX_GAMMA + 1))
        blocks = BlockAllocator(num_blocks)
        self.scheduler = Scheduler(blocks, max_batch, max_rows)
        self.cycles = graphs(blocks) if graphs is not None else None
        self._cache_tokens = num_blocks * BLOCK_SIZE
        self._num_requests = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work

    def add(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        gamma: Gamma | None = None,
        sample: int = 0,
        seed: int | None = None,
        salt: bytes = b"",
        grammar: Grammar | None = None,
    ) -> Request:
        """Queue one completion of a prompt.

        Args:
            prompt: token ids.
            params: sampling options; `params.n` is the caller's to expand, by `sample`.
            gamma: tokens to draft in each cycle; the engine's own by default. Under "auto" a seeded
                request that samples does not draft, since its tokens depend on gamma and gamma on
                the load.
            sample: which of the prompt's completions this is.
            seed: key of its draws; `params.seed`, or a fresh one, by default.
            salt: requests with different salts share no cached blocks.
            grammar: what the output must follow, at its beginning.

        Raises:
            QSpecError: the prompt is empty, has a token outside the vocabulary, or does not fit.
        """
        config = self._runner.decoder.config
        if not prompt:
            raise QSpecError("the prompt is empty; it needs at least one token")
        for what, tokens in (
            ("the prompt", prompt),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        ):
            for token in tokens:
                if not 0 <= token < config.vocab_size:
                    raise QSpecError(
                        f"{what} has token {token}, outside the vocabulary of {config.vocab_size}"
                    )
        for limit, what in (
            (config.context_length, "the model's context"),
            (self._cache_tokens, "the KV cache"),
        ):
            if len(prompt) >= limit:
                raise QSpecError(
                    f"the prompt has {len(prompt)} tokens, but {what} holds {limit}, "
                    "the answer included"
                )
        if grammar is not None and (params.min_tokens or params.ignore_eos):
            raise QSpecError("a grammar decides where the answer ends: no min_tokens or ignore_eos")
        longest = min(config.context_length, self._cache_tokens)
        end_ids = () if params.ignore_eos else config.eos_token_ids
        if seed is None:
            seed = params.seed if params.seed is not None else secrets.randbits(64)
        gamma = self._gamma if gamma is None else self._check_gamma(gamma)
        is_auto = gamma == "auto" and (params.is_greedy or params.seed is None)
        request = Request(
            request_id=self._num_requests,
            prompt=tuple(prompt),
            params=params,
            seed=seed,
            sample=sample,
            gamma=0 if gamma == "auto" else gamma,
            is_auto=is_auto,
            salt=salt,
            grammar=grammar,
            max_total=min(len(prompt) + params.max_tokens, longest),
            stop_ids=frozenset((*end_ids, *params.stop_token_ids)),
            text=TextStream(self._tokenizer, tuple(params.stop)),
        )
        self._num_requests += 1
        self.scheduler.add(request)
        return request

    def _check_gamma(self, gamma: Gamma) -> Gamma:
        if gamma == "auto" and self.gammas.costs is None:
            raise QSpecError("gamma is 'auto', but the engine was given no step costs")
        return gamma if gamma == "auto" else check_gamma(gamma)

    def abort(self, request_id: int) -> Request | None:
        """End a request now; None if it has finished or never was."""
        request = self.scheduler.abort(request_id)
        if request is not None:
            request.text.finish()
            self.gammas.forget(request_id)
        return request

    def step(self) -> list[Emission]:
        """One cycle; returns what became certain."""
        return [emit(request, start) for request, start in self.advance()]

    def advance(self) -> list[tuple[Request, int]]:
        """One cycle: draft, verify, accept, commit.

        Returns:
            The requests whose outputs grew, each with the number of output tokens before; `emit`
            makes news of that, now or after some more cycles.
        """
        started = time.perf_counter()
        self.gammas.choose(self.scheduler.running)
        batch = self.scheduler.schedule()
        num_before = [len(span.request.output) for span in batch.spans]
        advancing = time.perf_counter()
        advanced = self.cycles.advance(batch.spans) if self.cycles is not None else {}
        rest = batch.without(advanced)
        drafting = time.perf_counter()
        drafts = draft(self._runner, rest, self._draft_view)
        verifying = time.perf_counter()
        logits = self._runner.forward(rest.extend(drafts.tokens), VERIFY)  # overwrites draft KV
        accepting = time.perf_counter()
        accepted = in_order(batch, advanced, accept(rest, drafts, logits))
        committing = time.perf_counter()
        self.scheduler.commit(batch, accepted)
        # the parts of a captured cycle cannot be timed apart
        seconds = None if advanced else (verifying - drafting, committing - verifying)
        self.gammas.learn(batch, accepted, seconds)
        self.seconds.cycles += drafting - advancing
        self.seconds.draft += verifying - drafting
        self.seconds.verify += accepting - verifying
        self.seconds.other += time.perf_counter() - accepting + advancing - started
        return [
            (span.request, before)
            for span, before in zip(batch.spans, num_before, strict=True)
            if len(span.request.output) > before
        ]


def check_gamma(gamma: int) -> int:
    """`gamma` itself if it is within its limit.

    Raises:
        QSpecError: it is not.
    """
    if type(gamma) is not int or not 0 <= gamma <= MAX_GAMMA:
        raise QSpecError(f"gamma is {gamma!r}; it must be between 0 and {MAX_GAMMA}")
    return gamma
