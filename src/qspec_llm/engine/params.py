"""What a caller may ask of one request."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from qspec_llm.errors import QSpecError

__all__ = ["SamplingParams"]

# option: (kind, least, most)
LIMITS: dict[str, tuple[type, float, float | None]] = {
    "max_tokens": (int, 1, None),
    "min_tokens": (int, 0, None),
    "temperature": (float, 0, 100),
    "top_p": (float, 0, 1),
    "top_k": (int, 0, None),
    "min_p": (float, 0, 1),
    "seed": (int, -(2**63), 2**64 - 1),
    "logprobs": (int, 0, 20),
    "prompt_logprobs": (int, 0, 20),
    "repetition_penalty": (float, 0.01, 100),
    "presence_penalty": (float, -2, 2),
    "frequency_penalty": (float, -2, 2),
    "n": (int, 1, 64),
}
OPTIONAL = ("seed", "logprobs", "prompt_logprobs")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling options of one request, under the names that vLLM and the OpenAI API use.

    Attributes:
        max_tokens: tokens to generate at most.
        min_tokens: no end or stop before so many tokens.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_p: keep the most likely tokens whose probabilities sum to this, in (0, 1].
        top_k: keep this many most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than this share of the most likely one, in [0, 1].
        seed: same seed, same tokens, alone or in a batch; None draws a new one.
        stop: generation ends before any of these strings appears.
        stop_token_ids: generation ends at any of these tokens.
        ignore_eos: do not end at the model's own end tokens.
        logprobs: return the log-probabilities of the chosen token and of this many most likely
            ones, from the verify view, before penalties and temperature; None for none.
        prompt_logprobs: the same for the prompt's tokens, its first excepted; such a prompt is
            computed whole, whatever the cache holds of it.
        logit_bias: added to the logits of these tokens, -100 to 100.
        repetition_penalty: divide positive logits of tokens seen in prompt or output by it and
            multiply negative ones (CTRL, Keskar et al. 2019, section 4.1); 1 is off.
        presence_penalty: subtract it from logits of tokens seen in the output.
        frequency_penalty: subtract it once for every time a token is in the output.
        n: independent completions of the prompt.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    n: int = 1

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name, (kind, low, high) in LIMITS.items():
            _check(name, getattr(self, name), kind, low, high)
        for token, bias in self.logit_bias.items():
            _check(f"logit_bias of token {token}", bias, float, -100, 100)
        if self.min_tokens > self.max_tokens:
            raise QSpecError(f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}")
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise QSpecError(f"{name} is {getattr(self, name)}; it must be above 0")
        if "" in stop:
            raise QSpecError("an empty stop string would stop before the first token")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken instead of a draw."""
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @classmethod
    def names(cls) -> list[str]:
        """The names of all options."""
        return [field.name for field in fields(cls)]


def _check(name: str, value: Any, kind: type, low: float, high: float | None) -> None:
    """Refuse a value of another kind or outside its limits; NaN is outside any."""
    if value is None and name in OPTIONAL:
        return
    is_kind = type(value) is int or (kind is float and type(value) is float)
    if not is_kind or not low <= value or (high is not None and value > high):
        article = "a whole number" if kind is int else "a number"
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise QSpecError(f"{name} is {value!r}; it must be {article} {bound}")
