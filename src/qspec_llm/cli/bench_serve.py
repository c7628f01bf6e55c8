"""`qspec bench serve`: load on a server that runs, or on one that is started for it."""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx2 as httpx

from qspec_llm.bench.serve import Load, Outcome, make_prompts, plot, run_load, summarise
from qspec_llm.cli.common import progress_bar
from qspec_llm.errors import QSpecError

__all__ = ["run"]

START_SECONDS = 600.0  # a large model takes its time to load and to measure


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command; returns what --json prints."""
    if (args.model is None) == (args.url is None):
        raise QSpecError("give either a MODEL to serve, or --url and --model-name of a server")
    if args.offline and args.model is None:
        raise QSpecError("--offline needs a MODEL")
    if args.rounds < 1:
        raise QSpecError(f"--rounds is {args.rounds}; it must be at least 1")
    load = _load(args)
    report: dict[str, Any] = {"target": args.target, "gamma": args.gamma}
    offline = _Offline(args) if args.offline else None
    with _server(args) as (url, name), progress_bar() as bar:
        task = bar.add_task("requests", total=load.num_requests * args.rounds)

        def measure(load: Load) -> list[Outcome]:
            advance = partial(bar.advance, task)
            return asyncio.run(run_load(url, name, load, key=args.key, advance=advance))

        few = Load(num_requests=2, concurrency=2, max_tokens=8, body=load.body, seed=-1)
        for _ in range(args.warm_up):
            asyncio.run(run_load(url, name, few, key=args.key, advance=lambda: None))
        rates, outcomes = _Rates(), list[Outcome]()
        for number in range(args.rounds):
            fresh = replace(load, seed=load.seed + number)  # prompts that no cache has seen
            if offline is not None:
                rates.offline.append(offline.rate(fresh))
            outcomes = measure(fresh)
            rates.server.append(summarise(fresh, outcomes)["tokens_per_second"])
            if offline is not None:
                rates.again.append(offline.rate(fresh))
    report |= summarise(load, outcomes)
    report["rounds"] = rates.server
    if offline is not None:
        report["offline"] = rates.compared()
    if args.plot:
        title = f"{name}: {load.num_requests} requests, {_pattern(load)}"
        report["plots"] = [str(path) for path in plot(outcomes, Path(args.plot), title)]
    if not args.json:
        _show(report, load)
    return report


@dataclass
class _Rates:
    """Tokens a second of each round: offline, through the server, offline again."""

    offline: list[float] = field(default_factory=list)
    server: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)

    def compared(self) -> dict[str, Any]:
        """The server against the mean of both offline turns around it; medians of all rounds.

        `aa_ratio` is one offline turn against the other: what noise alone does.
        """
        turns = list(zip(self.offline, self.server, self.again, strict=True))
        ratios = [2 * server / (before + after) for before, server, after in turns]
        return {
            "tokens_per_second": statistics.median([*self.offline, *self.again]),
            "server_tokens_per_second": statistics.median(self.server),
            "server_over_offline": statistics.median(ratios),
            "ratios": ratios,
            "aa_ratio": statistics.median(after / before for before, _, after in turns),
        }


def _load(args: argparse.Namespace) -> Load:
    try:
        body = json.loads(args.body) if args.body else {}
    except ValueError as error:
        raise QSpecError(f"--body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise QSpecError("--body is not a JSON object")
    if args.model is not None:
        body = {"ignore_eos": True, **body}
    return Load(
        num_requests=args.requests,
        concurrency=args.concurrency,
        rate=args.rate,
        prompt_words=args.prompt_words,
        shared_words=args.shared_words,
        max_tokens=args.max_tokens,
        is_streamed=not args.no_stream,
        body=body,
        seed=args.seed,
    )


class _Offline:
    """The same work through the offline API, without a server."""

    def __init__(self, args: argparse.Namespace) -> None:
        from qspec_llm.llm import LLM

        self._gamma = args.gamma
        self._llm = LLM(
            args.model,
            target=args.target,
            gamma=args.gamma,
            max_batch=args.max_batch,
            threads=args.threads,
        )
        self.rate(Load(num_requests=2, max_tokens=8, seed=-1))

    def rate(self, load: Load) -> float:
        """Tokens a second, with an empty cache."""
        from qspec_llm.engine.params import SamplingParams

        self._llm.engine = self._llm.new_engine(self._gamma)
        params = SamplingParams(temperature=0, max_tokens=load.max_tokens, ignore_eos=True)
        prompts = make_prompts(load)
        started = time.perf_counter()
        outputs = self._llm.generate(prompts, params)
        seconds = time.perf_counter() - started
        return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds


@contextlib.contextmanager
def _server(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Address and model name of the server to measure."""
    if args.url is not None:
        yield args.url.rstrip("/"), args.model_name or "default"
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "import sys; from qspec_llm.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "serve", args.model, "--port", str(port)]
    command += ["--served-model-name", "bench", "--log-level", "warning"]
    command += ["--target", args.target, "--gamma", str(args.gamma)]
    command += ["--max-batch", str(args.max_batch)]
    command += ["--threads", str(args.threads)] if args.threads else []
    keyless = {name: value for name, value in os.environ.items() if name != "QSPEC_API_KEY"}
    with subprocess.Popen(command, env=keyless) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(process, url)
            yield url, "bench"
        finally:
            process.terminate()


def _wait(process: "subprocess.Popen[bytes]", url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise QSpecError("the server ended before it answered")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(0.2)
    raise QSpecError(f"the server did not answer within {START_SECONDS:.0f} seconds")


def _pattern(load: Load) -> str:
    if load.rate is None:
        return f"{load.concurrency} clients, closed loop"
    return f"{load.rate:g} requests/s, Poisson"


def _show(report: dict[str, Any], load: Load) -> None:
    print(
        f"{report['requests']} requests ({report['failed']} failed), {_pattern(load)}: "
        f"{report['seconds']:.1f} s, {report['tokens_per_second']:.1f} tokens/s, "
        f"{report['requests_per_second']:.2f} requests/s"
    )
    for name in ("time_to_first_token", "time_per_token", "between_chunks", "end_to_end"):
        figures = ", ".join(f"{key} {value * 1e3:.1f}" for key, value in report[name].items())
        if not figures:
            continue
        print(f"  {name.replace('_', ' '):<20} {figures} ms")
    if report["first_error"]:
        print(f"  first error: {report['first_error']}")
    if len(report["rounds"]) > 1:
        rates = ", ".join(f"{rate:.1f}" for rate in report["rounds"])
        print(f"  rounds: {rates} tokens/s; the figures above are of the last")
    if offline := report.get("offline"):
        ratios = offline["ratios"]
        print(
            f"  offline API: {offline['tokens_per_second']:.1f} tokens/s; the server reaches "
            f"{offline['server_over_offline']:.1%} of it ({min(ratios):.1%} to {max(ratios):.1%}); "
            f"A/A {offline['aa_ratio']:.3f}"
        )
    for path in report.get("plots", ()):
        print(f"  {path}")
