"""Figures of an evaluation as PNG and SVG files; matplotlib is imported only here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qspec_llm.errors import QSpecError

__all__ = ["need_pyplot", "plot_acceptance", "plot_plan", "plot_views"]


def need_pyplot() -> Any:
    """matplotlib's pyplot, drawing to files.

    Raises:
        QSpecError: it is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise QSpecError(
            "--plot needs matplotlib; install it with `pip install matplotlib`"
        ) from None
    return pyplot


def plot_acceptance(by_position: Sequence[float], directory: Path, title: str) -> list[Path]:
    """Draw the share of tested drafts that stood at positions 1, 2, ... and of all that far."""
    pyplot = need_pyplot()
    positions = range(1, len(by_position) + 1)
    reached, product = [], 1.0
    for share in by_position:
        product *= share
        reached.append(product)
    figure, axis = pyplot.subplots(figsize=(6, 4))
    axis.plot(positions, by_position, marker="o", label="of the drafts tested here")
    axis.plot(positions, reached, marker="o", linestyle="--", label="of all cycles")
    axis.set(xlabel="position in the draft", ylabel="share accepted", title=title, ylim=(0, 1))
    axis.set_xticks(list(positions))
    axis.legend()
    return _save(pyplot, figure, axis, directory, "acceptance")


def plot_views(
    by_kind: Mapping[str, Mapping[str, Mapping[str, float]]], directory: Path, title: str
) -> list[Path]:
    """Draw greedy agreement with the verify view: a group of bars a kind, a bar a draft view."""
    pyplot = need_pyplot()
    drafts = [name for name in by_kind["all"] if name not in ("verify", "reference")]
    figure, axis = pyplot.subplots(figsize=(7, 4))
    width = 0.8 / max(len(drafts), 1)
    for index, draft in enumerate(drafts):
        places = [at + index * width for at in range(len(by_kind))]
        axis.bar(places, [by_kind[k][draft]["agreement"] for k in by_kind], width, label=draft)
    axis.set(ylabel="greedy agreement", title=title, ylim=(0, 1))
    middle = (len(drafts) - 1) / 2 * width
    axis.set_xticks([at + middle for at in range(len(by_kind))], list(by_kind))
    axis.legend()
    return _save(pyplot, figure, axis, directory, "agreement")


def plot_plan(
    candidates: Mapping[str, Sequence[tuple[int, float, float]]],
    chosen: tuple[int, float],
    divergences: Mapping[str, Sequence[float]],
    directory: Path,
    title: str,
) -> list[Path]:
    """Draw what plans promise by the bytes they read, and which layers their drafts diverge in.

    Args:
        candidates: by activations, (bytes more than at 4 bits, agreement, speed-up) of every plan.
        chosen: bytes and speed-up of the plan that was taken.
        divergences: by kind of linear, nats that each layer's adds to a draft at 4 bits.
        directory: where the files go.
        title: above both.
    """
    pyplot = need_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4))
    if any(more for plans in candidates.values() for more, _, _ in plans):
        _draw_frontier(left, candidates, chosen)
    else:
        _draw_choices(left, candidates)
    left.set(title=title, ylim=(0, None))
    left.legend()
    left.grid(alpha=0.3)
    bottom = [0.0] * max((len(values) for values in divergences.values()), default=0)
    for kind, values in divergences.items():
        right.bar(range(len(values)), values, bottom=bottom, label=kind)
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    right.set(xlabel="layer", ylabel="divergence at 4 bits, nats")
    right.legend()
    return _save(pyplot, figure, right, directory, "plan")


def _draw_frontier(
    axis: Any,
    candidates: Mapping[str, Sequence[tuple[int, float, float]]],
    chosen: tuple[int, float],
) -> None:
    """Speed-up and agreement by the bytes that a draft reads."""
    for name, plans in candidates.items():
        megabytes = [more / 1e6 for more, _, _ in plans]
        axis.plot(megabytes, [speedup for _, _, speedup in plans], label=f"{name}: speed-up")
        axis.plot(
            megabytes, [agreement for _, agreement, _ in plans], "--", label=f"{name}: agreement"
        )
    axis.plot(chosen[0] / 1e6, chosen[1], "k*", markersize=12, label="chosen")
    axis.set(xlabel="MB that a draft reads more than at 4 bits")


def _draw_choices(axis: Any, candidates: Mapping[str, Sequence[tuple[int, float, float]]]) -> None:
    """The same where activations are all there is to choose."""
    places = range(len(candidates))
    for offset, index, label in ((-0.2, 2, "expected speed-up"), (0.2, 1, "agreement")):
        values = [plans[0][index] for plans in candidates.values()]
        bars = axis.bar([place + offset for place in places], values, 0.38, label=label)
        axis.bar_label(bars, fmt="%.2f")
    axis.set_xticks(list(places), list(candidates))
    axis.set(xlabel="activations of the draft")


def _save(pyplot: Any, figure: Any, axis: Any, directory: Path, name: str) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    paths = [directory / f"{name}.png", directory / f"{name}.svg"]
    for path in paths:
        figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return paths
