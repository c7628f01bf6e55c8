"""How much longer steps take than was measured at start: learnt from cycles, one factor a shape.

One factor for all would hide what matters: where verifying drafts takes longer than the table says
and plain steps do not, a common factor lets drafts look as cheap as ever. So each size of step has
its own, and what was not seen lately takes that of its kind.
"""

from dataclasses import dataclass

__all__ = ["Corrections", "Shape", "draft_shape", "verify_shape"]

Shape = tuple[str, ...]  # from the general to the special: ("verify", "drafted", "3 4")

LEAST_WEIGHT = 0.05  # of one cycle
STALE_AFTER = 1000  # cycles: the machine may have changed


@dataclass
class _Factor:
    value: float
    count: int
    seen: int  # number of the last cycle


class Corrections:
    """Factors by shape; one that is unknown, or was not seen for long, is that of its kind."""

    def __init__(self) -> None:
        self._factors: dict[Shape, _Factor] = {}
        self._now = 0

    def tick(self) -> None:
        """A cycle has gone by."""
        self._now += 1

    def of(self, shape: Shape) -> float:
        """Seconds that a step of this shape takes, in those of the table."""
        kinds = (self._fresh(shape[:length]) for length in range(len(shape), 0, -1))
        return next((factor.value for factor in kinds if factor is not None), 1.0)

    def count(self, shape: Shape) -> int:
        """Steps of a shape or kind that were noted, 0 if that is long ago."""
        factor = self._fresh(shape)
        return 0 if factor is None else factor.count

    def _fresh(self, shape: Shape) -> _Factor | None:
        factor = self._factors.get(shape)
        is_fresh = factor is not None and self._now - factor.seen <= STALE_AFTER
        return factor if is_fresh else None

    def learn(self, shape: Shape, ratio: float) -> None:
        """Note a step, for its shape and every kind it is of."""
        before = self.of(shape)
        for length in range(1, len(shape) + 1):
            self._move(shape[:length], ratio, before)

    def _move(self, shape: Shape, ratio: float, before: float) -> None:
        factor = self._fresh(shape)
        if factor is None:
            factor = self._factors[shape] = _Factor(before, 0, self._now)
        # a step that was held up counts as one that took twice as long, not 50 times
        ratio = min(max(ratio, factor.value / 2), factor.value * 2)
        factor.count += 1
        factor.value += max(LEAST_WEIGHT, 1 / factor.count) * (ratio - factor.value)
        factor.seen = self._now


def draft_shape(num_requests: int) -> Shape:
    """A draft step's; sizes count by powers of two."""
    return ("draft", str(num_requests.bit_length()))


def verify_shape(num_requests: int, num_rows: int) -> Shape:
    """A verify step's: plain ones and those with drafts are two kinds."""
    num_drafted = num_rows - num_requests
    kind = "drafted" if num_drafted else "plain"
    return ("verify", kind, f"{num_requests.bit_length()} {num_drafted.bit_length()}")
