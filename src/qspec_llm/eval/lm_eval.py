"""QSpec as a model of lm-eval (EleutherAI's harness), registered under the name "qspec".

Importing this module registers it; it needs lm-eval (`pip install 'qspec-llm[eval]'`). Everything
goes through the engine: scores are log-probabilities of the verify view, generation drafts like any
other request, so speculation changes no score.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qspec_llm.engine.engine import Gamma
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.request import Request
from qspec_llm.errors import QSpecError
from qspec_llm.llm import LLM

__all__ = ["QSpecLM", "evaluate_tasks"]

DEFAULT_MAX_TOKENS = 256  # lm-eval's own default
IGNORED = ("do_sample", "until", "max_gen_toks", "max_new_tokens", "max_tokens", "temperature")


@register_model("qspec")
class QSpecLM(TemplateLM):  # type: ignore[misc]
    """A loaded model behind lm-eval's interface.

    Args:
        model: as `LLM` takes it; `pretrained` is the same under the name that other models use.
        llm: an `LLM` that is loaded already, instead.
        batch_size: ignored, since the engine batches by itself; lm-eval passes it on.
        device: ignored likewise.
        options: of `LLM`: target, draft, gamma, group, backend, max_batch, ...
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        pretrained: str | None = None,
        llm: LLM | None = None,
        batch_size: object = None,  # noqa: ARG002
        max_batch_size: object = None,  # noqa: ARG002
        device: object = None,  # noqa: ARG002
        **options: Any,
    ) -> None:
        super().__init__()
        name = model if model is not None else pretrained
        if llm is None and name is None:
            raise QSpecError("lm-eval was given no model: use --model_args model=MODEL")
        self._llm = llm if llm is not None else LLM(str(name), **options)
        self.tokenizer = self._llm.tokenizer.hf

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ends = self._llm.model_config.eos_token_ids
        own = self.tokenizer.eos_token_id
        return int(own if own is not None else min(ends))

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on: BOS where there is one."""
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence, context and answer together."""
        return min(self._llm.model_config.context_length, self._llm.cache_tokens) - 1

    @property
    def tokenizer_name(self) -> str:
        """Stands for the tokenizer in lm-eval's caches."""
        return str(self._llm.model).replace("/", "__")

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        **kwargs: Any,  # noqa: ARG002  # lm-eval's, for other models
    ) -> list[int]:
        """Token ids; special tokens are added unless the text begins with BOS or says not to."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self._llm.tokenizer.encode(string, has_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, by the model's own template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_options: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would give it."""
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
        prompts = [self._cut([*context, *answer], 0) for _, context, answer in requests]
        lengths = [min(len(answer), len(p) - 1) for (_, _, answer), p in zip(
            requests, prompts, strict=True)]  # fmt: skip
        done = self._run(prompts, [params] * len(prompts))
        results = []
        for (strings, _, _), request, length in zip(requests, done, lengths, strict=True):
            scored = request.prompt_logprobs[len(request.prompt_logprobs) - length :]
            total = sum(token.logprob for token in scored)
            is_greedy = all(token.top[0][0] == token.token_id for token in scored)
            results.append((total, is_greedy))
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, results[-1])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], **_options: Any) -> list[float]:
        """Log-probability of whole texts, in windows as long as the model takes."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(
                token_list=tokens,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += total
        return totals

    def generate_until(self, requests: Sequence[Any], **_options: Any) -> list[str]:
        """Answers up to a stop string."""
        params = [_sampling_params(dict(request.args[1])) for request in requests]
        prompts = [
            self._cut(self.tok_encode(request.args[0]), each.max_tokens)
            for request, each in zip(requests, params, strict=True)
        ]
        texts = [request.text.text for request in self._run(prompts, params)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _cut(self, tokens: list[int], room: int) -> list[int]:
        """The end of a prompt that is too long to leave room for its answer."""
        return tokens[-max(self.max_length - room, 1) :]

    def _run(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[Request]:
        """Finished requests, in order."""
        engine = self._llm.engine
        groups = [
            self._llm.submit(engine, [prompt], each)
            for prompt, each in zip(prompts, params, strict=True)
        ]
        while engine.has_work:
            engine.step()
        return [group[0][0] for group in groups]


def _sampling_params(options: dict[str, Any]) -> SamplingParams:
    """Sampling options from lm-eval's generation options; one that is not known is an error."""
    until = options.get("until") or ()
    lengths = (options.get(key) for key in ("max_gen_toks", "max_new_tokens", "max_tokens"))
    max_tokens = next((int(n) for n in lengths if n is not None), DEFAULT_MAX_TOKENS)
    temperature = float(options.get("temperature") or 0)
    if not options.get("do_sample", temperature > 0):
        temperature = 0.0
    rest = {key: value for key, value in options.items() if key not in IGNORED}
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            stop=[until] if isinstance(until, str) else [text for text in until if text],
            **rest,
        )
    except TypeError:
        raise QSpecError(f"a task asks for generation options {sorted(rest)}") from None


def evaluate_tasks(
    llm: LLM,
    tasks: Sequence[str],
    *,
    gamma: Gamma | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
) -> dict[str, Any]:
    """Run tasks of lm-eval: names that it knows, or YAML files.

    Args:
        llm: a loaded model.
        tasks: task names, or paths of .yaml files with local data files.
        gamma: tokens to draft in each cycle; the model's own by default.
        limit: documents of each task, the first.
        num_fewshot: examples before each question, the task's own number by default.
        apply_chat_template: put questions as the model's conversations.

    Returns:
        By task: lm-eval's figures ("acc,none", "acc_stderr,none", ...).

    Raises:
        QSpecError: a task is unknown, or its data is neither here nor to be had.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.exists():
            raise QSpecError(f"the task file {file} does not exist")
    if gamma is not None:
        llm.engine = llm.new_engine(gamma)
    run = partial(
        simple_evaluate,
        model=QSpecLM(llm=llm),
        tasks=[str(Path(task).resolve()) if Path(task) in files else task for task in tasks],
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        bootstrap_iters=1000,
        log_samples=False,
    )
    try:
        # lm-eval's own tasks take seconds to list
        manager = TaskManager(include_defaults=len(files) < len(tasks))
        results = run(task_manager=manager)
    except QSpecError:
        raise
    except KeyError as error:
        raise QSpecError(f"lm-eval does not know a task of {', '.join(tasks)}: {error}") from None
    except (OSError, ValueError, RuntimeError) as error:
        # connection errors of requests and datasets are OSErrors; their texts run over pages
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise QSpecError(
            f"the data of {', '.join(tasks)} is not here and could not be fetched "
            f"({reason[:200]}); a task file (.yaml) with local data files needs no network"
        ) from None
    return dict(results["results"]) if results else {}
