"""Quantising a whole model: layer by layer, resumable, with peak memory of a few layers."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError
from qspec_llm.model.config import ModelConfig, read_config
from qspec_llm.model.decoder import rope_table
from qspec_llm.model.load import EMBEDDING, FINAL_NORM, HEAD, ROPE_FACTORS, expected_shapes
from qspec_llm.quantize.layer import read_floats
from qspec_llm.quantize.magnitudes import input_magnitudes
from qspec_llm.quantize.matrices import Method, input_scales, store_matrices
from qspec_llm.quantize.streams import Streams, advance, measure_head, start
from qspec_llm.quantize.text import CalibrationText
from qspec_llm.quantize.unfinished import Unfinished
from qspec_llm.weights.checkpoint import Checkpoint
from qspec_llm.weights.methods import Moments
from qspec_llm.weights.outliers import reordered
from qspec_llm.weights.planes import GROUPS, Dense, Stored, draft_weight, verify_weight
from qspec_llm.weights.quantize import Recipe, Target, nest
from qspec_llm.weights.rotation import rotated
from qspec_llm.weights.view import Activation

__all__ = ["LayerReport", "Options", "Report", "quantize"]

Progress = Callable[[int, int], None]  # parts done, parts in all

# module -> the tensor of its layer that makes its inputs, and can take their inverse scales
BEFORE = {
    "self_attn.q_proj": "input_layernorm.weight",
    "mlp.gate_proj": "post_attention_layernorm.weight",
    "mlp.down_proj": "mlp.up_proj.weight",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decides the result.

    Attributes:
        target: what the verify view reproduces.
        method: how codes are chosen.
        group: weights that share a scale.
        draft: activations that the draft will see.
        rotate: whether linears take rotated inputs (`weights.rotation`), so that 4-bit activations
            agree; only `int4`, since another target is the original's weights, unrotated.
        outliers: columns of the linears' inputs, the largest, that a4 drafts see in 8 bits
            (`weights.outliers`); None leaves columns where they are. Only `int4`, as `rotate`.
        asymmetric: whether a group has an offset besides its scale (`int4` alone): 5 bits a weight
            instead of 4.5 in groups of 32.
    """

    target: Target
    method: Method
    group: int
    draft: Activation = Activation.A8
    rotate: bool = False
    outliers: int | None = None
    asymmetric: bool = False

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise QSpecError(f"group is {self.group}; it must be one of {GROUPS}")
        if self.target is Target.INT8 and self.method in (Method.AWQ, Method.GPTQ):
            raise QSpecError(
                f"method {self.method.value!r} has nothing to choose for target 'int8', whose "
                "draft codes follow from its 8-bit codes; use --method rtn"
            )
        if self.rotate and self.target is not Target.INT4:
            raise QSpecError(
                f"target {self.target.value!r} cannot be rotated: it is the original's weights, "
                "which a rotation changes; use --target int4"
            )
        if self.outliers is not None and self.target is not Target.INT4:
            raise QSpecError(
                f"target {self.target.value!r} cannot be reordered: it is the original bit for "
                "bit, which sums in another order are not; --outliers goes with --target int4"
            )
        if self.outliers is not None and self.rotate:
            raise QSpecError("--rotate leaves no outliers to keep; take it or --outliers")
        if self.asymmetric and self.target is not Target.INT4:
            raise QSpecError(
                f"target {self.target.value!r} has no offsets; --asymmetric goes with --target int4"
            )
        if self.asymmetric and self.method is Method.AWQ:
            raise QSpecError(
                "method 'awq' scales rows, and offsets with them inexactly; use --method gptq or "
                "mse with --asymmetric"
            )
        if self.rotate and self.method is Method.AWQ:
            raise QSpecError(
                "method 'awq' scales columns, which a rotation mixes and balances itself; use "
                "--method gptq or mse with --rotate"
            )


@dataclass(frozen=True)
class LayerReport:
    """Relative squared error of each linear's output on held-out text, and bytes, of one part."""

    name: str
    errors: dict[str, float]
    stored_bytes: int
    draft_bytes: int


@dataclass(frozen=True)
class Report:
    """What came out.

    `agreement` is the share of held-out answer tokens for which the quantised stream (a nested
    target's draft, an `int4` target itself) picks the exact model's token; None where the text has
    no answers.
    """

    layers: tuple[LayerReport, ...]
    agreement: float | None

    @property
    def stored_bytes(self) -> int:
        """Of the whole model."""
        return sum(layer.stored_bytes for layer in self.layers)

    @property
    def draft_bytes(self) -> int:
        """Of those, what a draft reads."""
        return sum(layer.draft_bytes for layer in self.layers)


def quantize(
    checkpoint: Checkpoint,
    path: Path,
    options: Options,
    text: CalibrationText,
    *,
    write_more: Callable[[Path], None],
    progress: Progress | None = None,
) -> Report:
    """Quantise a model into a new directory.

    An interrupted run leaves `path`.partial; the same call goes on after its last layer.

    Args:
        checkpoint: floating-point weights, or codes that are dequantised.
        path: the directory to create.
        options: target and method.
        text: calibration text.
        write_more: writes the tokenizer into the directory.
        progress: called after each of its num_layers + 2 parts.

    Raises:
        QSpecError: the checkpoint is nested already, lacks a tensor, or `path` exists.
    """
    if checkpoint.kind == "nested":
        raise QSpecError(f"{checkpoint.path} is nested already; quantise the original")
    config = read_config(checkpoint)
    if options.outliers is not None:
        config = replace(config, outliers=options.outliers)  # refused before anything is written
    about = {**asdict(options), "calibration": _digest(text), "model": str(checkpoint.path)}
    output = Unfinished(path, about)
    if options.rotate or options.outliers is not None:
        magnitudes = input_magnitudes(checkpoint, config, text)
        if options.outliers is not None:
            checkpoint = reordered(checkpoint, outliers=options.outliers, magnitudes=magnitudes)
        else:
            checkpoint = rotated(checkpoint, head_dim=config.head_dim, magnitudes=magnitudes)
        config = read_config(checkpoint)
    run = _Run(checkpoint, config, options, text, output)
    for done in run.parts():
        if progress is not None:
            progress(done, config.num_layers + 2)
    report = run.report()
    made = {
        "method": options.method.value,
        "group": options.group,
        "draft": options.draft.value,
        "rotated": options.rotate,
        "outliers": options.outliers or 0,
        "asymmetric": options.asymmetric,
        "calibration_tokens": text.num_fitted,
        "agreement": report.agreement,
    }
    output.finish(options.target, config.to_dict(), made, write_more)
    return report


def _digest(text: CalibrationText) -> str:
    return hashlib.sha256(text.tokens.numpy().tobytes() + bytes(text.num_fitted)).hexdigest()


class _Run:
    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        options: Options,
        text: CalibrationText,
        output: Unfinished,
    ) -> None:
        self._checkpoint, self._config, self._options = checkpoint, config, options
        self._text, self._output = text, output
        self._recipe = Recipe(options.target, options.group)
        shapes = expected_shapes(config)
        self._names = [*shapes]
        if ROPE_FACTORS in checkpoint.names():
            self._names.append(ROPE_FACTORS)
        if missing := sorted({*self._names} - {*checkpoint.names()}):
            raise QSpecError(
                f"{checkpoint.path} lacks {len(missing)} tensors of its architecture, "
                f"the first {missing[0]!r}"
            )

    def parts(self) -> Iterator[int]:
        """Quantise and write: the layers in order, then the vocabulary and what is left."""
        streams = self._streams()
        yield self._output.num_parts
        for index in range(self._output.num_parts, self._config.num_layers):
            stored = self._layer(streams, index)
            self._write(f"layer {index}", stored, streams)
            yield index + 1
        if self._output.num_parts == self._config.num_layers:
            stored, agreement = self._rest(streams)
            self._write("vocabulary", stored, streams, agreement)
        yield self._config.num_layers + 2

    def report(self) -> Report:
        notes = self._output.notes
        return Report(tuple(LayerReport(**part) for part in notes["parts"]), notes["agreement"])

    def _write(
        self,
        name: str,
        stored: dict[str, Stored],
        streams: Streams,
        agreement: float | None = None,
    ) -> None:
        part = LayerReport(
            name,
            dict(streams.errors),
            sum(tensor.nbytes for tensor in stored.values()),
            sum(tensor.draft_nbytes for tensor in stored.values()),
        )
        streams.errors.clear()
        parts = [*self._output.notes.get("parts", []), asdict(part)]
        state = {"exact": streams.exact.bfloat16(), "other": streams.other.bfloat16()}
        self._output.add(stored, {"parts": parts, "agreement": agreement}, state)

    def _streams(self) -> Streams:
        """Both streams where the next layer begins."""
        target, config = self._options.target, self._config
        is_target = target is Target.INT4
        factors = self._floats(ROPE_FACTORS) if ROPE_FACTORS in self._names else None
        longest = int(self._text.positions.max()) + 1
        streams = start(
            self._text,
            self._floats(EMBEDDING)[self._text.tokens],
            rope_table(config, longest, factors),
            Activation.A16 if is_target else self._options.draft,
            reads_exact_kv=not is_target,
        )
        for name, state in self._output.state().items():
            setattr(streams, name, state.float())
        return streams

    def _layer(self, streams: Streams, index: int) -> dict[str, Stored]:
        prefix = f"model.layers.{index}."
        weights = {name: self._floats(name) for name in self._names if name.startswith(prefix)}
        stored: dict[str, Stored] = {
            name: Dense(self._vector(name), "a vector")
            for name, weight in weights.items()
            if weight.ndim == 1
        }
        advance(streams, self._config, weights, prefix, self._chooser(weights, stored))
        return stored

    def _chooser(
        self, weights: dict[str, Tensor], stored: dict[str, Stored]
    ) -> Callable[[Sequence[str], Tensor, Moments], Tensor]:
        method, recipe = self._options.method, self._recipe

        def choose(names: Sequence[str], weight: Tensor, moments: Moments) -> Tensor:
            sizes = [len(weights[f"{name}.weight"]) for name in names]
            before = _before(names[0])
            scale = None
            if before is not None:
                must_be_exact = before.endswith("up_proj.weight")
                scale = input_scales(weight, moments, method, recipe, is_power_of_two=must_be_exact)
            if before is None or scale is None:
                parts = store_matrices(
                    weight,
                    sizes,
                    moments,
                    method,
                    recipe,
                    is_asymmetric=self._options.asymmetric,
                )
                seen = [self._seen(part) for part in parts]
            else:
                wide, inputs = weight * scale, moments.divided(scale)
                parts = store_matrices(wide, sizes, inputs, method, recipe)
                seen = [self._seen(part) / scale for part in parts]
                stored[before] = _divided(stored[before], scale)
            stored.update({f"{name}.weight": p for name, p in zip(names, parts, strict=True)})
            return torch.cat(seen)

        return choose

    def _seen(self, stored: Stored) -> Tensor:
        """What the quantised stream multiplies with."""
        if isinstance(stored, Dense):
            return stored.weight.float()
        is_target = self._options.target is Target.INT4
        return verify_weight(stored) if is_target else draft_weight(stored)

    def _rest(self, streams: Streams) -> tuple[dict[str, Stored], float | None]:
        """The vocabulary, the last norm, and RoPE factors where there are some."""
        name = EMBEDDING if self._config.tied_head else HEAD
        weights = {name: self._floats(name)}
        stored: dict[str, Stored] = {}
        if self._options.target is Target.BF16:
            choose = self._chooser(weights, stored)
        else:

            def choose(_names: Sequence[str], weight: Tensor, _moments: Moments) -> Tensor:
                stored[name] = nest(weight, self._recipe, is_vocabulary=True)
                return self._seen(stored[name])

        final = (self._floats(FINAL_NORM), weights[name])
        module = name.removesuffix(".weight")
        agreement = measure_head(streams, final, self._config, module, choose)
        if not self._config.tied_head:
            # looked up, never multiplied: no code of it is ever drafted with
            stored[EMBEDDING] = nest(self._floats(EMBEDDING), self._recipe, is_vocabulary=True)
        for vector in (FINAL_NORM, ROPE_FACTORS):
            if vector in self._names:
                stored[vector] = Dense(self._vector(vector), "a vector")
        return stored, agreement

    def _floats(self, name: str) -> Tensor:
        return read_floats(self._checkpoint, name)

    def _vector(self, name: str) -> Tensor:
        value = self._checkpoint.read(name, Target.BF16)
        assert isinstance(value, Tensor)
        return value


def _before(module: str) -> str | None:
    """The tensor into which the inverse of a module's column scales can go.

    The heads of v are shared by several of o_proj's, so that o_proj is left alone.
    """
    for name, before in BEFORE.items():
        if module.endswith(name):
            return module.removesuffix(name) + before
    return None


def _divided(stored: Stored, scale: Tensor) -> Stored:
    """A vector, or the rows of a matrix (by powers of two: exactly), divided by `scale`."""
    if isinstance(stored, Dense):
        weight = stored.weight.float()
        return Dense(weight / (scale if weight.ndim == 1 else scale[:, None]), stored.reason)
    return replace(stored, scale=(stored.scale.float() / scale[:, None]).to(stored.scale.dtype))
