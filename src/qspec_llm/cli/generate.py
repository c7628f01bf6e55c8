"""`qspec generate`: complete prompts, stream the text, and say what drafting did."""

import argparse
import json
import sys
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from qspec_llm.bench.measure import run_in_turn, warm_up
from qspec_llm.cli.common import (
    check_prompt,
    load,
    read_prompt_file,
    sampling_params,
    write_segments,
)
from qspec_llm.engine.emit import Emission, Segment
from qspec_llm.engine.engine import Engine
from qspec_llm.engine.request import Request
from qspec_llm.llm import LLM

__all__ = ["run"]


@dataclass
class _Printer:
    """Streams the first unfinished answer and keeps the others until their turn."""

    console: Console
    requests: list[Request]
    prompts: list[str]
    is_silent: bool
    _waiting: dict[int, list[Segment]] = field(default_factory=dict)
    _current: int = 0
    _has_title: bool = False

    def show(self, emissions: list[Emission]) -> None:
        """Take a step's news and print what can be printed in order."""
        if self.is_silent:
            return
        for emission in emissions:
            self._waiting.setdefault(emission.request_id, []).extend(emission.segments)
        while self._current < len(self.requests):
            request = self.requests[self._current]
            if len(self.requests) > 1 and not self._has_title:
                self.console.print(f"--- {self.prompts[self._current]}", markup=False)
                self._has_title = True
            write_segments(self.console, self._waiting.pop(request.request_id, []))
            if not request.is_finished:
                return
            self.console.print()
            self._current += 1
            self._has_title = False


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    texts = _prompts(args)
    params = sampling_params(args)
    llm = load(args)
    prompts = [_encode(llm, text, args.raw) for text in texts]
    engines = [llm.engine]
    if args.compare:
        engines.append(llm.new_engine(gamma=0))
        warm_up(engines, lambda engine: llm.submit(engine, prompts, params))
    groups = [llm.submit(engine, prompts, params) for engine in engines]
    requests, *plain = [[group[0] for group in each] for each in groups]
    console = Console(highlight=False)
    printer = _Printer(console, requests, texts, args.json)
    run_in_turn(engines, lambda engine, news: printer.show(news) if engine is llm.engine else None)
    report = _report(llm, texts, requests, (engines[1], plain[0]) if plain else None)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _summarise(report, params.is_greedy)


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt_file is not None:
        return read_prompt_file(args.prompt_file)
    check_prompt(args.prompt)
    return [args.prompt]


def _encode(llm: LLM, text: str, is_raw: bool) -> list[int]:
    if is_raw or not llm.tokenizer.has_chat_template:
        return llm.encode(text)
    return llm.tokenizer.encode_chat([{"role": "user", "content": text}])


def _report(
    llm: LLM,
    texts: list[str],
    requests: list[Request],
    plain: tuple[Engine, list[Request]] | None,
) -> dict[str, Any]:
    """The object that --json prints."""
    seconds = llm.engine.seconds
    num_tokens = sum(len(request.output) for request in requests)
    num_tested = sum(request.num_tested for request in requests)
    num_cycles = sum(request.num_cycles for request in requests)
    return {
        "model": str(llm.model),
        "target": llm.config.target.value,
        "draft": llm.config.draft.value,
        "gamma": llm.config.gamma,
        "backend": llm.config.backend,
        "bytes": {
            "weights": llm.decoder.nbytes(),
            "weights_if_stored_once": llm.decoder.stored_bytes,
            "kv_per_token": llm.kv_bytes_per_token,
        },
        "results": [
            {
                "prompt": text,
                "text": request.text.text,
                "token_ids": request.output,
                "finish_reason": request.finish_reason,
                "prompt_tokens": len(request.prompt),
                "completion_tokens": len(request.output),
                "cycles": request.num_cycles,
                "drafted": request.num_drafted,
                "accepted": request.num_accepted,
            }
            for text, request in zip(texts, requests, strict=True)
        ],
        "acceptance_rate": (
            sum(request.num_accepted for request in requests) / num_tested if num_tested else None
        ),
        "mean_tokens_per_cycle": num_tokens / num_cycles,
        "seconds": seconds.total,
        "tokens_per_second": num_tokens / seconds.total,
        "compare": _compare(requests, seconds.total, *plain) if plain else None,
        "steps": {
            "draft_seconds": seconds.draft,
            "verify_seconds": seconds.verify,
            "other_seconds": seconds.other,
        },
    }


def _compare(
    requests: list[Request], seconds: float, engine: Engine, plain: list[Request]
) -> dict[str, Any]:
    plain_seconds = engine.seconds.total
    num_tokens = sum(len(request.output) for request in plain)
    return {
        "identical": [r.output for r in requests] == [r.output for r in plain],
        "seconds": plain_seconds,
        "tokens_per_second": num_tokens / plain_seconds,
        "speedup": plain_seconds / seconds,
    }


def _summarise(report: dict[str, Any], is_greedy: bool) -> None:
    """A few lines on stderr for a person."""
    rate, compare, gamma = report["acceptance_rate"], report["compare"], report["gamma"]
    lines = [
        f"{report['target']} target, {report['draft']} draft, gamma {gamma}: "
        f"{sum(r['completion_tokens'] for r in report['results'])} tokens in "
        f"{report['seconds']:.1f} s, {report['tokens_per_second']:.2f} tokens/s"
    ]
    if rate is not None:
        lines.append(
            f"{rate:.1%} of the tested drafts were accepted, "
            f"{report['mean_tokens_per_cycle']:.2f} tokens a cycle"
        )
    if compare is not None:
        lines.append(
            f"plain decoding: {compare['tokens_per_second']:.2f} tokens/s; "
            f"drafting made it {compare['speedup']:.2f}x as fast"
        )
        lines.append(_verdict(compare["identical"], is_greedy))
    print("\n".join(f"qspec: {line}" for line in lines), file=sys.stderr)


def _verdict(is_identical: bool, is_greedy: bool) -> str:
    if is_identical:
        return "every token is identical to plain decoding"
    if is_greedy:
        return "TOKENS DIFFER from plain decoding: this is a bug, please report it"
    return "tokens differ, as two random draws do; their distribution is the same"
