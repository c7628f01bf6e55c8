"""`qspec bench`: what steps and whole generations cost on this machine."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from qspec_llm.bench import decode, enlarge, kernels, shapes, steps, synthetic
from qspec_llm.cli.common import progress_bar, read_prompt_file
from qspec_llm.config import EngineConfig
from qspec_llm.engine.engine import Engine, Gamma
from qspec_llm.engine.graphs import graphs_of
from qspec_llm.engine.params import SamplingParams
from qspec_llm.engine.runner import Runner
from qspec_llm.errors import QSpecError
from qspec_llm.hub import resolve_model
from qspec_llm.kernels import get_backend
from qspec_llm.kv.blocks import blocks_for
from qspec_llm.kv.pool import allocate
from qspec_llm.llm import LLM
from qspec_llm.model.config import ModelConfig, read_config
from qspec_llm.model.decoder import Decoder
from qspec_llm.model.load import load_decoder
from qspec_llm.tokenizer import HFTokenizer
from qspec_llm.weights.checkpoint import Checkpoint, open_checkpoint
from qspec_llm.weights.quantize import Target
from qspec_llm.weights.view import Activation, draft_view

__all__ = ["run"]

ENLARGED_TOKENS = 2048  # of one sequence of an enlarged model
SYNTHETIC = "synthetic acceptance (a coin decides, not the model)"


def run(args: argparse.Namespace) -> None:
    """Run `qspec bench kernels`, `steps`, `decode` or `serve`."""
    kinds = {"kernels": _kernels, "steps": _steps, "decode": _decode, "serve": _serve}
    report = kinds[args.bench](args)
    if args.json:
        print(json.dumps(report))


def _serve(args: argparse.Namespace) -> dict[str, Any]:
    try:
        from qspec_llm.cli import bench_serve
    except ImportError as error:
        raise QSpecError(
            f"bench serve needs {error.name}; install it with `pip install qspec-llm[server]`"
        ) from None
    return bench_serve.run(args)


def _engine(args: argparse.Namespace, target: Target) -> EngineConfig:
    return EngineConfig(
        target=target,
        group=args.group,
        threads=args.threads,
        isa=args.isa,
        backend=args.backend,
    )


def _kernels(args: argparse.Namespace) -> dict[str, Any]:
    backend = _engine(args, Target.BF16).backend
    with progress_bar() as bar:
        task = bar.add_task("kernels", total=None)
        report = kernels.bench(
            get_backend(backend),
            args.shapes,
            args.rows,
            args.group,
            args.rounds,
            lambda: bar.advance(task),
        )
    if not args.json:
        kernels.show(report)
    return report


def _steps(args: argparse.Namespace) -> dict[str, Any]:
    if (args.model is None) == (args.shape is None):
        raise QSpecError("give either a MODEL or --shape, so that one model is measured")
    checkpoint = _checkpoint(args)
    config = read_config(checkpoint)
    contexts = _contexts(args.contexts, config)
    decoders = _load_targets(args, checkpoint, config, contexts[-1] + max(args.rows))
    draft = Activation(args.draft)
    num_cases = len(decoders) * len(contexts) * (1 + len(args.rows))
    with progress_bar() as bar:
        total = num_cases * (args.rounds + 1)
        task = bar.add_task("steps", total=total)
        costs = steps.step_costs(
            decoders, draft, args.rows, contexts, args.rounds, lambda: bar.advance(task)
        )
    report = {
        "backend": args.backend,
        "model": _name(args),
        "threads": get_backend(args.backend).num_threads(),
        "steps": [
            {
                "view": "draft" if case.view.is_draft else "verify",
                "target": case.target,
                "draft": draft.value if case.view.is_draft else None,
                "rows": case.rows,
                "context": case.context,
                "seconds": seconds,
            }
            for case, seconds in costs.items()
        ],
        **steps.summarise(costs, draft),
        "host_share": _host_share(args, decoders),
    }
    if not args.json:
        _show_steps(report)
    return report


def _checkpoint(args: argparse.Namespace) -> Checkpoint:
    """The model to measure; weights that are no file's are made where the backend computes."""
    if not args.shape:
        if args.enlarge:
            raise QSpecError("--enlarge needs --shape, the sizes to enlarge to")
        return open_checkpoint(resolve_model(args.model))
    args.backend = _engine(args, Target.BF16).backend  # "auto" is resolved
    device = get_backend(args.backend).device
    if not args.enlarge:
        return shapes.RandomCheckpoint(args.shape, device, args.group)
    small = open_checkpoint(resolve_model(args.enlarge))
    shape = shapes.SHAPES[args.shape]
    return enlarge.EnlargedCheckpoint(small, read_config(small), shape, device, args.group)


def _name(args: argparse.Namespace) -> str:
    """The model as a report names it."""
    if not args.enlarge:
        return str(args.shape or args.model)
    return f"{args.enlarge} zero-padded to the shape {args.shape} (it computes what it computed)"


def _host_share(args: argparse.Namespace, decoders: dict[str, Decoder]) -> float | None:
    """Measured on the fastest target, where it is largest; None without a tokenizer."""
    if args.shape:
        return None
    tokenizer = HFTokenizer(resolve_model(args.model))
    return steps.host_share(next(iter(decoders.values())), tokenizer, num_steps=100)


def _contexts(contexts: list[int], config: ModelConfig) -> list[int]:
    longest = config.context_length - 16
    if max(contexts) > longest:
        raise QSpecError(f"context {max(contexts)} is too long; this model allows {longest}")
    return sorted(contexts)


def _load_targets(
    args: argparse.Namespace, checkpoint: Checkpoint, config: ModelConfig, num_positions: int
) -> dict[str, Decoder]:
    decoders = {}
    for name in args.targets:
        target = Target(name)
        engine = _engine(args, target)
        args.backend = engine.backend  # "auto" is resolved
        with progress_bar() as bar:
            task = bar.add_task(f"nesting for {name}", total=None)

            def show(done: int, total: int, task: Any = task, bar: Any = bar) -> None:
                bar.update(task, completed=done, total=total)

            decoders[name] = load_decoder(
                checkpoint,
                config,
                engine.recipe,
                get_backend(engine.backend),
                num_positions=num_positions,
                progress=show,
            )
    return decoders


def _show_steps(report: dict[str, Any]) -> None:
    print(f"{report['model']}, {report['backend']} backend, {report['threads']} threads")
    print("milliseconds (median):")
    for step in report["steps"]:
        view = f"{step['view']} {step['draft'] or ''}".strip()
        print(
            f"  {step['target']:<5} {view:<9} rows {step['rows']:>2}  context {step['context']:>5}"
            f"  {step['seconds'] * 1e3:9.3f}"
        )
    for target, c in report["c"].items():
        v = ", ".join(f"{rows}: {ratio:.2f}" for rows, ratio in report["v"][target].items())
        print(f"{target}: c = {c:.3f}; v by rows: {v}")
        for acceptance, best in report["implied"][target].items():
            print(
                f"  acceptance {acceptance}: gamma {best['gamma']}, {best['speedup']:.2f}x of plain"
            )
    share = report["host_share"]
    print(
        "outside kernels: " + ("not measured" if share is None else f"{share:.1%} of a plain step")
    )


def _decode(args: argparse.Namespace) -> dict[str, Any]:
    is_random = args.shape is not None and args.enlarge is None
    if is_random != (args.synthetic_acceptance is not None):
        raise QSpecError(
            "--shape and --synthetic-acceptance belong together: random weights accept nothing "
            "by themselves, and a real model needs no coin"
        )
    if args.rounds < 1 or (args.rounds > 1 and not is_random):
        raise QSpecError(
            f"--rounds {args.rounds}: give 1 or, with --shape and --synthetic-acceptance, more"
        )
    if is_random:
        return _decode_synthetic(args)
    if (args.model is None) == (args.enlarge is None) or args.prompt_file is None:
        raise QSpecError(
            "give a MODEL (or --enlarge MODEL --shape S) and --prompt-file, or --shape and "
            "--synthetic-acceptance"
        )
    texts = read_prompt_file(args.prompt_file)
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=True)
    runs: list[dict[str, Any]] = []
    results: dict[str, decode.TargetResult] = {}
    for target in args.targets:
        print(f"qspec: {target}: loading and decoding", file=sys.stderr)
        tokenizer, new_engine = _loaded(args, target)
        prompts = [tokenizer.encode_chat([{"role": "user", "content": t}]) for t in texts]
        result = results[target] = decode.decode(new_engine, prompts, params, args.gamma)
        run = {"target": target, "draft": args.draft}
        runs.append(
            {
                **run,
                "gamma": 0,
                "tokens_per_second": result.plain_tokens_per_second,
                "acceptance_rate": None,
            }
        )
        runs.append(
            {
                **run,
                "gamma": args.gamma,
                "tokens_per_second": result.speculative_tokens_per_second,
                "acceptance_rate": result.acceptance_rate,
            }
        )
        if not args.json:
            _show_decode(_name(args), target, args.gamma, result)
    return {
        "model": _name(args),
        "runs": runs,
        "speedup": {target: result.speedup for target, result in results.items()},
        "identical": {target: result.identical for target, result in results.items()},
        "aa_ratio": max((r.aa_ratio for r in results.values()), key=lambda ratio: abs(ratio - 1)),
    }


def _loaded(args: argparse.Namespace, target: str) -> tuple[HFTokenizer, Callable[[Gamma], Engine]]:
    """A model's tokenizer, and what makes engines over its weights."""
    if args.enlarge is None:
        llm = LLM(
            args.model,
            target=target,
            draft=args.draft,
            group=args.group,
            threads=args.threads,
            isa=args.isa,
            backend=args.backend,
            max_batch=args.max_batch,
        )
        return llm.tokenizer, llm.new_engine
    checkpoint = _checkpoint(args)
    config = read_config(checkpoint)
    num_tokens = min(config.context_length, ENLARGED_TOKENS)
    tokenizer = HFTokenizer(resolve_model(args.enlarge))
    one = argparse.Namespace(**{**vars(args), "targets": [target]})
    decoder = _load_targets(one, checkpoint, config, num_tokens)[target]
    view = draft_view(Activation(args.draft))
    num_blocks = args.max_batch * blocks_for(num_tokens)

    def new_engine(gamma: Gamma) -> Engine:
        kv = allocate(config, num_blocks, decoder.dtype, decoder.ops.device)
        graphs = graphs_of(decoder, kv, view, args.max_batch)
        runner = Runner(decoder, kv)
        return Engine(runner, tokenizer, view, gamma=gamma, max_batch=args.max_batch, graphs=graphs)

    return tokenizer, new_engine


def _decode_synthetic(args: argparse.Namespace) -> dict[str, Any]:
    """Plain, plain again and speculative, at every batch; acceptance is a coin."""
    chance = args.synthetic_acceptance
    backend = _engine(args, Target.BF16).backend
    if backend != "cuda":
        raise QSpecError(
            f"--synthetic-acceptance needs the cuda backend, not {backend!r}: elsewhere measure "
            "real acceptance with a model"
        )
    runs: list[dict[str, Any]] = []
    for target in args.targets:
        checkpoint = _checkpoint(args)
        decoders = _load_targets(
            argparse.Namespace(**{**vars(args), "targets": [target]}),
            checkpoint,
            read_config(checkpoint),
            args.context + _synthetic_tokens(args, max(args.batches)),
        )
        decoder, view = decoders[target], draft_view(Activation(args.draft))
        for batch in args.batches:
            costs = synthetic.costs_of(decoder, view, batch) if args.gamma == "auto" else None
            plain, again, drafted = (
                synthetic.synthetic_decode(
                    decoder,
                    view,
                    batch=batch,
                    gamma=gamma,
                    context=args.context,
                    num_tokens=_synthetic_tokens(args, batch),
                    chance=chance,
                    rounds=args.rounds,
                    costs=costs,
                )
                for gamma in (0, 0, args.gamma)
            )
            speedup = drafted.tokens_per_second / plain.tokens_per_second
            expected = drafted.expected_speed(chance)
            aa_ratio = again.tokens_per_second / plain.tokens_per_second
            for run in (plain, again, drafted):
                runs.append({"target": target, "draft": args.draft, **asdict(run)})
                if not args.json:
                    print(
                        f"{SYNTHETIC} {chance}: {target} batch {batch} gamma {run.gamma}: "
                        f"{run.tokens_per_second:.1f} tokens/s, {run.seconds_per_cycle * 1e3:.3f} "
                        f"ms and {run.tokens_per_cycle:.2f} tokens a cycle, host "
                        f"{run.host_share:.1%}"
                    )
            runs[-1] |= {"speedup": speedup, "aa_ratio": aa_ratio}
            on_average = ""
            if expected is not None:
                runs[-1]["expected_speedup"] = expected / plain.tokens_per_second
                on_average = f" ({runs[-1]['expected_speedup']:.2f}x with a coin of average luck)"
            if not args.json:
                print(
                    f"{SYNTHETIC} {chance}: {target} batch {batch}: gamma {args.gamma} is "
                    f"{speedup:.2f}x of plain{on_average}, A/A {aa_ratio:.3f}"
                )
    return {
        "model": args.shape,
        "backend": args.backend,
        "context": args.context,
        "synthetic_acceptance": chance,
        "note": f"{SYNTHETIC} {chance}, random weights: a speed, not a model's output",
        "runs": runs,
    }


def _synthetic_tokens(args: argparse.Namespace, batch: int) -> int:
    """Of each answer, plain or not, so that contexts are as long in both."""
    before = (synthetic.tokens_before(batch, args.context, gamma) for gamma in (0, args.gamma))
    tokens: int = args.max_tokens + max(before)
    return tokens


def _show_decode(name: str, target: str, gamma: Gamma, result: decode.TargetResult) -> None:
    verdict = "identical" if result.identical else "NOT IDENTICAL"
    rate = "none" if result.acceptance_rate is None else f"{result.acceptance_rate:.3f}"
    print(
        f"{name}, {target}: plain {result.plain_tokens_per_second:.2f} tokens/s, "
        f"gamma {gamma} {result.speculative_tokens_per_second:.2f} ({result.speedup:.2f}x), "
        f"acceptance {rate}, {verdict}, A/A {result.aa_ratio:.3f}"
    )
