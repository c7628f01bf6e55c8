"""The adapter for lm-eval: scores of the verify view, drafts that change none, local tasks."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers_weights import refused

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval and datasets have plenty

from qspec_llm.cli import main
from qspec_llm.eval.forced import Script, read_along, runner_for
from qspec_llm.eval.lm_eval import QSpecLM, evaluate_tasks
from qspec_llm.llm import LLM

Load = Callable[..., LLM]


def instance(*args: object) -> SimpleNamespace:
    return SimpleNamespace(args=args)


@pytest.fixture
def adapter(load: Load) -> QSpecLM:
    return QSpecLM(llm=load("bf16"))


def by_hand(llm: LLM, context: str, answer: str) -> tuple[float, bool]:
    script = Script(tuple(llm.encode(context)), tuple(llm.encode(answer)))
    runners = {"verify": runner_for(llm.decoder, [script], 1)}
    total, is_greedy = 0.0, True
    for step in read_along(runners, [script], llm.tokenizer):
        table = torch.log_softmax(step.logits["verify"].double(), -1)[0]
        total += float(table[step.next_tokens])
        is_greedy &= int(table.argmax()) == int(step.next_tokens)
    return total, is_greedy


def test_loglikelihoods_are_the_verify_views(load: Load, adapter: QSpecLM) -> None:
    pairs = [("the sky is", " blue"), ("a", "b"), ("one two three", " four five")]
    found = adapter.loglikelihood([instance(*pair) for pair in pairs])
    for pair, (total, is_greedy) in zip(pairs, found, strict=True):
        expected = by_hand(load("bf16"), *pair)
        assert total == pytest.approx(expected[0], rel=1e-3)
        assert is_greedy == expected[1]


def test_a_greedy_continuation_is_called_greedy(adapter: QSpecLM) -> None:
    (text,) = adapter.generate_until([instance("hello", {"until": [], "max_gen_toks": 4})])
    if text.isascii() and text:  # only then do the bytes survive the way through text
        assert adapter.loglikelihood([instance("hello", text)])[0][1]


def test_rolling_likelihoods_cover_a_text_of_any_length(adapter: QSpecLM) -> None:
    short, long = "some text", "some longer text " * 40  # the context holds 256 tokens
    (one, many) = adapter.loglikelihood_rolling([instance(short), instance(long)])
    assert many < one < 0


def test_generation_stops_where_the_task_says(load: Load, adapter: QSpecLM) -> None:
    options = {"until": [], "max_gen_toks": 24, "do_sample": False}
    (whole,) = adapter.generate_until([instance("hello", options)])
    stop = whole[len(whole) // 2]
    (cut,) = adapter.generate_until([instance("hello", {**options, "until": [stop]})])
    assert cut == whole[: whole.index(stop)]


def test_unknown_generation_options_are_refused(adapter: QSpecLM) -> None:
    with refused("num_beams"):
        adapter.generate_until([instance("hello", {"num_beams": 4})])


def write_task(path: Path) -> Path:
    records = [
        {"question": "a b c", "choices": [" d", " x"], "answer": 0},
        {"question": "1 2 3", "choices": [" 9", " 4"], "answer": 1},
    ]
    data = path / "data.json"
    data.write_text("\n".join(map(json.dumps, records)))
    task = path / "letters.yaml"
    task.write_text(
        f"""\
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
    )
    return task


def test_a_local_task_needs_no_network(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    llm = load("bf16")
    task = write_task(tmp_path)
    plain = evaluate_tasks(llm, [str(task)], gamma=0)
    drafted = evaluate_tasks(llm, [str(task)], gamma=3)
    assert plain == drafted
    (figures,) = plain.values()
    adapter = QSpecLM(llm=llm)
    right = 0
    for text, choices, answer in (("a b c", (" d", " x"), 0), ("1 2 3", (" 9", " 4"), 1)):
        scores = [adapter.loglikelihood([instance(text, choice)])[0][0] for choice in choices]
        right += scores.index(max(scores)) == answer
    assert figures["acc,none"] == right / 2


def test_data_that_is_not_here_is_one_sentence(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with refused("arc_easy", "not here", ".yaml"):
        evaluate_tasks(load("bf16"), ["arc_easy"], limit=1)
    with refused("no_such_task"):
        evaluate_tasks(load("bf16"), ["no_such_task"])
    with refused("/nowhere.yaml"):
        evaluate_tasks(load("bf16"), ["/nowhere.yaml"])


def test_the_command_runs_tasks(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = write_task(tmp_path)
    assert main(["eval", str(model_dir), "--tasks", str(task), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= report["tasks"]["letters"]["acc,none"] <= 1
