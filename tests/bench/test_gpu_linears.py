"""`qspec bench kernels --shape`: what can be known of it without a GPU."""

import json

from qspec_llm.bench import gpu_linears
from qspec_llm.cli import bench, main

LAYER = ["bench", "kernels", "--shape", "llama-3-8b", "--rows", "1", "8", "--group", "128"]


def test_a_layer_is_measured_on_a_gpu_only(capsys):
    assert main([*LAYER, "--backend", "reference"]) == 2
    assert "needs the cuda backend, not 'reference'" in capsys.readouterr().err


def test_a_layer_is_shown(capsys, monkeypatch):
    def measure(shape, rows, *, group, rounds):
        assert (shape, rows, group, rounds) == ("llama-3-8b", [1, 8], 128, 9)
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
