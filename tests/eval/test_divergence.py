"""Figures of known distributions, by hand."""

import math

import pytest
import torch

from qspec_llm.eval.divergence import Divergence, measure
from qspec_llm.eval.forced import Step

VERIFY = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
OTHER = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]).log()


def figures() -> dict[str, Divergence]:
    made: dict[str, Divergence] = {}
    step = Step((0, 1), torch.tensor([0, 1]), {"verify": VERIFY, "a8": OTHER})
    measure(made, step, reference="verify")
    return made


def test_figures_by_hand() -> None:
    summary = figures()["a8"].summary()
    kl = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert summary["tokens"] == 2
    assert summary["kl_mean"] == pytest.approx(kl / 2, rel=1e-6)
    assert summary["kl_p99"] == pytest.approx(kl, rel=1e-6)
    assert summary["perplexity"] == pytest.approx((0.25 * 0.8) ** -0.5, rel=1e-6)
    assert summary["flips"] == 0.5
    assert summary["agreement"] == 0.5
    assert summary["agreement_top2"] == 1.0
    assert summary["overlap"] == pytest.approx((0.75 + 1) / 2, rel=1e-6)


def test_a_reading_does_not_diverge_from_itself() -> None:
    summary = figures()["verify"].summary()
    assert summary["kl_mean"] == 0
    assert summary["flips"] == 0
    assert summary["agreement"] == 1


def test_a_token_of_no_probability_costs_nothing_where_the_reference_has_none() -> None:
    reference = torch.tensor([[0.0, -torch.inf, 0.0, 0.0]])
    made: dict[str, Divergence] = {}
    step = Step((0,), torch.tensor([0]), {"verify": reference, "a8": reference + 1})
    measure(made, step, reference="verify")
    assert made["a8"].summary()["kl_mean"] == pytest.approx(0, abs=1e-6)
