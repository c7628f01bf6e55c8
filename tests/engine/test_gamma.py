"""The choice of gamma: the best by cost and acceptance, never much worse than none."""

import itertools
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest

from helpers_engine import DRAFT, ByteTokenizer, drain, greedy, tiny_decoder
from helpers_weights import refused
from qspec_llm.engine.accept import Accepted
from qspec_llm.engine.batch import Batch, Span
from qspec_llm.engine.costs import StepCosts, kernel_build, load_costs, measure_costs, save_costs
from qspec_llm.engine.engine import Engine
from qspec_llm.engine.gamma import GammaChooser, expected_tokens
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.request import Request
from qspec_llm.engine.runner import Runner
from qspec_llm.engine.text import TextStream
from qspec_llm.kv.pool import allocate
from qspec_llm.weights.quantize import Target


def costs(draft: float, per_row: float, *, per_key: float = 0.0) -> StepCosts:
    """A plain step of one request costs 1, each further row `per_row`, a draft step `draft`."""
    batches, gammas = (1, 2, 4, 8, 16, 32), (0, 1, 2, 3, 4, 6, 8)
    return StepCosts(
        batches,
        gammas,
        tuple(draft + per_row * 0.3 * (size - 1) for size in batches),
        tuple(
            tuple(1 + per_row * (size * (gamma + 1) - 1) for gamma in gammas) for size in batches
        ),
        per_key * 0.5,
        per_key,
    )


def requests(num: int, first_id: int = 0) -> list[Request]:
    return [
        Request(
            request_id=first_id + index,
            prompt=(1,) * 10,
            params=greedy(1000),
            seed=0,
            sample=0,
            gamma=0,
            max_total=10_000,
            stop_ids=frozenset(),
            text=TextStream(ByteTokenizer(), ()),
            is_auto=True,
            output=[1],
            committed=10,
        )
        for index in range(num)
    ]


class Simulation:
    """Requests whose drafts stand with given chances, on a machine whose steps cost what is said.

    `measured` is what the chooser believes; `true` what time really goes by. Of its draft and
    verify steps, a share `held_up` takes thrice as long, and the first cycles take `cold` times as
    long, 1.5 or so, and ever less; both count for the chooser alone.
    """

    def __init__(
        self,
        chances: Sequence[float],
        measured: StepCosts,
        true: StepCosts | None = None,
        held_up: float = 0.0,
        cold: float = 1.0,
    ) -> None:
        self.held_up, self.cold = held_up, cold
        self.chooser = GammaChooser(measured)
        self.requests = requests(len(chances))
        self.chances, self.true = chances, true or measured
        self.rng = random.Random(0)
        self.num_tokens, self.seconds = 0, 0.0

    def run(self, num_cycles: int) -> None:
        for _ in range(num_cycles):
            self.chooser.choose(self.requests)
            outcomes, spans = [], []
            for request, chance in zip(self.requests, self.chances, strict=True):
                draws = [self.rng.random() < chance for _ in range(request.gamma)]
                num_accepted = sum(1 for _ in itertools.takewhile(bool, draws))
                outcomes.append(Accepted((1,) * (num_accepted + 1), num_accepted))
                spans.append(Span(request, request.num_tokens - 1, (1,), 1, request.gamma))
                self.num_tokens += num_accepted + 1
            gammas = [request.gamma for request in self.requests]
            live = [sum(each > step for each in gammas) for step in range(max(gammas))]
            keys = 10.0
            draft = sum(self.true.draft_step(size, size * keys) for size in live)
            num_rows = len(gammas) + sum(live)
            verify = self.true.verify_step(len(gammas), num_rows, num_rows * keys)
            self.seconds += draft + verify
            draft, verify = self.seen(draft), self.seen(verify)
            self.cold = 1 + 0.85 * (self.cold - 1)
            self.chooser.learn(Batch(tuple(spans)), outcomes, (draft, verify))

    def seen(self, seconds: float) -> float:
        seconds *= self.cold
        return seconds * 3 if self.held_up and self.rng.random() < self.held_up else seconds

    @property
    def speed(self) -> float:
        """Tokens a second, in those of plain decoding."""
        size = len(self.requests)
        return self.num_tokens / self.seconds / (size / self.true.verify_step(size, size, 0))


def best_speed(chance: float, size: int, true: StepCosts) -> float:
    plain = size / true.verify_step(size, size, 0)
    return max(
        size
        * expected_tokens(chance, gamma)
        / (gamma * true.draft_step(size, 0) + true.verify_step(size, size * (gamma + 1), 0))
        / plain
        for gamma in range(9)
    )


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("draft", [0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("per_row", [0.01, 0.1, 0.5])
def test_near_the_best_and_never_below_098_of_plain(draft, per_row, chance, size):
    simulation = Simulation([chance] * size, costs(draft, per_row))
    simulation.run(1000)
    assert simulation.speed >= 0.98
    best = best_speed(chance, size, costs(draft, per_row))
    # what is learnt from single cycles is noisy, and LEAST_GAIN forgoes the smallest gains
    assert simulation.speed >= 0.9 * best


def test_requests_that_agree_draft_and_those_that_do_not_do_not():
    chances = [0.95, 0.05, 0.95, 0.05]
    simulation = Simulation(chances, costs(0.2, 0.05))
    simulation.run(200)
    simulation.chooser.choose(simulation.requests)
    gammas = [request.gamma for request in simulation.requests]
    assert min(gammas[0], gammas[2]) > 0
    assert max(gammas[1], gammas[3]) == 0


def test_load_and_context_are_costs_too():
    """The more rows a step has, or the more keys they see, the less a draft is worth."""
    chosen = []
    for size in (1, 4, 16):
        simulation = Simulation([0.8] * size, costs(0.3, 0.3))
        simulation.run(200)
        gammas = []
        for _ in range(9):  # one of them may be plain, or a probe
            simulation.run(1)
            gammas.append(simulation.requests[0].gamma)
        chosen.append(statistics.median(gammas))
    assert chosen[0] > chosen[1] >= chosen[2] == 0
    chooser = GammaChooser(costs(0.3, 0.01, per_key=1.0))
    (request,) = requests(1)
    request.prompt = (1,) * 2000
    chooser.choose([request])
    assert request.gamma < chosen[0]


def test_costs_that_were_measured_wrong_are_corrected():
    simulation = Simulation([0.8], costs(0.2, 0.05), true=costs(0.9, 0.05))
    simulation.run(3000)
    assert simulation.speed >= 0.98


@pytest.mark.parametrize("held_up", [0.0, 0.03])
@pytest.mark.parametrize("factor", [0.7, 1.15, 1.3, 1.6])
@pytest.mark.parametrize("chance", [0.5, 0.7, 0.8])
@pytest.mark.parametrize("size", [1, 4, 8])
def test_a_table_wrong_about_drafts_alone_is_corrected(size, chance, factor, held_up):
    """Plain steps take what the table says, those with drafts do not."""
    measured = costs(0.3, 0.1)
    rows = tuple((row[0], *(seconds * factor for seconds in row[1:])) for row in measured.verify)
    simulation = Simulation([chance] * size, measured, replace(measured, verify=rows), held_up)
    simulation.run(2000)
    assert simulation.speed >= 0.98
    assert simulation.speed >= 0.92 * best_speed(chance, size, simulation.true)


@pytest.mark.parametrize("cold", [1.4, 1.8])
@pytest.mark.parametrize("draft", [0.95, 1.0])
@pytest.mark.parametrize("believed", [0.5, 0.7])
def test_slow_first_cycles_do_not_make_plain_decoding_look_slow(believed, draft, cold):
    """As after every prompt: weights, tables and code are cold."""
    measured = costs(believed, 0.05)
    simulation = Simulation([0.95], measured, replace(measured, draft=(draft,) * 6), cold=cold)
    simulation.run(150)
    assert simulation.speed >= 0.98


def test_where_plain_steps_are_faster_than_measured_drafts_may_be_too():
    """A machine that was busy when costs were measured: all of them are wrong alike."""
    measured = costs(0.3, 0.1)
    true = replace(
        measured,
        draft=tuple(each * 0.6 for each in measured.draft),
        verify=tuple(tuple(each * 0.6 for each in row) for row in measured.verify),
    )
    simulation = Simulation([0.6], measured, true)
    simulation.run(300)
    assert simulation.speed >= 0.95 * best_speed(0.6, 1, true) > 1.05


def test_acceptance_that_changes_is_noticed():
    simulation = Simulation([0.1], costs(0.3, 0.05))
    simulation.run(500)
    simulation.chances = [0.98]
    simulation.run(3000)
    assert simulation.requests[0].gamma >= 3
    simulation.chances = [0.0]
    simulation.run(100)
    simulation.num_tokens, simulation.seconds = 0, 0.0
    simulation.run(1000)
    assert simulation.speed >= 0.98


def test_no_probe_where_no_acceptance_would_pay():
    simulation = Simulation([0.9], costs(1.1, 0.5))
    simulation.run(10)
    simulation.num_tokens = 0
    simulation.run(500)
    assert simulation.num_tokens == 500


def test_fixed_gammas_are_left_alone():
    chooser = GammaChooser(costs(0.3, 0.05))
    auto, fixed = requests(2)
    fixed.is_auto, fixed.gamma = False, 5
    chooser.choose([auto, fixed])
    assert fixed.gamma == 5
    assert auto.gamma > 0


def test_finished_and_aborted_requests_are_forgotten():
    simulation = Simulation([0.9] * 3, costs(0.3, 0.05))
    simulation.run(3)
    assert len(simulation.chooser._each) == 3
    simulation.requests[0].finish_reason = "stop"
    simulation.run(1)
    simulation.chooser.forget(1)
    assert set(simulation.chooser._each) == {2}


# With a real engine


def auto_engine(decoder, step_costs, **options) -> Engine:
    runner = Runner(decoder, allocate(decoder.config, 64, decoder.dtype))
    return Engine(
        runner, ByteTokenizer(), DRAFT, gamma="auto", max_batch=4, costs=step_costs, **options
    )


def test_greedy_answers_do_not_depend_on_the_choice(monkeypatch):
    learn = GammaChooser.learn  # without this machine's clock: costs stay those of the table
    monkeypatch.setattr(
        GammaChooser, "learn", lambda self, batch, accepted, _: learn(self, batch, accepted, None)
    )
    decoder = tiny_decoder(Target.INT8)
    prompts = [[index, 3, index * 2] for index in range(6)]
    outputs, drafted = [], []
    for step_costs in (costs(0.05, 0.01), costs(3.0, 2.0)):
        engine = auto_engine(decoder, step_costs)
        group = [engine.add(prompt, greedy(60)) for prompt in prompts]
        drain(engine)
        outputs.append([request.output for request in group])
        drafted.append(sum(request.num_drafted for request in group))
    assert outputs[0] == outputs[1]
    assert drafted[0] > 0 == drafted[1]


def test_seeded_sampling_does_not_depend_on_the_load():
    decoder, params = tiny_decoder(Target.INT8), SamplingParams(seed=5, max_tokens=40)
    alone = auto_engine(decoder, costs(0.05, 0.01))
    expected = alone.add([1, 2], params)
    drain(alone)
    busy = auto_engine(decoder, costs(0.05, 0.01))
    others = [busy.add([index], greedy(80)) for index in range(3)]
    request = busy.add([1, 2], params)
    drain(busy)
    assert request.output == expected.output
    assert request.num_drafted == 0
    assert any(other.num_drafted for other in others)


def test_auto_needs_costs():
    decoder = tiny_decoder(Target.INT8)
    runner = Runner(decoder, allocate(decoder.config, 8, decoder.dtype))
    with refused("auto", "step costs"):
        Engine(runner, ByteTokenizer(), DRAFT, gamma="auto", max_batch=1)
    engine = Engine(runner, ByteTokenizer(), DRAFT, gamma=1, max_batch=1)
    with refused("auto"):
        engine.add([1], greedy(1), gamma="auto")


# Measuring


def test_measured_costs_are_kept_and_read(tmp_path):
    decoder = tiny_decoder(Target.BF16)
    runner = Runner(decoder, allocate(decoder.config, 32, decoder.dtype))
    measured = measure_costs(runner, ByteTokenizer(), DRAFT, max_batch=3, budget=0.5)
    assert measured.batches[0] == 1
    assert measured.batches[-1] == 3
    assert all(seconds > 0 for row in measured.verify for seconds in row)
    assert 0 <= measured.draft_per_key <= measured.verify_per_key
    key = {"model": "tiny", "threads": 1}
    assert load_costs(tmp_path, key) is None
    save_costs(tmp_path / "new", key, measured)
    assert load_costs(tmp_path / "new", key) == measured
    assert load_costs(tmp_path / "new", {**key, "threads": 2}) is None


def test_costs_of_other_kernels_are_not_these(tmp_path, monkeypatch):
    monkeypatch.setattr("qspec_llm.kernels.__path__", [str(tmp_path)])
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "_cpu.so").write_bytes(b"one")
    first = kernel_build()
    assert kernel_build() == first
    (tmp_path / "notes.txt").write_text("no kernel")
    assert kernel_build() == first
    (tmp_path / "cpu" / "_cpu.so").write_bytes(b"two")
    assert kernel_build() != first


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 99, "key": {}}'])
def test_a_spoilt_file_is_as_good_as_none(text, tmp_path):
    key = {"model": "tiny"}
    save_costs(tmp_path, key, costs(0.3, 0.1))
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    assert load_costs(tmp_path, key) is None


def test_a_directory_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    save_costs(tmp_path / "file", {}, costs(0.3, 0.1))


def test_interpolation_meets_the_points_and_goes_on():
    table = costs(0.3, 0.1, per_key=0.001)
    assert table.verify_step(4, 12, 0) == pytest.approx(1 + 0.1 * 11)
    assert table.verify_step(3, 9, 0) == pytest.approx(1 + 0.1 * 8)
    assert table.verify_step(2, 34, 0) == pytest.approx(1 + 0.1 * 33)  # gamma 16
    assert table.draft_step(64, 0) == pytest.approx(0.3 + 0.03 * 63)
    assert table.verify_step(1, 1, 1064) == pytest.approx(2.0)
