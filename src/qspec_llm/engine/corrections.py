"""How much longer steps take than was measured at start: learnt from cycles, one factor a shape.

One factor for all would hide what matters: where verifying drafts takes longer than the table says
and plain steps do not, a common factor lets drafts look as cheap as ever. So each size of step has
its own, and what was not seen lately takes that of its kind, or of all steps.

A factor is the median of the last steps: single ones are held up by anything, and the first after
a prompt are always slow.
"""

import statistics
from collections import deque
from dataclasses import dataclass, field

__all__ = ["Corrections", "Shape", "draft_shape", "verify_shape"]

Shape = tuple[str, ...]  # from the general to the special: ("verify", "drafted", "3 4")

KEPT = 9  # steps of a shape: the odd one does not count, and the first ones are soon forgotten
DOUBT = 2  # steps of a shape that the factor of its kind counts for
STALE_AFTER = 1000  # cycles: the machine may have changed


@dataclass
class _Seen:
    """Steps of one shape or kind."""

    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    count: int = 0
    last: int = 0  # number of the last cycle


class Corrections:
    """Factors by shape; where little is known, or only from long ago, near that of its kind."""

    def __init__(self) -> None:
        self._seen: dict[Shape, _Seen] = {}
        self._factors: dict[Shape, float] = {}  # worked out since the last step
        self._now = 0

    def tick(self) -> None:
        """A cycle has gone by."""
        self._now += 1
        self._factors.clear()

    def of(self, shape: Shape) -> float:
        """Seconds that a step of this shape takes, in those of the table."""
        if shape not in self._factors:
            self._factors[shape] = self._factor(shape)
        return self._factors[shape]

    def _factor(self, shape: Shape) -> float:
        seen = self._fresh(shape)
        if not shape:
            return statistics.median(seen.ratios) if seen else 1.0
        kind = self.of(shape[:-1])
        return statistics.median([*seen.ratios, *[kind] * DOUBT]) if seen else kind

    def count(self, shape: Shape) -> int:
        """Steps of a shape or kind that were noted, 0 if that is long ago."""
        seen = self._fresh(shape)
        return 0 if seen is None else seen.count

    def _fresh(self, shape: Shape) -> _Seen | None:
        seen = self._seen.get(shape)
        return seen if seen is not None and self._now - seen.last <= STALE_AFTER else None

    def learn(self, shape: Shape, ratio: float) -> None:
        """Note a step, for its shape and every kind it is of."""
        self._factors.clear()
        for length in range(len(shape) + 1):
            seen = self._fresh(shape[:length])
            if seen is None:
                seen = self._seen[shape[:length]] = _Seen()
            seen.ratios.append(ratio)
            seen.count += 1
            seen.last = self._now


def draft_shape(num_requests: int) -> Shape:
    """A draft step's; sizes count by powers of two."""
    return ("draft", str(num_requests.bit_length()))


def verify_shape(num_requests: int, num_rows: int) -> Shape:
    """A verify step's: plain ones and those with drafts are two kinds."""
    num_drafted = num_rows - num_requests
    kind = "drafted" if num_drafted else "plain"
    return ("verify", kind, f"{num_requests.bit_length()} {num_drafted.bit_length()}")
