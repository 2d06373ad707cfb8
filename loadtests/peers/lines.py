"""One line of a side-by-side comparison: the same thing measured on both sides, turn by turn."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.table import Table

from loadtests.report import Bar

SECONDS = "s"  # the only unit of which less is better


@dataclass(frozen=True)
class Line:
    """`lmcache[i]` and `cairn[i]` were measured one right after the other.  `plain`: vLLM alone, if asked.

    `worst` compares the slowest of each side instead of the medians: after a fault, the slowest is the news.
    """

    name: str
    unit: str
    lmcache: list[float]
    cairn: list[float]
    plain: list[float] = field(default_factory=list)
    note: str = ""
    worst: bool = False
    unanswered: int = 0  # of Cairn's requests

    def __str__(self) -> str:
        theirs, ours = (" ".join(f"{value:.3g}" for value in side) for side in (self.lmcache, self.cairn))
        return f"{self.name}: {self.ratio:.2f}×; LMCache {theirs}; Cairn {ours} {self.unit}"

    @property
    def ratios(self) -> list[float]:
        """How many times better Cairn was, turn by turn; a machine that slows down slows both sides."""
        pairs = list(zip(self.lmcache, self.cairn, strict=False))
        return [theirs / ours if self.unit == SECONDS else ours / theirs for theirs, ours in pairs]

    @property
    def ratio(self) -> float:
        if self.worst:
            return max(self.lmcache) / max(self.cairn)
        return statistics.median(self.ratios)

    @property
    def best(self) -> float:
        """The same of each side's best turn: what else runs on a machine can only make a turn worse."""
        if self.unit == SECONDS:
            return min(self.lmcache) / min(self.cairn)
        return max(self.cairn) / max(self.lmcache)

    def results(self) -> Iterator[tuple[str, float]]:
        for side, values in (("plain vLLM", self.plain), ("LMCache", self.lmcache), ("Cairn", self.cairn)):
            if values:
                yield f"{self.name}, {side} {self.unit}", statistics.median(values)
                yield f"{self.name}, {side} min {self.unit}", min(values)
                yield f"{self.name}, {side} max {self.unit}", max(values)
        if not self.worst:
            yield f"{self.name}, ratio min", min(self.ratios)
            yield f"{self.name}, ratio max", max(self.ratios)
            yield f"{self.name}, ratio of the best", self.best


def rotated(sides: Sequence[str], turn: int) -> list[str]:
    """Everybody goes first in turn."""
    at = turn % len(sides)
    return [*sides[at:], *sides[:at]]


def table(lines: Sequence[Line], title: str) -> Table:
    """Medians, with the smallest and the largest below; under the ratio also that of the best turns."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("", max_width=30)
    for name in ("plain vLLM", "LMCache", "Cairn", "times better"):
        made.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        better = f"{line.ratio:.2f}×"
        if not line.worst:
            better += f"\n{min(line.ratios):.2f}–{max(line.ratios):.2f}\nbest {line.best:.2f}×"
        sides = (_spread(values) for values in (line.plain, line.lmcache, line.cairn))
        made.add_row(f"{line.name}, {line.unit}", *sides, better)
    return made


def notes(lines: Sequence[Line]) -> str:
    return "\n".join(f"{line.name}: {line.note}" for line in lines if line.note)


def bars(lines: Sequence[Line]) -> dict[str, Bar]:
    """Ours must be better on every line, and answer whatever happens."""
    found = {f"{line.name}: times better than LMCache": Bar(line.ratio, 1.0) for line in lines}
    faults = [line for line in lines if line.worst]
    return found | {f"{line.name}: Cairn's unanswered": Bar(line.unanswered, 0, "lower") for line in faults}


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.4g}\n{min(values):.3g}–{max(values):.3g}"
