"""The models that `qspec bench` measures: real ones, random ones of a shape, enlarged ones."""

import argparse
from typing import Any

from qspec_llm.bench import enlarge, shapes
from qspec_llm.cli.common import progress_bar
from qspec_llm.config import EngineConfig
from qspec_llm.errors import QSpecError
from qspec_llm.hub import resolve_model
from qspec_llm.kernels import get_backend
from qspec_llm.model.config import ModelConfig, read_config
from qspec_llm.model.decoder import Decoder
from qspec_llm.model.load import load_decoder
from qspec_llm.weights.checkpoint import Checkpoint, open_checkpoint
from qspec_llm.weights.quantize import Target

__all__ = ["checkpoint_of", "engine_config", "load_targets", "model_name"]


def engine_config(args: argparse.Namespace, target: Target) -> EngineConfig:
    """How the options say that a target runs."""
    return EngineConfig(
        target=target,
        group=args.group,
        threads=args.threads,
        isa=args.isa,
        backend=args.backend,
    )


def checkpoint_of(args: argparse.Namespace) -> Checkpoint:
    """The model to measure; weights that are no file's are made where the backend computes."""
    if not args.shape:
        if args.enlarge:
            raise QSpecError("--enlarge needs --shape, the sizes to enlarge to")
        return open_checkpoint(resolve_model(args.model))
    args.backend = engine_config(args, Target.BF16).backend  # "auto" is resolved
    device = get_backend(args.backend).device
    if not args.enlarge:
        return shapes.RandomCheckpoint(args.shape, device, args.group)
    small = open_checkpoint(resolve_model(args.enlarge))
    shape = shapes.SHAPES[args.shape]
    return enlarge.EnlargedCheckpoint(small, read_config(small), shape, device, args.group)


def model_name(args: argparse.Namespace) -> str:
    """The model as a report names it."""
    if not args.enlarge:
        return str(args.shape or args.model)
    return f"{args.enlarge} zero-padded to the shape {args.shape} (it computes what it computed)"


def load_targets(
    args: argparse.Namespace, checkpoint: Checkpoint, config: ModelConfig, num_positions: int
) -> dict[str, Decoder]:
    """A decoder for each of the options' targets, with angles for as many positions."""
    decoders = {}
    for name in args.targets:
        target = Target(name)
        engine = engine_config(args, target)
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
