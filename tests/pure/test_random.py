"""Philox against Random123's known answers, and the streams built on it."""

import pytest
import torch
from scipy import stats

from qspec_llm.engine.random import Stream, philox, uniform

# kat_vectors of Random123: philox4x32 10, counter, key -> output
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_known_answers(counter, key, output):
    k0, k1 = words(key)
    assert philox(torch.tensor(words(counter)), (k0, k1)).tolist() == words(output)


def test_a_batch_of_counters_equals_each_alone():
    counters = torch.randint(1 << 32, (3, 5, 4), generator=torch.Generator().manual_seed(0))
    together = philox(counters, (1, 2))
    assert together.shape == counters.shape
    for row, column in ((0, 0), (2, 4)):
        assert torch.equal(together[row, column], philox(counters[row, column], (1, 2)))


def test_a_draw_is_a_function_of_its_key_alone():
    positions = torch.arange(100)
    draws = uniform(7, 0, positions, Stream.ACCEPT)
    assert torch.equal(uniform(7, 0, positions[40:41], Stream.ACCEPT), draws[40:41])
    assert torch.equal(uniform(7, 0, positions.flip(0), Stream.ACCEPT), draws.flip(0))


@pytest.mark.parametrize(
    ("seed", "sample", "shift", "stream"),
    [
        (8, 0, 0, Stream.ACCEPT),
        (7 + (1 << 32), 0, 0, Stream.ACCEPT),
        (7, 1, 0, Stream.ACCEPT),
        (7, 0, 1, Stream.ACCEPT),
        (7, 0, 0, Stream.PROPOSAL),
        (7, 0, 0, Stream.RESIDUAL),
    ],
)
def test_every_part_of_the_key_counts(seed, sample, shift, stream):
    positions = torch.arange(100)
    draws = uniform(7, 0, positions, Stream.ACCEPT)
    assert not (draws == uniform(seed, sample, positions + shift, stream)).any()


def test_a_negative_seed_is_its_64_bit_pattern():
    positions = torch.arange(4)
    assert torch.equal(
        uniform(-1, 0, positions, Stream.ACCEPT), uniform(2**64 - 1, 0, positions, Stream.ACCEPT)
    )


@pytest.mark.parametrize("stream", Stream)
def test_draws_are_uniform_and_below_one(stream):
    draws = uniform(1, 0, torch.arange(100_000), stream)
    assert draws.dtype == torch.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws, bins=64, min=0, max=1)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_streams_and_neighbours_are_independent():
    draws = [uniform(1, 0, torch.arange(20_000), stream) for stream in Stream]
    pairs = [(draws[0], draws[1]), (draws[1], draws[2]), (draws[0][1:], draws[0][:-1])]
    for left, right in pairs:
        cells = (left * 8).long() * 8 + (right * 8).long()
        assert stats.chisquare(torch.bincount(cells, minlength=64).numpy()).pvalue > 1e-3
