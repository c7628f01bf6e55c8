"""`qspec chat`: a conversation in the terminal."""

import argparse

from rich.console import Console

from qspec_llm.cli.common import load, sampling_params, write_segments
from qspec_llm.engine.params import SamplingParams
from qspec_llm.errors import QSpecError
from qspec_llm.llm import LLM

__all__ = ["run"]

HELP = "/reset begins anew, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    params = sampling_params(args)
    llm = load(args)
    if not llm.tokenizer.has_chat_template:
        raise QSpecError(f"{args.model} has no chat template; use `qspec generate --raw`")
    console = Console(highlight=False)
    console.print(HELP, style="dim")
    begin = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(begin)
    while (line := _read()) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(begin)
        elif line.startswith("/"):
            console.print(HELP, style="dim")
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                prompt = llm.tokenizer.encode_chat(asked)
                answer = _answer(llm, console, prompt, params)
            except QSpecError as error:
                console.print(f"{error}; /reset begins anew", style="red", markup=False)
                continue
            messages = [*asked, {"role": "assistant", "content": answer}]


def _read() -> str | None:
    """A line from the user, None at the end of input."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _answer(llm: LLM, console: Console, prompt: list[int], params: SamplingParams) -> str:
    """Stream one answer; Ctrl-C keeps what came so far."""
    before = llm.engine.seconds.total
    text, num_tokens, num_drafted = "", 0, 0
    try:
        for emission in llm.stream(prompt, params):
            write_segments(console, emission.segments)
            text += emission.text
            num_tokens += len(emission.token_ids)
            num_drafted += emission.num_drafted
    except KeyboardInterrupt:
        pass
    seconds = llm.engine.seconds.total - before
    console.print(
        f"\n[{num_tokens} tokens, {num_tokens / seconds:.1f} tokens/s, {num_drafted} from drafts]",
        style="dim",
        markup=False,
    )
    return text
