"""Whether a decoder's cycles can run as captured graphs; imports nothing of the GPU where not."""

from collections.abc import Callable

from qspec_llm.engine.engine import Advancer
from qspec_llm.kernels import LayerKV
from qspec_llm.kv.blocks import BlockAllocator
from qspec_llm.model.decoder import Decoder
from qspec_llm.weights.view import View

__all__ = ["graphs_of"]


def graphs_of(
    decoder: Decoder,
    kv: tuple[LayerKV, ...],
    draft_view: View,
    max_batch: int,
    chance: float | None = None,
) -> Callable[[BlockAllocator], Advancer] | None:
    """What `Engine` takes as `graphs`: `engine/cycle.Cycles` on the cuda backend, else None.

    `chance` is for benchmarks only: drafts stand by a coin with this chance, not by what the verify
    view chose.
    """
    if decoder.ops.name != "cuda":
        return None
    from qspec_llm.engine.cycle import Cycles

    return lambda blocks: Cycles(decoder, kv, draft_view, blocks, max_batch, chance)
