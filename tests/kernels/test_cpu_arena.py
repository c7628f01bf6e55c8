"""Where packed tensors lie: apart from each other, in chunks that die with the last of them."""

import gc
import weakref

import pytest
import torch

from qspec_llm.errors import QSpecError

pytest.importorskip("qspec_llm.kernels.cpu", exc_type=QSpecError)

from qspec_llm.kernels.cpu import arena


def test_tensors_are_aligned_and_apart() -> None:
    memory = arena.Arena()
    shapes = [(3, 5), (1,), (7, 11, 2), (64,)]
    dtypes = [torch.uint8, torch.bfloat16, torch.float32, torch.uint8]
    tensors = [memory.empty(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    for value, (tensor, shape, dtype) in enumerate(zip(tensors, shapes, dtypes, strict=True)):
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % arena.ALIGNMENT == 0
        assert (tensor == value).all()


def test_chunks_do_not_outlive_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "CHUNK", 4096)
    memory = arena.Arena()
    tensors = [memory.empty((n,), torch.uint8) for n in (1000, 2000, 1000, 1000, 1000, 1000)]
    chunks = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    first, large, last = chunks[0], chunks[1], chunks[-1]
    assert chunks == [first, large, first, first, first, last]  # the sixth did not fit
    assert len({first, large, last}) == 3
    ended = weakref.ref(tensors[0].untyped_storage())
    del tensors[2:5]
    gc.collect()
    assert ended() is not None
    del tensors[0]
    gc.collect()
    assert ended() is None
