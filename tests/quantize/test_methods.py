"""Methods make the error that they are about smaller, and stay on the levels they are allowed."""

import pytest
import torch
from torch import Tensor

from qspec_llm.quantize.matrices import Method, store_matrices
from qspec_llm.weights.methods import (
    LevelRange,
    Moments,
    compensated,
    fit_levels,
    refit_scale,
    search_scale,
    symmetric_range,
    toward_zero_range,
)
from qspec_llm.weights.planes import verify_weight
from qspec_llm.weights.quantize import Recipe, Target

N, K, GROUP = 48, 128, 32


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1)).bfloat16().float()


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """Inputs whose columns go together, and some of which are large, as in a model."""
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(600, 24, generator=generator) @ torch.randn(24, K, generator=generator)
    noise = torch.randn(600, K, generator=generator)
    return (mixed + noise) * torch.linspace(0.2, 3, K)


def ranges(weight: Tensor) -> list[LevelRange]:
    return [toward_zero_range(weight), symmetric_range()]


def dequantised(levels: Tensor, scale: Tensor) -> Tensor:
    return levels.float() * scale.repeat_interleave(K // scale.shape[1], 1)


def loss(found: Tensor, wanted: Tensor, moments: Moments) -> float:
    error = found - wanted
    return float(((error @ moments.second) * error).sum())


def nearest(weight: Tensor, scale: Tensor, levels: LevelRange) -> Tensor:
    step = scale.repeat_interleave(GROUP, 1)
    return levels.nearest(weight, step).to(torch.int8)


@pytest.mark.parametrize("kind", [0, 1])
def test_each_method_beats_the_one_before(weight: Tensor, inputs: Tensor, kind: int) -> None:
    levels, moments = ranges(weight)[kind], Moments.of(inputs)
    curvature = moments.damped(0.01)
    largest = weight.view(N, -1, GROUP).abs().amax(-1) / 7
    plain = search_scale(weight, GROUP, levels)
    scale = search_scale(weight, GROUP, levels, moments.second.diagonal())
    fitted = fit_levels(weight, scale, levels, curvature)
    refitted = refit_scale(fitted, weight, scale, curvature)
    losses = [
        loss(dequantised(codes, steps), weight, moments)
        for codes, steps in (
            (nearest(weight, largest, levels), largest),
            (nearest(weight, scale, levels), scale),
            (fitted, scale),
        )
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < 0.7 * losses[1]
    assert loss(dequantised(fitted, refitted), weight, moments) < losses[2]
    assert not torch.equal(plain, scale)


def test_signed_levels_never_cross_zero(weight: Tensor, inputs: Tensor) -> None:
    levels, moments = toward_zero_range(weight), Moments.of(inputs)
    scale = search_scale(weight, GROUP, levels, moments.second.diagonal())
    wanted = weight + torch.randn(N, K, generator=torch.Generator().manual_seed(3))
    fitted = fit_levels(wanted, scale, levels, moments.damped(0.1))
    assert fitted.abs().max() <= 7
    assert ((fitted == 0) | ((fitted < 0) == (weight < 0))).all()
    assert (nearest(wanted, scale, symmetric_range()) * weight < 0).any()  # it would have mattered


def test_negative_zero_is_negative() -> None:
    levels = toward_zero_range(torch.tensor([[-0.0, 0.0]]))
    assert levels.low.tolist() == [[-7, 0]]
    assert levels.high.tolist() == [[0, 7]]


@pytest.mark.parametrize("method", [Method.RTN, Method.MSE, Method.AWQ, Method.GPTQ])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_offsets_lower_the_error(
    weight: Tensor, inputs: Tensor, method: Method, shift: float
) -> None:
    """By a little where weights are centred, by much where they are not."""
    weight, moments = (weight + shift).bfloat16().float(), Moments.of(inputs)
    recipe = Recipe(Target.INT4, GROUP)
    symmetric, asymmetric = (
        store_matrices(weight, [20, N - 20], moments, method, recipe, is_asymmetric=flag)
        for flag in (False, True)
    )
    losses = [
        loss(torch.cat([verify_weight(part) for part in parts]), weight, moments)
        for parts in (symmetric, asymmetric)
    ]
    assert losses[1] < (0.95 if shift == 0 else 0.7) * losses[0]
    assert [part.spec.has_offset for part in asymmetric] == [True, True]


def test_gptq_equals_its_textbook_form(weight: Tensor, inputs: Tensor) -> None:
    """Blocks and columns as rows are only an order of the same sums."""
    levels, curvature = symmetric_range(), Moments.of(inputs).damped(0.05).double()
    scale = search_scale(weight, GROUP, levels)
    upper = torch.linalg.cholesky(torch.linalg.inv(curvature), upper=True)
    rest, expected = weight.double().clone(), torch.empty(N, K)
    for column in range(K):
        step = scale[:, column // GROUP].double()
        code = torch.round(rest[:, column] / step).clamp(-8, 7)
        loss_of = (rest[:, column] - code * step) / upper[column, column]
        rest[:, column:] -= loss_of[:, None] * upper[column, column:]
        expected[:, column] = code
    found = fit_levels(weight, scale, levels, Moments.of(inputs).damped(0.05))
    assert (found != expected).float().mean() < 0.002  # ties and float32


def test_compensation_is_least_squares(weight: Tensor, inputs: Tensor) -> None:
    exact = inputs + 0.3 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(4))
    moments = Moments.of(inputs, exact)
    wanted = exact @ weight.T
    best = torch.linalg.lstsq(inputs.double(), wanted.double()).solution.T.float()
    assert torch.allclose(compensated(weight, moments, 1.0, 0.0), best, atol=1e-3)
    assert compensated(weight, moments, 0.0, 0.1) is weight
    assert compensated(weight, Moments.of(inputs), 1.0, 0.1) is weight


def test_columns_that_are_always_zero_do_no_harm(weight: Tensor, inputs: Tensor) -> None:
    inputs = inputs.clone()
    inputs[:, 5] = 0
    curvature = Moments.of(inputs).damped(0.0)
    levels = symmetric_range()
    scale = search_scale(weight, GROUP, levels)
    codes = fit_levels(weight, scale, levels, curvature)
    assert torch.equal(codes[:, 5], nearest(weight, scale, levels)[:, 5])


def test_scales_are_what_bf16_holds(weight: Tensor, inputs: Tensor) -> None:
    levels, curvature = toward_zero_range(weight), Moments.of(inputs).damped(0.1)
    scale = search_scale(weight, GROUP, levels)
    refitted = refit_scale(fit_levels(weight, scale, levels, curvature), weight, scale, curvature)
    for values in (scale, refitted):
        assert torch.equal(values, values.bfloat16().float())
        assert (values > 0).all()


def test_a_group_of_zeros_keeps_a_scale() -> None:
    weight = torch.zeros(2, 64)
    levels = toward_zero_range(weight)
    scale = search_scale(weight, 32, levels)
    codes = fit_levels(weight, scale, levels, torch.eye(64))
    assert not codes.any()
    assert torch.equal(refit_scale(codes, weight, scale, torch.eye(64)), scale)
