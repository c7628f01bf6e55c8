"""The Hadamard rotation against its matrix."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from helpers_weights import assert_same_bits, gaussian
from qspec_llm.weights.hadamard import order_for, transform

SIZES = [(64, 64), (64, 576), (8, 24), (1, 45), (2, 6), (128, 4096)]


def matrix(order: int, num_cols: int) -> Tensor:
    """H (x) I in float64."""
    hadamard = np.kron(scipy.linalg.hadamard(order), np.eye(num_cols // order))
    return torch.from_numpy(hadamard / np.sqrt(order))


@pytest.mark.parametrize(("order", "num_cols"), SIZES)
def test_it_is_the_product_with_the_matrix(order: int, num_cols: int) -> None:
    x = gaussian(5, num_cols)
    expected = x.double() @ matrix(order, num_cols)
    torch.testing.assert_close(transform(x, order).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("order", "num_cols"), SIZES)
def test_it_is_its_own_inverse_and_keeps_products(order: int, num_cols: int) -> None:
    x, weight = gaussian(3, num_cols), gaussian(7, num_cols, seed=3)
    torch.testing.assert_close(transform(transform(x, order), order), x, rtol=0, atol=2e-5)
    product = transform(x, order).double() @ transform(weight, order).double().T
    torch.testing.assert_close(product, x.double() @ weight.double().T, rtol=0, atol=1e-3)


def test_a_row_does_not_depend_on_the_others() -> None:
    x = gaussian(17, 576)
    together = transform(x, 64)
    for index in range(17):
        assert_same_bits(transform(x[index : index + 1], 64)[0], together[index])


def test_one_large_channel_is_spread_over_the_order() -> None:
    x = torch.zeros(1, 576)
    x[0, 100] = 64.0
    assert transform(x, 64).abs().amax() == 8.0


@pytest.mark.parametrize(
    ("num_cols", "largest", "expected"),
    [(576, 64, 64), (576, 512, 64), (1536, 512, 512), (96, 64, 32), (45, 64, 1), (4096, 64, 64)],
)
def test_the_order_is_the_largest_power_of_two_that_fits(
    num_cols: int, largest: int, expected: int
) -> None:
    assert order_for(num_cols, largest) == expected


def test_the_example_of_the_format() -> None:
    rotated = transform(torch.tensor([1.0, 2, 3, 4, 5, 6]), order_for(6, 4))
    expected = torch.tensor([5.0, 7, 9, -3, -3, -3]) / 2**0.5
    torch.testing.assert_close(rotated, expected)
