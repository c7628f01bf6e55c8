"""The one error that users see: a sentence with the offending value and the way out."""

__all__ = ["QSpecError"]


class QSpecError(ValueError):
    """Something the caller can mend: a bad option, file, model or prompt.

    The message is one sentence that names the offending value and says what would work. The
    command line prints it and exits with status 2; the Python API raises it.
    """
