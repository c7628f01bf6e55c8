"""The command line: `qspec generate | chat | serve | run-batch | quantize | eval | bench | ...`.

`parser` has the options; here commands are run and errors reported.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from qspec_llm.cli.parser import parser
from qspec_llm.errors import QSpecError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 2 for what the caller can mend, or 130 when interrupted."""
    args = parser().parse_args(argv)
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
