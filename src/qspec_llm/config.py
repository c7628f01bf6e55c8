"""Options of one engine: frozen, checked once, with every "auto" already decided."""

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from qspec_llm.engine.engine import Gamma
from qspec_llm.errors import QSpecError
from qspec_llm.kernels import available_backends, get_backend
from qspec_llm.weights.checkpoint import Checkpoint
from qspec_llm.weights.planes import GROUPS
from qspec_llm.weights.quantize import Recipe, Target
from qspec_llm.weights.view import Activation, View, draft_view

__all__ = [
    "DEFAULT_GAMMA",
    "DEFAULT_GROUP",
    "DEFAULT_KV_TOKENS",
    "DEFAULT_MAX_BATCH",
    "EngineConfig",
    "cache_directory",
    "parse_choice",
    "resolve_target",
]

# What pays at the acceptance that 4-bit drafts reach, by the step costs measured so far
# (`qspec bench steps`, `bench decode`; README). Under int4 both views read the same bytes, so a
# draft step costs as much as a plain one; under int8 it costs 0.7 of one.
DEFAULT_GAMMA = {Target.INT4: 0, Target.INT8: 0, Target.BF16: 2}
DEFAULT_GROUP = 32
DEFAULT_MAX_BATCH = 8
DEFAULT_KV_TOKENS = 16384

_Choice = TypeVar("_Choice", bound=StrEnum)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that decides how a model is stored and run.

    Attributes:
        target: what the verify view reproduces.
        draft: activations of the draft view.
        gamma: tokens drafted in each cycle, 0 for plain decoding; "auto" for whatever pays best at
            the moment; None is the target's default, and is resolved at once.
        group: weights that share one scale.
        max_batch: requests that run at once.
        max_tokens_in_kv: tokens that the KV cache holds.
        threads: threads of the kernels, None for one a physical core.
        isa: instruction set of the CPU kernels, None for the best this machine has.
        backend: whose kernels run; "auto" is the fastest that runs here, and is resolved at once.
    """

    target: Target
    draft: Activation = Activation.A8
    gamma: Gamma | None = None
    group: int = DEFAULT_GROUP
    max_batch: int = DEFAULT_MAX_BATCH
    max_tokens_in_kv: int = DEFAULT_KV_TOKENS
    threads: int | None = None
    isa: str | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise QSpecError(f"group is {self.group}; it must be one of {GROUPS}")
        for name in ("max_batch", "max_tokens_in_kv"):
            if getattr(self, name) < 1:
                raise QSpecError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.gamma is None:
            object.__setattr__(self, "gamma", DEFAULT_GAMMA[self.target])
        if self.backend == "auto":
            object.__setattr__(self, "backend", available_backends()[0])
        if self.threads is not None and self.threads < 1:
            raise QSpecError(f"threads is {self.threads}; it must be at least 1")
        get_backend(self.backend).configure(self.threads, self.isa)

    @property
    def recipe(self) -> Recipe:
        """How weights are nested."""
        return Recipe(self.target, self.group)

    @property
    def draft_view(self) -> View:
        """The view that proposes."""
        return draft_view(self.draft)


def cache_directory() -> Path:
    """Where measurements are kept between runs: $QSPEC_CACHE, or in the user's cache directory."""
    if own := os.environ.get("QSPEC_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qspec"


def parse_choice(kind: type[_Choice], value: str, option: str) -> _Choice:
    """`value` as a member of an enumeration of options.

    Raises:
        QSpecError: it is not one of them.
    """
    try:
        return kind(value)
    except ValueError:
        raise QSpecError(f"{option} is {value!r}; it must be one of {', '.join(kind)}") from None


def resolve_target(value: str, checkpoint: Checkpoint) -> Target:
    """The target that "auto" means: the precision that the checkpoint itself has."""
    if value != "auto":
        return parse_choice(Target, value, "target")
    stored = getattr(checkpoint, "target", None)
    if isinstance(stored, Target):
        return stored
    types = [checkpoint.type_name(name) for name in checkpoint.names()]
    if any(type_name.startswith("Q4") for type_name in types):
        return Target.INT4
    return Target.INT8 if "Q8_0" in types else Target.BF16
