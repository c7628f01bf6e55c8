"""From logits to the distribution a token is drawn from, and the draw. Pure functions of tensors.

The order is vLLM's: penalties, bias, temperature, min-p, top-k, top-p. Draft and verify logits go
through the same functions, so both distributions have the same support rules.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.request import Request

__all__ = ["adjust", "argmax", "pick", "probabilities"]

FIRST_RANKED = 128  # tokens that top-p ranks at first
LEAST_TEMPERATURE = 1e-30  # below it float32 has no numbers to divide by


def adjust(logits: Tensor, request: Request, drafted: Sequence[int]) -> Tensor:
    """Apply penalties, bias, min_tokens and grammar to logits of one request's next positions.

    Args:
        logits: [L, vocabulary]; the last row decides the token after all of `drafted`, each row
            before it one token earlier.
        request: whose prompt and output come before them.
        drafted: tokens drafted after the output.

    Returns:
        [L, vocabulary]: `logits` itself where nothing applies.
    """
    params, grammar = request.params, request.grammar
    if not (params.has_penalties or params.logit_bias or params.min_tokens or grammar):
        return logits
    num_rows = logits.shape[0]
    histories = [drafted[: len(drafted) - num_rows + 1 + row] for row in range(num_rows)]
    if params.has_penalties:
        logits = torch.stack(
            [_penalise(row, request, drafts) for row, drafts in zip(logits, histories, strict=True)]
        )
    if params.logit_bias:
        bias = torch.tensor(list(params.logit_bias.values()), device=logits.device)
        logits = logits.clone()
        logits[:, list(params.logit_bias)] += bias
    short = [len(request.output) + len(drafts) < params.min_tokens for drafts in histories]
    if any(short) and request.stop_ids:
        logits = logits.clone()
        rows = torch.tensor(short).nonzero()
        logits[rows, torch.tensor(sorted(request.stop_ids))] = -torch.inf
    if grammar is not None:
        allowed = [grammar.allowed([*request.output, *drafts]) for drafts in histories]
        logits = logits.masked_fill(~torch.stack(allowed).to(logits.device), -torch.inf)
    return logits


def _penalise(logits: Tensor, request: Request, drafted: Sequence[int]) -> Tensor:
    """Penalties on one row [vocabulary], in the order of vLLM."""
    params = request.params
    counts = Counter(dict.fromkeys(request.prompt, 0))
    counts.update(request.output)
    counts.update(drafted)
    # only what was seen changes: a few hundred tokens, not the vocabulary
    seen = torch.tensor(list(counts), device=logits.device)
    times = torch.tensor(list(counts.values()), device=logits.device)
    values = logits[seen]
    factor = torch.where(values > 0, 1 / params.repetition_penalty, params.repetition_penalty)
    values = values * factor - params.frequency_penalty * times
    return logits.index_put((seen,), values - params.presence_penalty * (times > 0))


def argmax(logits: Tensor) -> list[int]:
    """The most likely token of each row of [L, vocabulary], the first of equal ones."""
    # where it can, by numpy: torch takes ten times as long, 110 us for a row of 49152
    is_on_cpu = logits.device.type == "cpu"
    tokens: list[int] = (logits.numpy() if is_on_cpu else logits).argmax(-1).tolist()
    return tokens


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution to draw from at a temperature above 0: logits [L, V] to [L, V] float32."""
    # the largest becomes 0, so that no temperature is too small to divide by
    centred = logits.float() - logits.amax(-1, keepdim=True)
    probs = torch.softmax(centred / max(params.temperature, LEAST_TEMPERATURE), dim=-1)
    if params.min_p > 0:
        probs = probs.masked_fill(probs < params.min_p * probs.amax(-1, keepdim=True), 0)
    if 0 < params.top_k < probs.shape[-1]:
        smallest = probs.topk(params.top_k, dim=-1).values[..., -1:]
        probs = probs.masked_fill(probs < smallest, 0)
    if params.top_p < 1:
        probs = probs / probs.sum(-1, keepdim=True)
        probs = probs.masked_fill(~_nucleus(probs, params.top_p), 0)
    return probs / probs.sum(-1, keepdim=True)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Which tokens stay: most likely first, equal ones by index, until top_p is reached.

    Args:
        probs: [L, V], each row of sum 1.

    Returns:
        [L, V] bool.
    """
    size, most = FIRST_RANKED, probs.shape[-1]
    while True:  # ranking the whole vocabulary takes longer than a small model's step
        ranked = probs.topk(min(size, most), dim=-1).values
        before = ranked.cumsum(-1) - ranked
        if size >= most or bool((before[:, -1] >= top_p).all()):
            break
        size *= 8
    is_in = before < top_p
    is_in[:, 0] = True  # a top_p below float32's range is 0 in this comparison
    smallest = ranked.gather(-1, is_in.sum(-1, keepdim=True) - 1)
    num_equal = (is_in & (ranked == smallest)).sum(-1, keepdim=True)
    is_equal = probs == smallest
    return (probs > smallest) | (is_equal & (is_equal.cumsum(-1) <= num_equal))


def pick(probs: Tensor, draws: Tensor) -> Tensor:
    """Invert the cumulative distribution: probs [L, V] (any scale), draws [L] in [0, 1): [L] int64.

    A token of probability 0 is never picked.
    """
    cumulative = probs.double().cumsum(-1)
    # a draw below 1 times the total may still round up to it
    threshold = (draws[:, None] * cumulative[:, -1:]).minimum(
        torch.nextafter(cumulative[:, -1:], torch.zeros_like(cumulative[:, -1:]))
    )
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
