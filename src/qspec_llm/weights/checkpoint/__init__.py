"""Reading models: safetensors, GPTQ, AWQ, compressed-tensors, GGUF and nested, by one interface.

Tensors carry Hugging Face names and layouts whatever the file calls them. Nothing here quantises;
a tensor that a file ships in 4 or 8 bits and that the target keeps as it is comes back as planes.
"""

from collections.abc import Callable
from pathlib import Path

from qspec_llm.errors import QSpecError
from qspec_llm.weights.checkpoint.base import Checkpoint, Metadata

__all__ = ["Checkpoint", "Metadata", "open_checkpoint"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model directory or a .gguf file.

    Raises:
        QSpecError: the path is missing, unreadable, or of a kind that is not supported.
    """
    if not path.exists():
        raise QSpecError(f"{path} does not exist; give a model directory, a .gguf file or a hub id")
    return _opener(path)(path)


def _opener(path: Path) -> Callable[[Path], Checkpoint]:
    if path.is_file():
        if path.suffix in PICKLE_SUFFIXES:
            raise QSpecError(
                f"{path} holds pickled weights, which can run code when read; "
                "convert the model to safetensors"
            )
        if path.suffix != ".gguf":
            raise QSpecError(f"{path} is not a .gguf file or a model directory")
        from qspec_llm.weights.checkpoint.gguf_file import GGUFCheckpoint

        return GGUFCheckpoint
    from qspec_llm.weights import store

    if (path / store.INDEX_NAME).exists():
        return store.NestedCheckpoint
    if not any(path.glob("*.safetensors")):
        if any(file.suffix in PICKLE_SUFFIXES for file in path.iterdir()):
            raise QSpecError(
                f"{path} holds only pickled weights, which can run code when read; "
                "convert the model to safetensors"
            )
        if files := sorted(path.glob("*.gguf")):
            raise QSpecError(f"{path} is a directory; name the GGUF file itself, e.g. {files[0]}")
        raise QSpecError(f"{path} holds no .safetensors files")
    return _reader(path)


def _reader(path: Path) -> Callable[[Path], Checkpoint]:
    """Who reads a directory of safetensors: floats, or the quantiser that its config names."""
    from qspec_llm.weights.checkpoint.awq import AWQCheckpoint
    from qspec_llm.weights.checkpoint.compressed_tensors import CompressedTensorsCheckpoint
    from qspec_llm.weights.checkpoint.gptq import GPTQCheckpoint
    from qspec_llm.weights.checkpoint.safetensors_dir import SafetensorsCheckpoint, read_json

    config = read_json(path / "config.json").get("quantization_config")
    if config is None:
        return SafetensorsCheckpoint
    method = config.get("quant_method") if isinstance(config, dict) else config
    readers: dict[object, Callable[[Path], Checkpoint]] = {
        "gptq": GPTQCheckpoint,
        "awq": AWQCheckpoint,
        "compressed-tensors": CompressedTensorsCheckpoint,
    }
    if isinstance(config, dict) and isinstance(method, str) and method in readers:
        return readers[method]
    if method == "bitsandbytes":
        raise QSpecError(
            f"{path} is quantised with bitsandbytes, whose NF4 levels are uneven (its INT8 "
            "keeps outliers in 16 bits), so no 4- or 8-bit grid here holds them; give the original "
            "checkpoint, from which bitsandbytes quantises at load, or a GGUF file"
        )
    raise QSpecError(
        f"{path} is quantised with {method!r}, which cannot be imported; imported are "
        f"{', '.join(map(str, readers))}, or give the original checkpoint or a GGUF file"
    )
