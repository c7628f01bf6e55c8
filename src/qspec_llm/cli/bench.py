"""`qspec bench`: what steps and whole generations cost on this machine."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from qspec_llm.bench import decode, gpu_instances, gpu_linears, kernels, synthetic
from qspec_llm.cli import bench_steps
from qspec_llm.cli.bench_models import checkpoint_of, engine_config, load_targets, model_name
from qspec_llm.cli.common import progress_bar, read_prompt_file
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
from qspec_llm.model.config import read_config
from qspec_llm.tokenizer import HFTokenizer
from qspec_llm.weights.quantize import Target
from qspec_llm.weights.view import Activation, draft_view

__all__ = ["run"]

ENLARGED_TOKENS = 2048  # of one sequence of an enlarged model
SYNTHETIC = "synthetic acceptance (a coin decides, not the model)"


def run(args: argparse.Namespace) -> None:
    """Run `qspec bench kernels`, `steps`, `decode` or `serve`."""
    kinds = {"kernels": _kernels, "steps": bench_steps.run, "decode": _decode, "serve": _serve}
    report = kinds[args.bench](args)
    if args.json and report:
        print(json.dumps(report))


def _serve(args: argparse.Namespace) -> dict[str, Any]:
    try:
        from qspec_llm.cli import bench_serve
    except ImportError as error:
        raise QSpecError(
            f"bench serve needs {error.name}; install it with `pip install qspec-llm[server]`"
        ) from None
    return bench_serve.run(args)


def _backend(args: argparse.Namespace) -> str:
    return engine_config(args, Target.BF16).backend


def _kernels(args: argparse.Namespace) -> dict[str, Any]:
    backend = _backend(args)
    if args.shape is not None:
        return _layer(args, backend)
    if args.prompts or args.instances is not None:
        option = "--prompts" if args.prompts else "--instances"
        raise QSpecError(f"{option} needs --shape, whose linears are measured")
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


def _layer(args: argparse.Namespace, backend: str) -> dict[str, Any]:
    """The linears of one layer on a GPU, against cuBLAS."""
    if backend != "cuda":
        raise QSpecError(
            f"bench kernels --shape needs the cuda backend, not {backend!r}: elsewhere give the "
            "matrices with --shapes"
        )
    if args.prompts and args.instances is not None:
        raise QSpecError("--instances are of generated rows; give it or --prompts")
    options = {"group": args.group, "rounds": args.rounds}
    if args.instances is not None:
        report = gpu_instances.bench(args.shape, args.rows, args.instances, **options)
        text = gpu_instances.show(report)
    else:
        cases = gpu_linears.PROMPT_CASES if args.prompts else gpu_linears.CASES
        report = gpu_linears.bench(args.shape, args.rows, cases=cases, **options)
        text = gpu_linears.show(report)
    if not args.json:
        print(text)
    return report


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
            _show_decode(model_name(args), target, args.gamma, result)
    return {
        "model": model_name(args),
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
    checkpoint = checkpoint_of(args)
    config = read_config(checkpoint)
    num_tokens = min(config.context_length, ENLARGED_TOKENS)
    tokenizer = HFTokenizer(resolve_model(args.enlarge))
    one = argparse.Namespace(**{**vars(args), "targets": [target]})
    decoder = load_targets(one, checkpoint, config, num_tokens)[target]
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
    backend = _backend(args)
    if backend != "cuda":
        raise QSpecError(
            f"--synthetic-acceptance needs the cuda backend, not {backend!r}: elsewhere measure "
            "real acceptance with a model"
        )
    runs: list[dict[str, Any]] = []
    for target in args.targets:
        checkpoint = checkpoint_of(args)
        decoders = load_targets(
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
