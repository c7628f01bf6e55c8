"""Options that several commands share, and how their values are read."""

import argparse
from typing import NoReturn

__all__ = [
    "MODEL_HELP",
    "Parser",
    "add_machine_options",
    "add_model_options",
    "add_sampling_options",
    "add_target_options",
    "byte_count",
    "command",
    "draft_length",
    "matrix_shape",
]

MODEL_HELP = "directory of safetensors, .gguf file, hub id, or alias (smollm2)"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")


def command(
    commands: "argparse._SubParsersAction[Parser]", name: str, text: str
) -> argparse.ArgumentParser:
    """A command, run by the module of its name."""
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(module=name.replace("-", "_"))
    return parser


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """What a model is stored as."""
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


def add_model_options(parser: argparse.ArgumentParser, gamma: str | int | None = None) -> None:
    """A model and how it runs; `gamma` is the default that the command has."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_target_options(parser)
    parser.add_argument(
        "--lora",
        metavar="DIR",
        help="a LoRA adapter in PEFT's format, merged into the weights; it acts in both views",
    )
    parser.add_argument(
        "--draft",
        choices=("a8", "a4", "a16"),
        help="activations of the draft view (default: a8, or what the checkpoint's plan says)",
    )
    parser.add_argument(
        "--gamma",
        type=draft_length,
        default=gamma,
        metavar="N",
        help="tokens drafted in each cycle, 0 to decode plainly, auto for whatever pays best "
        f"at the moment (default: {gamma or 'of the plan, or 2 for bf16, else 0'})",
    )
    add_machine_options(parser)
    parser.add_argument(
        "--max-batch", type=int, default=8, metavar="N", help="prompts that run at once"
    )
    parser.add_argument(
        "--max-tokens-in-kv", type=int, default=16384, metavar="N", help="tokens the KV cache holds"
    )
    parser.add_argument(
        "--kv-cache-bytes", type=byte_count, metavar="N", help="its size instead, 512M or 4G also"
    )
    parser.add_argument(
        "--max-rows",
        type=int,
        default=512,
        metavar="N",
        help="tokens computed in one step; longer prompts take several (default: %(default)s)",
    )


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Backend, threads, instruction set."""
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


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen."""
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


def byte_count(text: str) -> int:
    """A number of bytes, with K, M or G for powers of 1024."""
    unit = {"K": 10, "M": 20, "G": 30}.get(text[-1:].upper())
    return int(text) if unit is None else int(text[:-1]) << unit


def draft_length(text: str) -> int | str:
    """A number, or "auto"."""
    return text if text == "auto" else int(text)


def matrix_shape(text: str) -> tuple[int, int]:
    """Rows and columns of a matrix, "9728x896"."""
    rows, cols = text.split("x")
    return int(rows), int(cols)
