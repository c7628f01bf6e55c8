"""Quantising whole models: what the streams stand for, resuming, and what comes out."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers_engine import ByteTokenizer
from helpers_model_dir import write_model
from qspec_llm.errors import QSpecError
from qspec_llm.eval.forced import Script, read_along, runner_for
from qspec_llm.kernels import get_backend
from qspec_llm.model.config import read_config
from qspec_llm.model.decoder import Decoder, rope_table
from qspec_llm.model.load import load_decoder
from qspec_llm.quantize.driver import Options, Report, quantize
from qspec_llm.quantize.matrices import Method
from qspec_llm.quantize.streams import Streams, advance, start
from qspec_llm.quantize.text import CalibrationText, Sample, encode, read_samples
from qspec_llm.tokenizer import HFTokenizer
from qspec_llm.weights.checkpoint import open_checkpoint
from qspec_llm.weights.planes import Planes, draft_weight, verify_weight
from qspec_llm.weights.quantize import Recipe, Target
from qspec_llm.weights.view import Activation, draft_view

SENTENCES = [
    Sample("Count.", "one two three four five six seven eight nine ten"),
    Sample("Colours?", "red green blue yellow orange violet black and white"),
    Sample(
        None, "It was a bright cold day, and the clocks were striking thirteen, or so it seemed."
    ),
    Sample("Why?", "because there is no reason that it should not be so"),
]


@pytest.fixture(scope="module")
def text(model: Path) -> CalibrationText:
    return encode(SENTENCES, HFTokenizer(model), 10_000)


def options(target: str = "bf16", method: str = "gptq") -> Options:
    return Options(target=Target(target), method=Method(method), group=32)


def run(model: Path, path: Path, text: CalibrationText, how: Options, **more: object) -> Report:
    return quantize(
        open_checkpoint(model), path, how, text, write_more=HFTokenizer(model).save, **more
    )


def decoder_of(path: Path, target: Target) -> Decoder:
    checkpoint = open_checkpoint(path)
    recipe = Recipe(target, 32)
    reference = get_backend("reference")
    return load_decoder(checkpoint, read_config(checkpoint), recipe, reference, num_positions=256)


def tensors_of(path: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(path)
    values = {}
    for name in checkpoint.names():
        stored = checkpoint.read(name, checkpoint.target)
        parts = stored.tensors() if isinstance(stored, Planes) else {"": stored.weight}
        values |= {f"{name}#{part}": tensor for part, tensor in parts.items()}
    return values


@pytest.mark.parametrize("method", ["rtn", "mse", "awq", "gptq"])
def test_a_bf16_target_keeps_every_bit(
    model: Path, tmp_path: Path, text: CalibrationText, method: str
) -> None:
    run(model, tmp_path / "q", text, options("bf16", method))
    original, nested = open_checkpoint(model), open_checkpoint(tmp_path / "q")
    assert set(nested.names()) == set(original.names())
    for name in original.names():
        stored, weight = nested.read(name, Target.BF16), original.read(name, Target.BF16)
        if isinstance(stored, Planes):
            assert torch.equal(verify_weight(stored).bfloat16().view(torch.int16),
                               weight.view(torch.int16))  # fmt: skip
        else:
            assert torch.equal(stored.weight, weight)


@pytest.mark.parametrize("target", ["bf16", "int4"])
def test_methods_lower_the_error(
    model: Path, tmp_path: Path, text: CalibrationText, target: str
) -> None:
    totals = {}
    for method in ("rtn", "mse", "awq", "gptq"):
        report = run(model, tmp_path / method, text, options(target, method))
        totals[method] = sum(sum(layer.errors.values()) for layer in report.layers)
    assert totals["gptq"] < totals["awq"] < totals["mse"] < totals["rtn"]


def stream_logits(
    path: Path, nested: Path, text: CalibrationText, target: Target, activation: Activation
) -> Tensor:
    """Logits of the quantised stream at every row, with the nested checkpoint's weights."""
    checkpoint, stored = open_checkpoint(path), open_checkpoint(nested)
    config = read_config(checkpoint)
    weights = {n: checkpoint.read(n, Target.BF16).float() for n in checkpoint.names()}

    def seen(name: str) -> Tensor:
        planes = stored.read(f"{name}.weight", target)
        return verify_weight(planes) if target is Target.INT4 else draft_weight(planes)

    streams = start(
        text,
        weights["model.embed_tokens.weight"][text.tokens],
        rope_table(config, 256),
        activation,
        reads_exact_kv=target is not Target.INT4,
    )
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        advance(
            streams, config, weights, prefix, lambda names, *_: torch.cat([seen(n) for n in names])
        )
    return head_logits(streams, weights["model.norm.weight"], seen("lm_head"), config.norm_eps)


def head_logits(streams: Streams, norm: Tensor, head: Tensor, eps: float) -> Tensor:
    from qspec_llm.kernels.reference import rms_norm, round_activations

    x = rms_norm(streams.other.bfloat16(), norm, eps).float()
    return round_activations(x, draft_view(streams.activation)) @ head.T


@pytest.mark.parametrize("activation", ["a8", "a16"])
def test_the_stream_of_a_nested_target_is_its_draft(
    model: Path, tmp_path: Path, text: CalibrationText, activation: str
) -> None:
    """The rows that it is fitted on are those of a first draft over the verify view's KV."""
    run(model, tmp_path / "q", text, options("bf16", "mse"))
    kind = Activation(activation)
    found = stream_logits(model, tmp_path / "q", text, Target.BF16, kind)
    decoder = decoder_of(tmp_path / "q", Target.BF16)
    scripts = [
        Script((t[0],), tuple(t[1:])) for t in (text.tokens[s].tolist() for s in text.spans())
    ]
    runners = {"verify": runner_for(decoder, scripts, 4)}
    steps = read_along(
        runners, scripts, ByteTokenizer(), drafts={"draft": draft_view(kind)}, max_batch=4
    )
    compared = 0
    rows = [0] * len(scripts)
    for step in steps:
        for script, logits in zip(step.scripts, step.logits["draft"], strict=True):
            ours = found[text.bounds[script] + rows[script]]
            rows[script] += 1
            compared += 1
            assert (ours - logits).norm() < 0.03 * logits.norm()  # bf16 roundings that differ
            assert torch.cosine_similarity(ours, step.logits["verify"][0], dim=0) < 1
    assert compared == text.num_tokens - len(scripts)


def test_scales_are_folded_into_what_comes_before(
    model: Path, tmp_path: Path, text: CalibrationText
) -> None:
    """The scaled checkpoint computes what the quantised stream saw while it was made."""
    report = run(model, tmp_path / "q", text, options("int4", "awq"))
    original, nested = open_checkpoint(model), open_checkpoint(tmp_path / "q")
    name = "model.layers.0.input_layernorm.weight"
    changed = nested.read(name, Target.INT4).weight.float()
    assert not torch.allclose(changed, original.read(name, Target.BF16).float())
    decoder = decoder_of(tmp_path / "q", Target.INT4)
    exact = decoder_of_bf16(model)
    span = text.spans()[-1]  # held out
    tokens = text.tokens[span].tolist()
    script = Script((tokens[0],), tuple(tokens[1:]))
    runners = {name: runner_for(d, [script], 1) for name, d in (("q", decoder), ("e", exact))}
    wrong = [
        (step.logits["q"] - step.logits["e"]).norm() / step.logits["e"].norm()
        for step in read_along(runners, [script], ByteTokenizer())
    ]
    assert torch.stack(wrong).mean() < 0.5
    assert report.layers[-2].errors["model.layers.1.mlp.down_proj"] < 0.2


def decoder_of_bf16(path: Path) -> Decoder:
    return decoder_of(path, Target.BF16)


def test_the_stream_of_int4_is_the_target_itself(
    model: Path, tmp_path: Path, text: CalibrationText
) -> None:
    """The embedding apart, which the stream reads at 16 bits and the target at 8."""
    run(model, tmp_path / "q", text, options("int4", "gptq"))
    found = stream_logits(model, tmp_path / "q", text, Target.INT4, Activation.A16)
    decoder = decoder_of(tmp_path / "q", Target.INT4)
    span = text.spans()[0]
    script = Script((int(text.tokens[0]),), tuple(text.tokens[span].tolist()[1:]))
    runners = {"verify": runner_for(decoder, [script], 1)}
    for row, step in enumerate(read_along(runners, [script], ByteTokenizer())):
        logits = step.logits["verify"][0]
        assert (found[row] - logits).norm() < 0.05 * logits.norm()


@pytest.mark.parametrize("method", ["rtn", "mse", "gptq"])
def test_offsets_are_stored(
    model: Path, tmp_path: Path, text: CalibrationText, method: str
) -> None:
    how = Options(target=Target.INT4, method=Method(method), group=32, asymmetric=True)
    report = run(model, tmp_path / "q", text, how)
    assert all(0 < error < 0.1 for layer in report.layers for error in layer.errors.values())
    stored = open_checkpoint(tmp_path / "q").read("model.layers.0.mlp.up_proj.weight", Target.INT4)
    assert stored.spec.has_offset
    assert stored.spec.bits_stored == 5


def test_a_prepared_model_agrees_with_four_bit_activations(uneven: Path, tmp_path: Path) -> None:
    """Channels that are 30 times larger than others cost a plain a4 draft, not one of a model that
    was rotated, or whose outliers come first."""
    tokenizer = HFTokenizer(uneven)
    text = encode(SENTENCES, tokenizer, 10_000)
    errors = {}
    for rotate, outliers in ((False, None), (True, None), (False, 32)):
        how = Options(
            target=Target.INT4, method=Method.MSE, group=32, rotate=rotate, outliers=outliers
        )
        path = tmp_path / f"q{rotate}{outliers}"
        run(uneven, path, text, how)
        checkpoint = open_checkpoint(path)
        config = read_config(checkpoint)
        assert (config.hadamard is not None) is rotate
        assert config.outliers == outliers
        assert config.can_draft_a4 is (rotate or outliers is not None)
        assert checkpoint.made["rotated"] is rotate
        assert checkpoint.made["outliers"] == (outliers or 0)
        decoder = decoder_of(path, Target.INT4)
        tokens = tuple(text.tokens[text.spans()[-1]].tolist())
        script = Script(tokens[:1], tokens[1:])
        runners = {"verify": runner_for(decoder, [script], 1)}
        drafts = {"draft": draft_view(Activation.A4)}
        wrong = [
            (step.logits["draft"] - step.logits["verify"]).norm() / step.logits["verify"].norm()
            for step in read_along(runners, [script], ByteTokenizer(), drafts=drafts)
        ]
        errors[rotate, outliers] = float(torch.stack(wrong).mean())
    assert errors[True, None] < 0.8 * errors[False, None]
    assert errors[False, 32] < 0.8 * errors[False, None]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a few large channels before every linear."""
    path = tmp_path_factory.mktemp("uneven")
    write_model(path, seed=3)
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        for ending, step, factor in (("layernorm.weight", 9, 30), ("up_proj.weight", 7, 10)):
            if name.endswith(ending):
                tensor[::step] *= factor
    save_file(tensors, path / "model.safetensors")
    return path


class Stop(Exception):  # noqa: N818  # stands for an interruption, not an error
    """Raised after some parts."""


@pytest.mark.parametrize("parts", [0, 1, 2])
@pytest.mark.parametrize("target", ["bf16", "int4"])
def test_an_interrupted_run_goes_on(
    model: Path, tmp_path: Path, text: CalibrationText, parts: int, target: str
) -> None:
    whole = run(model, tmp_path / "whole", text, options(target))
    calls: list[int] = []

    def stop_after(done: int, total: int) -> None:
        assert total == 4
        calls.append(done)
        if done == parts:
            raise Stop

    with pytest.raises(Stop):
        run(model, tmp_path / "q", text, options(target), progress=stop_after)
    assert not (tmp_path / "q").exists()
    resumed: list[int] = []
    again = run(
        model, tmp_path / "q", text, options(target), progress=lambda d, _: resumed.append(d)
    )
    assert resumed[0] == parts  # nothing is done twice
    assert asdict(again) == asdict(whole)
    wanted, found = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "q")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    names = {file.name for file in (tmp_path / "q").iterdir()}
    assert not {name for name in names if name.startswith(("state", "progress"))}


def test_other_options_do_not_go_on(model: Path, tmp_path: Path, text: CalibrationText) -> None:
    def stop(done: int, total: int) -> None:
        if done:
            raise Stop

    with pytest.raises(Stop):
        run(model, tmp_path / "q", text, options("bf16", "mse"), progress=stop)
    with pytest.raises(QSpecError, match=r"q\.partial was begun with other options"):
        run(model, tmp_path / "q", text, options("bf16", "rtn"))


def test_the_index_says_how_it_was_made(model: Path, tmp_path: Path, text: CalibrationText) -> None:
    report = run(model, tmp_path / "q", text, options())
    made = json.loads((tmp_path / "q" / "qspec.json").read_text())["made"]
    assert made["method"] == "gptq"
    assert made["calibration_tokens"] == text.num_fitted
    assert made["agreement"] == report.agreement
    assert 0 <= report.agreement <= 1
    total = sum(file.stat().st_size for file in (tmp_path / "q").glob("*.safetensors"))
    assert report.stored_bytes <= total < report.stored_bytes + 40_000  # headers


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: options("int8", "gptq"), "nothing to choose for target 'int8'"),
        (lambda: rotating("bf16", "gptq"), "target 'bf16' cannot be rotated"),
        (
            lambda: Options(target=Target.BF16, method=Method.GPTQ, group=32, asymmetric=True),
            "target 'bf16' has no offsets",
        ),
        (
            lambda: Options(target=Target.INT4, method=Method.AWQ, group=32, asymmetric=True),
            "offsets with them inexactly",
        ),
        (lambda: rotating("int4", "awq"), "use --method gptq or mse with --rotate"),
        (lambda: encode(SENTENCES[:1], ByteEncoder(), 100), "gives 1 sequences"),
        (lambda: read_samples("nowhere.jsonl"), "cannot be read"),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(QSpecError, match=message):
        make()


def rotating(target: str, method: str) -> Options:
    return Options(target=Target(target), method=Method(method), group=32, rotate=True)


def test_a_nested_checkpoint_is_refused(model: Path, tmp_path: Path, text: CalibrationText) -> None:
    run(model, tmp_path / "q", text, options("int8", "rtn"))
    with pytest.raises(QSpecError, match="is nested already"):
        run(tmp_path / "q", tmp_path / "r", text, options())
    with pytest.raises(QSpecError, match="exists already"):
        run(model, tmp_path / "q", text, options())


class ByteEncoder:
    """Bytes, and no chat template."""

    has_chat_template = False

    def encode(self, text: str, *, has_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


def test_text_is_cut_held_out_and_marked() -> None:
    samples = [Sample("ab", "cde")] * 8 + [Sample(None, "x" * 1000)]
    text = encode(samples, ByteEncoder(), 6 * 8 + 600)
    spans = text.spans()
    assert len(spans) == 9  # a window of 512 fits, the rest of the plain text does not
    assert text.bounds[-1] == text.num_tokens
    assert text.bounds[8] == text.num_fitted  # the eighth sequence is held out, and comes last
    assert text.tokens[spans[0]].tolist() == list(b"ab\ncde")
    assert text.is_answer[spans[0]].tolist() == [False, False, True, True, True, True]
    assert text.positions[spans[1]].tolist() == list(range(6))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "line 1 of .* is neither"),
        ('{"prompt": "x"}', "is neither"),
        ('{"text": "x", "answer": "y"}', "is neither"),
        ('{"text": " "}', "empty value"),
        ('{"text": 3}', "no string"),
        ("{", "is not JSON"),
        ("", "is empty"),
    ],
)
def test_damaged_files_are_told(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(line)
    with pytest.raises(QSpecError, match=message):
        read_samples(str(path))


def test_the_text_that_ships_is_not_what_is_evaluated() -> None:
    from qspec_llm.eval.prompts import read_prompts

    asked = {prompt.prompt.casefold().strip() for prompt in read_prompts("builtin")}
    samples = read_samples("builtin")
    assert len(samples) > 150
    assert not {str(s.prompt).casefold().strip() for s in samples} & asked
