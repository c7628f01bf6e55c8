"""The offline API: load a model once, generate for a list of prompts."""

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qspec_llm.config import (
    DEFAULT_GROUP,
    DEFAULT_KV_TOKENS,
    DEFAULT_MAX_BATCH,
    EngineConfig,
    cache_directory,
    parse_choice,
    resolve_target,
)
from qspec_llm.engine.costs import (
    COST_TOKENS,
    StepCosts,
    kernel_build,
    load_costs,
    measure_costs,
    save_costs,
)
from qspec_llm.engine.emit import Emission
from qspec_llm.engine.engine import MAX_ROWS, Engine, Gamma, check_gamma
from qspec_llm.engine.graphs import graphs_of
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.request import FinishReason, Request, TokenLogprobs
from qspec_llm.engine.runner import Runner
from qspec_llm.errors import QSpecError
from qspec_llm.hub import resolve_model
from qspec_llm.kernels import get_backend
from qspec_llm.kv.blocks import BLOCK_SIZE, blocks_for
from qspec_llm.kv.pool import allocate, kv_bytes_per_token
from qspec_llm.model.config import read_config
from qspec_llm.model.load import Progress, load_decoder
from qspec_llm.tokenizer import HFTokenizer, Message
from qspec_llm.version import __version__
from qspec_llm.weights.checkpoint import open_checkpoint
from qspec_llm.weights.lora import merge
from qspec_llm.weights.view import VERIFY, Activation

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "Speculation"]

KV_DTYPE = torch.bfloat16  # what `load_decoder` gives a decoder
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Speculation:
    """What drafting did for one completion.

    `drafted` counts all proposed tokens, `tested` those up to and including the first rejected one
    of each cycle, `accepted` those that became output.
    """

    cycles: int
    drafted: int
    tested: int
    accepted: int


@dataclass(frozen=True)
class CompletionOutput:
    """One completion: its text and tokens, how it ended, and what drafting did for it.

    `logprobs` has one entry a token where `SamplingParams.logprobs` asked for them.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None
    speculation: Speculation


@dataclass(frozen=True)
class RequestOutput:
    """All completions of one prompt; `prompt` is None where token ids were given."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]


class LLM:
    """A model, stored once, read at two precisions.

    Args:
        model: a directory of Hugging Face safetensors, a nested checkpoint, a .gguf file, a hub id,
            or an alias ("smollm2").
        target: what the output equals: "int4", "int8", "bf16", or "auto" for the checkpoint's own.
        draft: activations of the draft view, "a8", "a4" or "a16"; None takes those of the
            checkpoint's plan, or "a8".
        gamma: tokens to draft in each cycle; 0 decodes plainly; "auto" takes whatever pays best at
            the moment, by step costs that are measured once and kept; None takes the plan's, or
            the target's default.
        group: weights that share one scale (32, 64 or 128), where the checkpoint does not say.
        lora: directory of a LoRA adapter in PEFT's format, merged into the weights; it acts in both
            views.
        max_batch: requests that run at once.
        max_tokens_in_kv: tokens that the KV cache holds.
        kv_cache_bytes: its size in bytes, instead.
        max_rows: rows computed in one step: a longer prompt is processed in chunks.
        threads: threads of the kernels, for the whole process; by default the physical cores.
        isa: instruction set of the CPU kernels ("avx512", "avx2", "generic"), for the whole
            process; by default the best this machine has.
        backend: whose kernels run: "cuda", "cpu", "reference", or "auto" for the fastest that runs
            here.
        progress: called with (tensors done, tensors in all) while loading.

    Raises:
        QSpecError: the model cannot be read or an option is wrong.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        target: str = "auto",
        draft: str | None = None,
        gamma: Gamma | None = None,
        group: int = DEFAULT_GROUP,
        lora: str | Path | None = None,
        max_batch: int = DEFAULT_MAX_BATCH,
        max_tokens_in_kv: int = DEFAULT_KV_TOKENS,
        kv_cache_bytes: int | None = None,
        max_rows: int = MAX_ROWS,
        threads: int | None = None,
        isa: str | None = None,
        backend: str = "auto",
        progress: Progress | None = None,
    ) -> None:
        if gamma is not None and gamma != "auto":
            check_gamma(gamma)
        self.model, self.lora = model, None if lora is None else Path(lora)
        path = resolve_model(model)
        checkpoint = open_checkpoint(path)
        if self.lora is not None:
            checkpoint = merge(checkpoint, self.lora)
        self.model_config = read_config(checkpoint)
        plan = getattr(checkpoint, "plan", {})
        if kv_cache_bytes is not None:
            max_tokens_in_kv = kv_cache_bytes // kv_bytes_per_token(self.model_config, KV_DTYPE)
        self.config = EngineConfig(
            target=resolve_target(target, checkpoint),
            draft=parse_choice(Activation, draft or plan.get("draft", "a8"), "draft"),
            gamma=plan.get("gamma") if gamma is None else gamma,
            group=group,
            max_batch=max_batch,
            max_tokens_in_kv=max_tokens_in_kv,
            threads=threads,
            isa=isa,
            backend=backend,
        )
        self._num_blocks, self._max_rows = blocks_for(max_tokens_in_kv), max_rows
        self._costs: StepCosts | None = None
        self.tokenizer = HFTokenizer(path)
        self.decoder = load_decoder(
            checkpoint,
            self.model_config,
            self.config.recipe,
            get_backend(self.config.backend),
            num_positions=min(self.model_config.context_length, self._num_blocks * BLOCK_SIZE),
            progress=progress,
        )
        views = (VERIFY, self.decoder.read_view(self.config.draft_view))
        self.decoder.ops.check(self.decoder.matrices(), views)
        assert self.config.gamma is not None
        self.engine = self.new_engine(self.config.gamma)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes in the KV cache."""
        return kv_bytes_per_token(self.model_config, self.decoder.dtype)

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self._num_blocks * BLOCK_SIZE

    def step_costs(self) -> StepCosts:
        """What steps cost here: read from disk, or measured (for some 20 seconds) and kept there.

        They hold for one machine, model, number of threads and build of the kernels;
        `config.cache_directory` says where they are.
        """
        if self._costs is None:
            key = self._costs_key()
            self._costs = load_costs(cache_directory(), key)
        if self._costs is None:
            tokens = min(COST_TOKENS, self._num_blocks * BLOCK_SIZE)
            device = self.decoder.ops.device
            kv = allocate(self.model_config, blocks_for(tokens), self.decoder.dtype, device)
            self._costs = measure_costs(
                Runner(self.decoder, kv),
                self.tokenizer,
                self.config.draft_view,
                self.config.max_batch,
            )
            save_costs(cache_directory(), key, self._costs)
        return self._costs

    def _costs_key(self) -> dict[str, Any]:
        config = self.config
        return {
            "version": __version__,
            "kernels": kernel_build(),
            "machine": f"{platform.node()} {_cpu_name()}",
            "model": repr(self.model_config),
            "bytes": self.decoder.nbytes(),
            "drafted": self.decoder.draft_bytes,
            "target": config.target,
            "draft": config.draft,
            "group": config.group,
            "backend": config.backend,
            "isa": config.isa,
            "threads": get_backend(config.backend).num_threads(),
            "max_batch": config.max_batch,
            "kv_blocks": min(self._num_blocks, blocks_for(COST_TOKENS)),
        }

    def new_engine(self, gamma: Gamma) -> Engine:
        """Another engine over the same weights, with a KV cache of its own."""
        kv = allocate(
            self.model_config, self._num_blocks, self.decoder.dtype, self.decoder.ops.device
        )
        return Engine(
            Runner(self.decoder, kv),
            self.tokenizer,
            self.config.draft_view,
            gamma=gamma,
            max_batch=self.config.max_batch,
            graphs=graphs_of(self.decoder, kv, self.config.draft_view, self.config.max_batch),
            max_rows=self._max_rows,
            costs=self.step_costs() if gamma == "auto" else self._costs,
        )

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a raw prompt; ids pass through.

        Raises:
            QSpecError: the prompt is empty.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not prompt or not ids:
            raise QSpecError("the prompt is empty; it needs at least one token")
        return ids

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        gamma: Gamma | None = None,
    ) -> list[RequestOutput]:
        """Complete raw prompts (no chat template), in one batch; results in their order.

        Args:
            prompts: one text, or a list of texts or token-id lists.
            params: sampling options, `SamplingParams()` by default.
            gamma: tokens to draft in each cycle, the model's own by default.

        Raises:
            QSpecError: a prompt is empty or does not fit; nothing is generated then.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        tokens = [self.encode(text) for text in texts]
        requests = self.submit(self.engine, tokens, params or SamplingParams(), gamma)
        try:
            while self.engine.has_work:
                self.engine.advance()
        except BaseException:
            _abort(self.engine, requests)
            raise
        return [
            RequestOutput(
                text if isinstance(text, str) else None, group[0].prompt, tuple(map(_output, group))
            )
            for text, group in zip(texts, requests, strict=True)
        ]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        gamma: Gamma | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, with the model's chat template.

        Args:
            messages: {"role", "content"} records, or a list of such lists.
            params: sampling options.
            gamma: tokens to draft in each cycle, the model's own by default.
        """
        chats = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = [self.tokenizer.encode_chat(chat) for chat in chats]  # type: ignore[arg-type]
        return self.generate(prompts, params, gamma=gamma)

    def stream(
        self, prompt: Sequence[int], params: SamplingParams, *, gamma: Gamma | None = None
    ) -> Iterator[Emission]:
        """Generate one completion, step by step; closing the iterator aborts it."""
        (requests,) = self.submit(self.engine, [prompt], params, gamma)
        try:
            while not requests[0].is_finished:
                yield from self.engine.step()
        finally:
            _abort(self.engine, [requests])

    def submit(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        gamma: Gamma | None = None,
    ) -> list[list[Request]]:
        """Queue `params.n` completions of each prompt; all of them, or none if one is refused."""
        requests: list[list[Request]] = []
        try:
            for prompt in prompts:
                group: list[Request] = []
                requests.append(group)
                for index in range(params.n):
                    seed = group[0].seed if group else None
                    group.append(engine.add(prompt, params, gamma=gamma, sample=index, seed=seed))
        except QSpecError:
            _abort(engine, requests)
            raise
        return requests


def _cpu_name() -> str:
    """The processor as /proc/cpuinfo has it, or as Python does."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _abort(engine: Engine, requests: Sequence[Sequence[Request]]) -> None:
    for request in (one for group in requests for one in group):
        engine.abort(request.request_id)


def _output(request: Request) -> CompletionOutput:
    return CompletionOutput(
        index=request.sample,
        text=request.text.text,
        token_ids=tuple(request.output),
        logprobs=tuple(request.logprobs) if request.params.logprobs is not None else None,
        finish_reason=request.finish_reason,
        speculation=Speculation(
            request.num_cycles, request.num_drafted, request.num_tested, request.num_accepted
        ),
    )
