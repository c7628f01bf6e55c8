"""What the engine's thread and the event loop tell each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qspec_llm.engine.emit import Emission
from qspec_llm.engine.engine import Gamma
from qspec_llm.engine.grammar import Grammar
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.request import Request, TokenLogprobs

__all__ = ["EngineFailedError", "Job", "News", "Submission"]


class EngineFailedError(Exception):
    """The engine's thread ended; the message says why."""


@dataclass(frozen=True)
class Submission:
    """One completion to generate."""

    prompt: Sequence[int]
    params: SamplingParams
    gamma: Gamma | None = None
    sample: int = 0
    seed: int | None = None
    salt: bytes = b""
    grammar: Grammar | None = None


@dataclass(frozen=True)
class News:
    """What a step, or some steps in a row, did for one completion of a job.

    Attributes:
        index: which completion.
        emission: its new tokens and text.
        logprobs: of the new tokens, where they were asked for.
        prompt_logprobs: of the prompt's, in its first news.
        ends: length of the completion's text after each new token.
        gamma: tokens that the request drafts at the moment.
        finished: the request itself, in its last news; nobody changes it any more.
    """

    index: int
    emission: Emission
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    ends: tuple[int, ...]
    gamma: int
    finished: Request | None


@dataclass(eq=False)
class Job:
    """Completions that belong together; its callbacks run on the event loop.

    Attributes:
        submissions: what to generate.
        on_news: called with news, one of each completion that has any.
        on_failure: called once, instead of the news still to come.
        requests: the engine's requests, once it has taken them.
    """

    submissions: Sequence[Submission]
    on_news: Callable[[Sequence[News]], None]
    on_failure: Callable[[Exception], None]
    requests: list[Request] = field(default_factory=list)
    is_cancelled: bool = False
