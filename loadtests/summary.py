"""What a load run came to: one row a scenario, one JSON line for all."""

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.table import Table

from loadtests.report import Bar
from loadtests.sse import Answer

_KEEP = 100_000  # newest times kept for percentiles; counts go on


def _times() -> deque[float]:
    return deque(maxlen=_KEEP)


@dataclass
class Scenario:
    """Seconds, and tokens as the server counts them."""

    ttft: deque[float] = field(default_factory=_times)
    gaps: deque[float] = field(default_factory=_times)
    seconds: deque[float] = field(default_factory=_times)
    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def answer(self, answer: Answer) -> None:
        self.answered += 1
        self.ttft.append(answer.ttft)
        self.gaps.extend(answer.gaps)
        self.seconds.append(answer.seconds)
        self.prompt_tokens += answer.prompt_tokens
        self.cached_tokens += answer.cached_tokens
        self.completion_tokens += answer.completion_tokens

    @property
    def hit_rate(self) -> float:
        """Prompt tokens that some cache held ÷ prompt tokens."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass
class Run:
    """One run of a load test.  `began` and `ended` are seconds of one clock."""

    began: float
    ended: float = 0.0
    scenarios: dict[str, Scenario] = field(default_factory=dict)

    def of(self, name: str) -> Scenario:
        return self.scenarios.setdefault(name, Scenario())

    @property
    def total(self) -> Scenario:
        total = Scenario()
        for one in self.scenarios.values():
            for times in ("ttft", "gaps", "seconds"):
                getattr(total, times).extend(getattr(one, times))
            for tally in ("answered", "failed", "prompt_tokens", "cached_tokens", "completion_tokens"):
                setattr(total, tally, getattr(total, tally) + getattr(one, tally))
        return total

    @property
    def tokens_per_second(self) -> float:
        """Tokens written by the model, all users together."""
        elapsed = self.ended - self.began
        return self.total.completion_tokens / elapsed if elapsed > 0 else 0.0

    def rows(self) -> list[tuple[str, Scenario]]:
        return [*sorted(self.scenarios.items()), ("all", self.total)]

    def table(self) -> Table:
        head = f"{self.ended - self.began:.0f} s, {self.tokens_per_second:.1f} tokens/s written (times in ms)"
        table = Table(title=head, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for name in ("answers", "failed", "TTFT p50/95", "ITL p50/95", "E2E p50", "prompt", "cached"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, one in self.rows():
            table.add_row(
                name, str(one.answered), str(one.failed),
                f"{_ms(one.ttft, 50)}/{_ms(one.ttft, 95)}", f"{_ms(one.gaps, 50)}/{_ms(one.gaps, 95)}",
                _ms(one.seconds, 50), f"{one.prompt_tokens:,}", f"{one.hit_rate:.0%}",
                end_section=name == max(self.scenarios, default=""),
            )  # fmt: skip
        return table

    def results(self) -> dict[str, float]:
        found = {"tokens/s": self.tokens_per_second, "seconds": self.ended - self.began}
        for name, one in self.rows():
            found |= {
                f"{name} answers": one.answered,
                f"{name} failed": one.failed,
                f"{name} ttft p50 s": percentile(one.ttft, 50),
                f"{name} ttft p95 s": percentile(one.ttft, 95),
                f"{name} itl p50 s": percentile(one.gaps, 50),
                f"{name} e2e p50 s": percentile(one.seconds, 50),
                f"{name} prompt tokens": one.prompt_tokens,
                f"{name} cached tokens": one.cached_tokens,
            }
        return found

    def bars(self) -> dict[str, Bar]:
        """No request may fail, and a run without answers proves nothing."""
        total = self.total
        return {"failed requests": Bar(total.failed, 0, "lower"), "answers": Bar(total.answered, 1)}


def percentile(values: Iterable[float], percent: int) -> float:
    """0 for none."""
    ordered: Sequence[float] = list(values)
    if len(ordered) < 2:
        return ordered[0] if ordered else 0.0
    return statistics.quantiles(ordered, n=100, method="inclusive")[percent - 1]


def _ms(values: Iterable[float], percent: int) -> str:
    return f"{1000 * percentile(values, percent):,.0f}"
