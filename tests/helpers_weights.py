"""Comparisons and small makers that the tests of weights, model and kernels share."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.weights.pack import pack_nibbles, unpack_nibbles
from qspec_llm.weights.planes import Dense, Grid, Planes, PlaneSpec, Stored

FORMS = {
    "signed16": {"bits": 16, "grid": Grid.SIGNED},
    "signed8": {"bits": 8, "grid": Grid.SIGNED},
    "signed8_draft8": {"bits": 8, "grid": Grid.SIGNED, "draft_bits": 8},
    "affine4": {"bits": 4, "grid": Grid.AFFINE},
    "affine4_offset": {"bits": 4, "grid": Grid.AFFINE, "has_offset": True},
    "affine4_f16": {
        "bits": 4, "grid": Grid.AFFINE, "has_offset": True, "scale_dtype": torch.float16
    },
    "affine8": {"bits": 8, "grid": Grid.AFFINE, "scale_dtype": torch.float16},
    "affine8_draft8": {"bits": 8, "grid": Grid.AFFINE, "draft_bits": 8},
    "affine8_offset": {"bits": 8, "grid": Grid.AFFINE, "has_offset": True},
}  # fmt: skip


@contextmanager
def refused(*words: object) -> Iterator[None]:
    """What runs inside raises QSpecError: one line that holds every one of `words`."""
    with pytest.raises(QSpecError) as caught:
        yield
    message = str(caught.value)
    assert message.strip(), "the error says nothing"
    assert "\n" not in message, message
    for word in words:
        assert str(word) in message, f"{word!r} is not in: {message}"


def bits(x: Tensor) -> Tensor:
    """The patterns of a float tensor, so that -0.0 and NaN compare as what they are."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal dtype, shape and bits."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.is_floating_point():
        actual, expected = bits(actual), bits(expected)
    differs = (actual != expected).nonzero()
    assert differs.numel() == 0, f"{len(differs)} differ, the first at {differs[0].tolist()}"


def assert_same_stored(actual: Stored, expected: Stored) -> None:
    """The same form, the same reason or spec, the same bits."""
    if isinstance(expected, Dense):
        assert isinstance(actual, Dense)
        assert actual.reason == expected.reason
        assert_same_bits(actual.weight, expected.weight)
        return
    assert isinstance(actual, Planes)
    assert actual.spec == expected.spec
    assert actual.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        assert_same_bits(actual.tensors()[name], tensor)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Norm-relative error, measured in float64."""
    assert actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    error = float((actual - expected).norm() / expected.norm().clamp(min=1e-300))
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """Ordinary values with a few heavy tails and zeros, float32."""
    x = torch.randn(*shape, generator=generator(seed))
    chance = torch.rand(*shape, generator=generator(seed + 1))
    x = torch.where(chance < 0.01, x * 20, x)
    return torch.where(chance > 0.95, torch.zeros(()), x)


def random_planes(
    form: str, num_rows: int, num_cols: int, group: int = 32, seed: int = 0
) -> Planes:
    """Planes of any form whose codes are all equally likely (16-bit ones hold finite weights)."""
    spec = PlaneSpec(num_rows, num_cols, group=group, **FORMS[form])
    rng = generator(seed)
    tensors = {}
    for name, (shape, dtype) in spec.shapes().items():
        if dtype == torch.uint8:
            tensors[name] = torch.randint(0, 256, shape, dtype=dtype, generator=rng)
        else:
            tensors[name] = (torch.rand(shape, generator=rng) * 0.02 + 0.005).to(dtype)
    if spec.bits == 16:  # residuals 3084..3595: within half an octave or so of the anchor
        codes = unpack_nibbles(tensors["r4"], group).flatten(1) & 1
        tensors["r4"] = pack_nibbles(codes + 12, group)
    if "offset" in tensors:
        tensors["offset"] = tensors["offset"] * -8
    return Planes.from_tensors(spec, tensors)
