"""Decoding with a coin: what can be known of it without a GPU."""

import pytest

from qspec_llm.bench.synthetic import SyntheticRun, tokens_before
from qspec_llm.engine.engine import Gamma


@pytest.mark.parametrize("gamma", [1, 4, 16, "auto"])
def test_answers_outlast_the_reading_of_all_prompts(gamma: Gamma) -> None:
    for batch in (1, 8, 32, 64, 128):
        assert tokens_before(batch, 1024, gamma) > tokens_before(batch, 1024, 0)


def test_a_coin_of_average_luck() -> None:
    def run(gamma: Gamma) -> SyntheticRun:
        return SyntheticRun(
            batch=2,
            gamma=gamma,
            tokens_per_second=0.0,
            seconds_per_cycle=0.5,
            tokens_per_cycle=0.0,
            host_share=0.0,
        )

    assert run(0).expected_speed(0.9) == 4.0
    assert run(2).expected_speed(0.5) == pytest.approx(4 * (1 + 0.5 + 0.25))
    assert run("auto").expected_speed(0.9) is None
