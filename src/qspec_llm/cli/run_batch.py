"""`qspec run-batch`: answer an OpenAI batch file without a server."""

import argparse
import asyncio
import sys
import time
from pathlib import Path

from qspec_llm.cli.common import load, progress_bar
from qspec_llm.errors import QSpecError

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    try:
        from qspec_llm.server.batch import read_lines, run_batch
    except ImportError as error:
        raise QSpecError(
            f"run-batch needs {error.name}; install it with `pip install qspec-llm[server]`"
        ) from None
    source, target = Path(args.input_file), Path(args.output_file)
    try:
        lines = read_lines(source.read_text(encoding="utf-8"), str(source))
    except (OSError, UnicodeDecodeError) as error:
        raise QSpecError(f"the batch file {source} cannot be read: {error}") from None
    if not lines:
        raise QSpecError(f"the batch file {source} holds no requests")
    llm = load(args)
    names = args.served_model_name or [str(args.model)]
    started = time.perf_counter()
    try:
        with target.open("w", encoding="utf-8") as out, progress_bar() as bar:
            task = bar.add_task("answering", total=len(lines))
            num_failed = asyncio.run(run_batch(llm, names, lines, out, lambda: bar.advance(task)))
    except OSError as error:
        raise QSpecError(f"{target} cannot be written: {error}") from None
    seconds = time.perf_counter() - started
    print(
        f"qspec: {len(lines)} requests in {seconds:.1f} s, {num_failed} of them refused; "
        f"answers are in {target}",
        file=sys.stderr,
    )
