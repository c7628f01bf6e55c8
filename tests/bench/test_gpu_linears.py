"""`qspec bench kernels --shape`: what can be known of it without a GPU."""

import json

import pytest
import torch

from qspec_llm.bench import gpu_instances, gpu_linears
from qspec_llm.cli import bench, bench_options, main
from qspec_llm.kernels.cuda import layout, split, wide
from qspec_llm.kernels.cuda.form import Form
from qspec_llm.weights.quantize import Recipe, nest

LAYER = ["bench", "kernels", "--shape", "llama-3-8b", "--rows", "1", "8", "--group", "128"]


def test_a_layer_is_measured_on_a_gpu_only(capsys):
    assert main([*LAYER, "--backend", "reference"]) == 2
    assert "needs the cuda backend, not 'reference'" in capsys.readouterr().err


def test_a_layer_is_shown(capsys, monkeypatch):
    asked = []

    def measure(shape, rows, *, cases, group, rounds):
        assert (shape, rows, group, rounds) == ("llama-3-8b", [1, 8], 128, 9)
        asked.append(cases)
        results = [
            {"case": name, "rows": count, "us": us * count, "against_cublas": us / 100}
            for name, us in (("cublas", 100.0), ("draft a8", 25.0))
            for count in rows
        ]
        return {
            "device": "a GPU",
            "shape": shape,
            "group": group,
            "read_tb_per_second": 4.5,
            "results": results,
        }

    monkeypatch.setattr(gpu_linears, "bench", measure)
    monkeypatch.setattr(bench, "_backend", lambda _: "cuda")
    assert main(LAYER) == 0
    heading, rows, cublas, draft = capsys.readouterr().out.splitlines()
    assert "a GPU, llama-3-8b, groups of 128: memory is read at 4.50 TB/s" in heading
    assert rows.split() == ["microseconds", "a", "layer,", "rows", "1", "8"]
    assert cublas.split() == ["cublas", "100.0", "1.00x", "800.0", "1.00x"]
    assert draft.split() == ["draft", "a8", "25.0", "0.25x", "200.0", "0.25x"]
    assert main([*LAYER, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["us"] == 100
    assert main([*LAYER, "--prompts"]) == 0
    assert asked == [gpu_linears.CASES, gpu_linears.CASES, gpu_linears.PROMPT_CASES]
    assert {"cublas", "verify bf16"} <= gpu_linears.PROMPT_CASES.keys()
    assert all(case.is_prompt for case in gpu_linears.PROMPT_CASES.values())


# Instances


@pytest.mark.parametrize(
    "form", [Form(bits=16), Form(bits=4, is_signed=False), Form(bits=4, act=8, act_group=128)]
)
def test_the_instances_that_are_chosen_are_among_all(form, monkeypatch):
    monkeypatch.setattr(wide, "num_multiprocessors", lambda _: 132)
    monkeypatch.setattr(wide, "instance", wide.instance.__wrapped__)
    for num_tokens in (2, 8, 24, 40, 64, 128):
        found = dict(gpu_instances.instances(form, num_tokens, 28672, 4096, 0))
        labels = {gpu_instances._label(one) for one in found}
        assert len(labels) == len(found)
        if num_tokens <= split.most_tokens(form):
            token_tiles = -(-num_tokens // 8)
            assert split.tuning(form, token_tiles, 1792, 132) in found
        if num_tokens > split.MAX_TOKENS:
            assert wide.tuning(form, num_tokens // 8, 1792, 32, 0) in found
            assert not any(label.startswith("split") for label in labels)


def test_the_fastest_instances_are_shown(capsys, monkeypatch):
    def measure(shape, rows, *, cases, group, layers, rounds):
        ((linear, _),) = shape.items()
        assert (rows, group, layers, rounds) == ([64], 128, 8, 3)
        times = {name: 50.0 + index for index, name in enumerate(reversed(cases))}
        rows = [{"case": name, "rows": 64, "us": us} for name, us in times.items()]
        return {"results": [*rows, {"case": f"cublas: {linear}", "rows": 64, "us": 1.0}]}

    def some_weight(case, group, num_rows, num_cols):
        planes = nest(torch.randn(1, num_cols), Recipe(case.target, group, clip_steps=1))
        return layout.pack(planes, "cpu"), case.view

    def instances(form, *_):
        assert form == Form(bits=16, base_bytes=form.base_bytes, rest_bytes=form.rest_bytes)
        for units in (None, 1, 2):
            yield wide.Tuning(groups=2, units=units), None

    monkeypatch.setattr(gpu_linears, "bench", measure)
    monkeypatch.setattr(gpu_instances, "instances", instances)
    monkeypatch.setattr(gpu_instances, "_compile", lambda *_: None)
    monkeypatch.setattr(gpu_instances, "_compare", lambda *_: None)
    monkeypatch.setattr(gpu_instances, "_some_weight", some_weight)
    monkeypatch.setattr(gpu_linears, "bytes_read", lambda *_: 32 << 20)
    monkeypatch.setattr(gpu_instances.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu_instances.torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(gpu_instances.torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(bench, "_backend", lambda _: "cuda")
    command = ["bench", "kernels", "--shape", "llama-3-8b", "--rows", "64", "--group", "128"]
    command += ["--rounds", "3", "--instances", "verify bf16"]
    assert main(command) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert "a GPU, llama-3-8b, verify bf16, groups of 128" in heading
    assert lines[:4] == [
        "qkv, 64 rows: cublas 54.0, chosen 53.0",
        "      50.0  wide groups=2 units=2",
        "      51.0  wide groups=2 units=1",
        "      52.0  wide groups=2",
    ]
    assert len(lines) == 16
    assert bench_options.INSTANCE_CASES == gpu_instances.CASES
    monkeypatch.setattr(gpu_instances.torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert main(command) == 2
    assert "a GPU runs neither split.cu nor wide.cu" in capsys.readouterr().err


def test_instances_need_a_shape_and_a_case_that_is_known(capsys, monkeypatch):
    plain = ["bench", "kernels", "--backend", "reference"]
    assert main([*plain, "--instances", "draft a8"]) == 2
    assert "--instances needs --shape" in capsys.readouterr().err
    assert main([*plain, "--prompts"]) == 2
    assert "--prompts needs --shape" in capsys.readouterr().err
    monkeypatch.setattr(bench, "_backend", lambda _: "cuda")
    assert main([*LAYER, "--prompts", "--instances", "draft a8"]) == 2
    assert "--instances are of generated rows" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*LAYER, "--instances", "draft a4"])
    assert "draft a4" in capsys.readouterr().err
