"""QSpec: lossless self-speculative decoding. One stored model, read at two precisions.

    from qspec_llm import LLM, SamplingParams

    llm = LLM("smollm2", target="bf16")
    print(llm.chat([{"role": "user", "content": "Hello!"}], SamplingParams(temperature=0)))

Importing this package imports neither torch nor a tokenizer; the names below load on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from qspec_llm.errors import QSpecError
from qspec_llm.version import __version__

if TYPE_CHECKING:
    from qspec_llm.engine.params import SamplingParams
    from qspec_llm.llm import LLM, CompletionOutput, RequestOutput

__all__ = [
    "LLM",
    "CompletionOutput",
    "QSpecError",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

_WHERE = {
    "LLM": "qspec_llm.llm",
    "CompletionOutput": "qspec_llm.llm",
    "RequestOutput": "qspec_llm.llm",
    "SamplingParams": "qspec_llm.engine.params",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
