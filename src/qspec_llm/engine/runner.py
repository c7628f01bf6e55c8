"""Running the decoder on a batch: from spans and block tables to tensors, and logits back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qspec_llm.engine.batch import Batch, Span
from qspec_llm.errors import QSpecError
from qspec_llm.kernels import LayerKV, Rows
from qspec_llm.kv.blocks import BLOCK_SIZE
from qspec_llm.model.decoder import Decoder
from qspec_llm.weights.view import View

__all__ = ["Runner"]


@dataclass(frozen=True)
class _Piece:
    """Rows of one span that belong to one kernel class."""

    span: int
    start: int
    tokens: Sequence[int]
    num_logits: int
    blocks: Sequence[int]


class Runner:
    """Computes batches in either view.

    Prompt positions and generated positions go through separate forward passes, because backends
    may use different kernels for them. Which one computes a position depends on the position alone,
    never on load, chunking or preemption: so an answer under load is the answer alone.
    """

    def __init__(self, decoder: Decoder, kv: tuple[LayerKV, ...]) -> None:
        self.decoder = decoder
        self.kv = kv

    def forward(self, batch: Batch, view: View) -> Tensor:
        """Logits [sum of num_logits, vocabulary] float32 of a batch, spans in order.

        K and V of every row are written to the request's blocks, over what was there.
        """
        logits: list[Tensor | None] = [None] * len(batch.spans)
        for is_prompt in (True, False):
            pieces = [p for i, span in enumerate(batch.spans) if (p := _piece(i, span, is_prompt))]
            if not pieces:
                continue
            try:
                with torch.inference_mode():
                    out = self._forward(pieces, view, is_prompt)
            except torch.OutOfMemoryError:
                raise QSpecError(
                    f"the GPU has no memory left for a step of {batch.num_rows} rows; choose a "
                    "smaller max_batch or max_tokens_in_kv"
                ) from None
            first = 0
            for piece in pieces:
                if piece.num_logits:
                    logits[piece.span] = out[first : first + piece.num_logits]
                    first += piece.num_logits
            if sum(len(piece.tokens) for piece in pieces) == batch.num_rows:
                return out  # of all spans, in order: megabytes, so not copied
        found = [part for part in logits if part is not None]
        return torch.cat(found) if found else torch.empty(0, self.decoder.config.vocab_size)

    def _forward(self, pieces: list[_Piece], view: View, is_prompt: bool) -> Tensor:
        positions = [p.start + i for p in pieces for i in range(len(p.tokens))]
        slots = [
            piece.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for piece in pieces
            for position in range(piece.start, piece.start + len(piece.tokens))
        ]
        bounds = [0]
        for piece in pieces:
            bounds.append(bounds[-1] + len(piece.tokens))
        width = max(len(piece.blocks) for piece in pieces)
        rows = Rows(
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            cu_rows=torch.tensor(bounds),
            contexts=torch.tensor([piece.start + len(piece.tokens) for piece in pieces]),
            block_tables=torch.tensor(
                [[*piece.blocks, *[0] * (width - len(piece.blocks))] for piece in pieces]
            ),
            is_prompt=is_prompt,
        )
        logit_rows = [
            row
            for piece, stop in zip(pieces, bounds[1:], strict=True)
            for row in range(stop - piece.num_logits, stop)
        ]
        tokens = torch.tensor([token for piece in pieces for token in piece.tokens])
        wanted = torch.tensor(logit_rows, dtype=torch.int64)
        return self.decoder.forward(tokens, rows, self.kv, view, wanted)


def _piece(index: int, span: Span, is_prompt: bool) -> _Piece | None:
    """The part of a span before the end of its prompt, or the part from there on."""
    end = min(max(len(span.request.prompt), span.start), span.stop)  # of the prompt's part
    start, stop = (span.start, end) if is_prompt else (end, span.stop)
    if start == stop:
        return None
    num_logits = span.num_logits if stop == span.stop else 0
    assert num_logits <= stop - start, "logits of a prompt and of its answer in one span"
    tokens = span.tokens[start - span.start : stop - span.start]
    return _Piece(index, start, tokens, num_logits, span.request.blocks)
