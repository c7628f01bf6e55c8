"""`python -m qspec_llm` is `qspec`, from sources that are not installed too."""

import sys

from qspec_llm.cli import main

if __name__ == "__main__":
    sys.exit(main())
