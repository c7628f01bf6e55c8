"""Options of `qspec bench`."""

import argparse
from typing import Any

from qspec_llm.cli.options import (
    MODEL_HELP,
    Parser,
    add_machine_options,
    command,
    draft_length,
    matrix_shape,
)

__all__ = ["add_bench"]

# bench.shapes has their sizes; naming them here keeps `--help` from importing torch
SHAPE_NAMES = ("smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b", "llama-3-8b", "qwen2.5-32b")

INSTANCE_CASES = ("verify bf16", "verify int4", "draft a8")  # bench.gpu_instances'


def add_bench(commands: "argparse._SubParsersAction[Parser]") -> None:
    """`qspec bench` and its kinds."""
    bench = command(commands, "bench", "measure what speculation costs and gains on this machine")
    kinds = bench.add_subparsers(required=True, metavar="KIND", dest="bench")

    text = "every operation against the reference, then its time and bandwidth"
    kernels = kinds.add_parser("kernels", help=text, description=text, allow_abbrev=False)
    kernels.add_argument(
        "--shapes",
        type=matrix_shape,
        nargs="+",
        default=[(9728, 896), (4096, 4096)],
        metavar="NxK",
        help="matrices of the linears (default: 9728x896 4096x4096)",
    )
    kernels.add_argument(
        "--shape",
        choices=sorted(SHAPE_NAMES),
        help="instead, on a GPU: the linears of a layer of that shape, every view against cuBLAS",
    )
    kernels.add_argument(
        "--prompts",
        action="store_true",
        help="with --shape: rows of a prompt, of which there are some hundreds",
    )
    kernels.add_argument(
        "--instances",
        choices=INSTANCE_CASES,
        metavar="CASE",
        help="with --shape: every instance of the kernels that fits, one linear at a time; "
        f"{', '.join(INSTANCE_CASES)}",
    )
    kernels.add_argument("--rows", type=int, nargs="+", default=[1, 5])
    kernels.add_argument("--rounds", type=int, default=9, help="rounds that count (default: 9)")
    kernels.add_argument("--group", type=int, default=32, metavar="G")
    add_machine_options(kernels)
    kernels.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    text = "cost of draft and verify steps, and the speed-up they allow"
    steps = kinds.add_parser("steps", help=text, description=text, allow_abbrev=False)
    steps.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    steps.add_argument("--shape", choices=sorted(SHAPE_NAMES), help="random weights of that shape")
    steps.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 5, 8, 12, 16])
    steps.add_argument("--contexts", type=int, nargs="+", default=[128, 1024])
    steps.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="sequences of a step, each with as many rows and keys of its own (default: 1)",
    )
    steps.add_argument(
        "--against",
        metavar="COMMAND",
        help="another version, as a command ('old/.venv/bin/qspec', 'env PYTHONPATH=old/src python "
        "-m qspec_llm'): its steps take turns with this one's, and their logits are compared",
    )
    steps.add_argument("--in-turn", action="store_true", help=argparse.SUPPRESS)
    steps.add_argument("--rounds", type=int, default=9, help="rounds that count (default: 9)")

    _add_bench_serve(kinds)

    text = "tokens per second, plain and speculative, for every target"
    decode = kinds.add_parser("decode", help=text, description=text, allow_abbrev=False)
    decode.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    decode.add_argument("--prompt-file", metavar="FILE", help="JSON Lines of prompts")
    decode.add_argument(
        "--shape",
        choices=sorted(SHAPE_NAMES),
        help="random weights of that shape; needs --synthetic-acceptance",
    )
    decode.add_argument(
        "--synthetic-acceptance",
        type=float,
        metavar="A",
        help="for speed alone: a draft stands by a coin of this chance, whatever the model says",
    )
    decode.add_argument(
        "--context", type=int, default=1024, metavar="N", help="prompt tokens, with --shape"
    )
    decode.add_argument(
        "--batches", type=int, nargs="+", default=[1], metavar="N", help="with --shape"
    )
    decode.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="of other requests each, with --shape"
    )
    decode.add_argument("--max-tokens", type=int, default=64, metavar="N")
    decode.add_argument("--gamma", type=draft_length, default=2, metavar="N")
    decode.add_argument("--max-batch", type=int, default=1, metavar="N")

    for parser in (steps, decode):
        parser.add_argument(
            "--enlarge",
            metavar="MODEL",
            help="with --shape: this model zero-padded to that shape, which computes the same; "
            "real text and acceptance of a small model at the speed of a large one",
        )
        parser.add_argument(
            "--targets",
            nargs="+",
            default=["int4", "int8", "bf16"],
            choices=("int4", "int8", "bf16"),
        )
        parser.add_argument("--draft", default="a8", choices=("a8", "a4", "a16"))
        parser.add_argument("--group", type=int, default=32, metavar="G")
        add_machine_options(parser)
        parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _add_bench_serve(kinds: "argparse._SubParsersAction[Any]") -> None:
    text = "load on a server: latencies and throughput as clients see them"
    serve = kinds.add_parser("serve", help=text, description=text, allow_abbrev=False)
    serve.add_argument("model", nargs="?", metavar="MODEL", help=f"serve this one: {MODEL_HELP}")
    serve.add_argument("--url", help="a server that runs already, instead")
    serve.add_argument("--model-name", metavar="NAME", help="the model's name there")
    serve.add_argument("--key", help="the server's API key")
    serve.add_argument("--target", default="auto", choices=("auto", "int4", "int8", "bf16"))
    serve.add_argument("--gamma", type=draft_length, default="auto", metavar="N")
    serve.add_argument("--max-batch", type=int, default=16, metavar="N")
    serve.add_argument("--threads", type=int, metavar="N")
    serve.add_argument("--requests", type=int, default=64, metavar="N")
    serve.add_argument(
        "--concurrency", type=int, default=16, metavar="N", help="clients of a closed loop"
    )
    serve.add_argument(
        "--rate", type=float, metavar="R", help="open loop: requests a second, at random"
    )
    serve.add_argument("--prompt-words", type=int, default=48, metavar="N")
    serve.add_argument(
        "--shared-words", type=int, default=0, metavar="N", help="that all prompts begin with"
    )
    serve.add_argument("--max-tokens", type=int, default=64, metavar="N")
    serve.add_argument(
        "--no-stream", action="store_true", help="answers at once: clients cost less then"
    )
    serve.add_argument("--body", metavar="JSON", help="more options of each request")
    serve.add_argument("--seed", type=int, default=0)
    serve.add_argument("--warm-up", type=int, default=2, metavar="N", help="short rounds before")
    serve.add_argument(
        "--offline",
        action="store_true",
        help="also do the same work without a server, before and after each round",
    )
    serve.add_argument("--rounds", type=int, default=1, metavar="N", help="of the whole load")
    serve.add_argument("--plot", metavar="DIR", help="draw PNG files there")
    serve.add_argument("--json", action="store_true", help="print one JSON object on stdout")
