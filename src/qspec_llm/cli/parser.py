"""The commands and their options; each command is a module that is imported when it is used."""

import argparse

from qspec_llm.cli.bench_options import add_bench
from qspec_llm.cli.options import (
    MODEL_HELP,
    Parser,
    add_model_options,
    add_sampling_options,
    add_target_options,
    command,
)
from qspec_llm.version import __version__

__all__ = ["parser"]


def parser() -> argparse.ArgumentParser:
    """Of the whole command line."""
    parser = Parser(
        prog="qspec",
        allow_abbrev=False,
        description="Lossless self-speculative decoding: one stored model, read at two precisions.",
    )
    parser.add_argument("--version", action="version", version=f"qspec {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = command(commands, "generate", "complete one prompt or a file of prompts")
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="the prompt")
    prompts.add_argument(
        "--prompt-file", metavar="FILE", help='JSON Lines, {"prompt": ...} each, run as one batch'
    )
    add_model_options(generate)
    add_sampling_options(generate)
    generate.add_argument("--raw", action="store_true", help="do not apply the chat template")
    generate.add_argument(
        "--compare", action="store_true", help="also decode plainly, in turn, and compare"
    )
    generate.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    chat = command(commands, "chat", "talk to a model in the terminal")
    add_model_options(chat)
    add_sampling_options(chat)
    chat.add_argument("--system", metavar="TEXT", help="a system message to begin with")

    inspect = command(commands, "inspect", "show how a model would be stored")
    inspect.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_target_options(inspect)
    inspect.add_argument("--all", action="store_true", help="every tensor, not one line for layers")
    inspect.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    _add_quantize(commands)
    _add_plan(commands)
    _add_eval(commands)
    add_bench(commands)
    _add_serve(commands)
    _add_run_batch(commands)

    env = command(commands, "collect-env", "describe this machine, for bug reports")
    env.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def _add_serve(commands: "argparse._SubParsersAction[Parser]") -> None:
    serve = command(commands, "serve", "an OpenAI-compatible HTTP server")
    add_model_options(serve, gamma="auto")
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


def _add_quantize(commands: "argparse._SubParsersAction[Parser]") -> None:
    text = "write a nested checkpoint whose draft agrees with its target"
    parser = command(commands, "quantize", text)
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="directory to create; an interrupted "
        "run leaves DIR.partial, and the same command goes on from there"
    )  # fmt: skip
    add_target_options(parser)
    parser.add_argument(
        "--method",
        default="gptq",
        choices=("rtn", "mse", "awq", "gptq"),
        help="how 4-bit codes are chosen: to nearest; by clipping; by clipping with inputs as "
        "weights; by columns that make up for each other (default: %(default)s)",
    )
    parser.add_argument(
        "--draft",
        default="a8",
        choices=("a8", "a4", "a16"),
        help="activations that the draft will see (default: %(default)s)",
    )
    parser.add_argument(
        "--asymmetric",
        action="store_true",
        help="int4 alone: an offset for each group too, 5 bits a weight instead of 4.5",
    )
    parser.add_argument(
        "--rotate",
        action="store_true",
        help="int4 alone: rotate the inputs of linears, which makes drafts with a4 agree",
    )
    parser.add_argument(
        "--outliers",
        type=int,
        metavar="N",
        help="int4 alone, instead of --rotate: the N largest columns of the linears' inputs have 8 "
        "bits in drafts with a4, a multiple of 32",
    )
    _add_calibration(parser)
    parser.add_argument(
        "--lora", metavar="DIR", help="a LoRA adapter in PEFT's format, merged into the weights"
    )
    parser.add_argument(
        "--draft-bits",
        default="auto",
        choices=("auto", "4", "8"),
        help="what a draft reads of 8-bit tensors; auto measures this machine and plans it, with "
        "activations and gamma (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="(default: the physical cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        default="builtin",
        metavar="FILE",
        help='builtin, JSON Lines of {"prompt", "answer"} or {"text"}, or a text file',
    )
    parser.add_argument(
        "--calibration-tokens", type=int, default=16384, metavar="N", help="(default: %(default)s)"
    )


def _add_plan(commands: "argparse._SubParsersAction[Parser]") -> None:
    text = "choose again what the draft of a nested checkpoint reads, by this machine's speed"
    parser = command(commands, "plan", text)
    parser.add_argument("model", metavar="DIR", help="a directory that `qspec quantize` wrote")
    parser.add_argument("--plot", metavar="DIR", help="draw plan.png and plan.svg there")
    _add_calibration(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="(default: the physical cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _add_eval(commands: "argparse._SubParsersAction[Parser]") -> None:
    text = "perplexity, divergence and agreement of every view against the original weights"
    parser = command(commands, "eval", text)
    add_model_options(parser)
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="the original 16-bit weights (default: MODEL's own, where it holds them)",
    )
    parser.add_argument(
        "--views",
        nargs="*",
        default=["a16", "a8", "a4"],
        choices=("a16", "a8", "a4"),
        help="draft views to evaluate (default: all)",
    )
    parser.add_argument("--text", default="builtin", metavar="FILE", help="builtin, none or a file")
    parser.add_argument(
        "--window", type=int, default=512, metavar="N", help="tokens of text scored together"
    )
    parser.add_argument(
        "--prompts",
        default="builtin",
        metavar="FILE",
        help="builtin (128 of chat, arithmetic and code), human-eval, gsm8k, none, or JSON Lines",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N prompts alone")
    parser.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="of an answer (default: 128)"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="instead: tasks of lm-eval, by name or as .yaml files with local data",
    )
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="of a task (default: its own)")
    parser.add_argument(
        "--apply-chat-template", action="store_true", help="put a task's questions as conversations"
    )
    parser.add_argument(
        "--fidelity",
        action="store_true",
        help="instead: answer prompts with the 16-bit weights, the target, the draft view alone "
        "and both together, and compare accuracy and agreement",
    )
    parser.add_argument(
        "--execute-code",
        action="store_true",
        help="run the code that the model writes, to see whether it passes its tests; it runs in a "
        "process with limits, which is no wall against malice",
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="write eval.json there")
    parser.add_argument("--plot", action="store_true", help="and PNG and SVG files, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _add_run_batch(commands: "argparse._SubParsersAction[Parser]") -> None:
    batch = command(commands, "run-batch", "answer an OpenAI batch file without a server")
    add_model_options(batch, gamma="auto")
    batch.add_argument("-i", "--input-file", required=True, metavar="FILE", help="JSON Lines")
    batch.add_argument("-o", "--output-file", required=True, metavar="FILE", help="JSON Lines")
    batch.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names that requests may use (default: MODEL)",
    )
