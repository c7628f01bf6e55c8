"""The command line: `qspec generate | chat | serve | run-batch | inspect | bench | collect-env`.

Parses options and reports errors; each command is a module that is imported when it is used.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from qspec_llm.errors import QSpecError
from qspec_llm.version import __version__

__all__ = ["main"]

# bench.shapes has their sizes; naming them here keeps `--help` from importing torch
SHAPE_NAMES = ("smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b", "llama-3-8b", "qwen2.5-32b")
MODEL_HELP = "directory of safetensors, .gguf file, hub id, or alias (smollm2)"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 2 for what the caller can mend, or 130 when interrupted."""
    args = _parser().parse_args(argv)
    command = importlib.import_module(f"qspec_llm.cli.{args.module}")
    try:
        command.run(args)
        sys.stdout.flush()
    except QSpecError as error:
        print(f"qspec: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qspec: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader (`| head`) has gone: nothing is left to say, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qspec",
        allow_abbrev=False,
        description="Lossless self-speculative decoding: one stored model, read at two precisions.",
    )
    parser.add_argument("--version", action="version", version=f"qspec {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = _command(commands, "generate", "complete one prompt or a file of prompts")
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="the prompt")
    prompts.add_argument(
        "--prompt-file", metavar="FILE", help='JSON Lines, {"prompt": ...} each, run as one batch'
    )
    _add_model_options(generate)
    _add_sampling_options(generate)
    generate.add_argument("--raw", action="store_true", help="do not apply the chat template")
    generate.add_argument(
        "--compare", action="store_true", help="also decode plainly, interleaved, and compare"
    )
    generate.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    chat = _command(commands, "chat", "talk to a model in the terminal")
    _add_model_options(chat)
    _add_sampling_options(chat)
    chat.add_argument("--system", metavar="TEXT", help="a system message to begin with")

    inspect = _command(commands, "inspect", "show how a model would be stored")
    inspect.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    _add_target_options(inspect)
    inspect.add_argument("--all", action="store_true", help="every tensor, not one line for layers")
    inspect.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    _add_bench(commands)
    _add_serve(commands)
    _add_run_batch(commands)

    env = _command(commands, "collect-env", "describe this machine, for bug reports")
    env.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def _add_serve(commands: "argparse._SubParsersAction[_Parser]") -> None:
    serve = _command(commands, "serve", "an OpenAI-compatible HTTP server")
    _add_model_options(serve, gamma="auto")
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 for all (default: %(default)s, this machine alone)",
    )
    serve.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    serve.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="clients must send it; may be given more than once; QSPEC_API_KEY is the same and "
        "does not show in the list of processes",
    )
    serve.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names that requests may use (default: MODEL)",
    )
    serve.add_argument(
        "--max-waiting",
        type=int,
        default=1024,
        metavar="N",
        help="completions that may wait; more get a 429 (default: %(default)s)",
    )
    serve.add_argument(
        "--max-body-bytes", type=int, default=4 << 20, metavar="N", help="(default: %(default)s)"
    )
    serve.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))


def _add_run_batch(commands: "argparse._SubParsersAction[_Parser]") -> None:
    batch = _command(commands, "run-batch", "answer an OpenAI batch file without a server")
    _add_model_options(batch, gamma="auto")
    batch.add_argument("-i", "--input-file", required=True, metavar="FILE", help="JSON Lines")
    batch.add_argument("-o", "--output-file", required=True, metavar="FILE", help="JSON Lines")
    batch.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names that requests may use (default: MODEL)",
    )


def _add_bench(commands: "argparse._SubParsersAction[_Parser]") -> None:
    bench = _command(commands, "bench", "measure what speculation costs and gains on this machine")
    kinds = bench.add_subparsers(required=True, metavar="KIND", dest="bench")

    text = "every operation against the reference, then its time and bandwidth"
    kernels = kinds.add_parser("kernels", help=text, description=text, allow_abbrev=False)
    kernels.add_argument(
        "--shapes",
        type=_shape,
        nargs="+",
        default=[(9728, 896), (4096, 4096)],
        metavar="NxK",
        help="matrices of the linears (default: 9728x896 4096x4096)",
    )
    kernels.add_argument("--rows", type=int, nargs="+", default=[1, 5])
    kernels.add_argument("--rounds", type=int, default=9, help="rounds that count (default: 9)")
    kernels.add_argument("--group", type=int, default=32, metavar="G")
    _add_machine_options(kernels)
    kernels.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    text = "cost of draft and verify steps, and the speed-up they allow"
    steps = kinds.add_parser("steps", help=text, description=text, allow_abbrev=False)
    steps.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    steps.add_argument("--shape", choices=sorted(SHAPE_NAMES), help="random weights of that shape")
    steps.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 5, 8, 12, 16])
    steps.add_argument("--contexts", type=int, nargs="+", default=[128, 1024])
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
    decode.add_argument("--max-tokens", type=int, default=64, metavar="N")
    decode.add_argument("--gamma", type=_gamma, default=2, metavar="N")
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
        _add_machine_options(parser)
        parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _add_bench_serve(kinds: "argparse._SubParsersAction[Any]") -> None:
    text = "load on a server: latencies and throughput as clients see them"
    serve = kinds.add_parser("serve", help=text, description=text, allow_abbrev=False)
    serve.add_argument("model", nargs="?", metavar="MODEL", help=f"serve this one: {MODEL_HELP}")
    serve.add_argument("--url", help="a server that runs already, instead")
    serve.add_argument("--model-name", metavar="NAME", help="the model's name there")
    serve.add_argument("--key", help="the server's API key")
    serve.add_argument("--target", default="auto", choices=("auto", "int4", "int8", "bf16"))
    serve.add_argument("--gamma", type=_gamma, default="auto", metavar="N")
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
    serve.add_argument("--warm-up", type=int, default=2, metavar="N", help="rounds before")
    serve.add_argument(
        "--offline", action="store_true", help="also do the same work without a server"
    )
    serve.add_argument("--plot", metavar="DIR", help="draw PNG files there")
    serve.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _command(
    commands: "argparse._SubParsersAction[_Parser]", name: str, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(module=name.replace("-", "_"))
    return parser


def _add_target_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        default="auto",
        choices=("auto", "int4", "int8", "bf16"),
        help="what the output equals; auto is the precision of the checkpoint (default: auto)",
    )
    parser.add_argument(
        "--group",
        type=int,
        default=32,
        metavar="G",
        help="weights that share one scale: 32, 64 or 128 (default: %(default)s)",
    )


def _add_model_options(parser: argparse.ArgumentParser, gamma: str | int | None = None) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    _add_target_options(parser)
    parser.add_argument(
        "--draft",
        default="a8",
        choices=("a8", "a4", "a16"),
        help="activations of the draft view (default: %(default)s)",
    )
    parser.add_argument(
        "--gamma",
        type=_gamma,
        default=gamma,
        metavar="N",
        help="tokens drafted in each cycle, 0 to decode plainly, auto for whatever pays best "
        f"at the moment (default: {gamma or '2 for bf16, else 0'})",
    )
    _add_machine_options(parser)
    parser.add_argument(
        "--max-batch", type=int, default=8, metavar="N", help="prompts that run at once"
    )
    parser.add_argument(
        "--max-tokens-in-kv", type=int, default=16384, metavar="N", help="tokens the KV cache holds"
    )
    parser.add_argument(
        "--kv-cache-bytes", type=_bytes, metavar="N", help="its size instead, 512M or 4G also"
    )
    parser.add_argument(
        "--max-rows",
        type=int,
        default=512,
        metavar="N",
        help="tokens computed in one step; longer prompts take several (default: %(default)s)",
    )


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        default="auto",
        help="whose kernels run: cuda, cpu, reference; auto is the fastest here (default: auto)",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of the kernels (default: physical cores)"
    )
    parser.add_argument(
        "--isa",
        help="instruction set of the CPU kernels: avx512, avx2, generic (default: the best here)",
    )


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the most likely token (default: %(default)s)",
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 keeps all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P")
    parser.add_argument("--seed", type=int, metavar="S", help="same seed, same text")


def _bytes(text: str) -> int:
    """A number of bytes, with K, M or G for powers of 1024."""
    unit = {"K": 10, "M": 20, "G": 30}.get(text[-1:].upper())
    return int(text) if unit is None else int(text[:-1]) << unit


def _gamma(text: str) -> int | str:
    """A number, or "auto"."""
    return text if text == "auto" else int(text)


def _shape(text: str) -> tuple[int, int]:
    """Rows and columns of a matrix, "9728x896"."""
    rows, cols = text.split("x")
    return int(rows), int(cols)
