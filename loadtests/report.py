"""The last line of every bench: one JSON object for machines."""

import json
import platform
import subprocess
from collections.abc import Mapping
from os import cpu_count
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Bar(NamedTuple):
    """A value that must not fall short of its bar.  `better`: "higher" or "lower"."""

    value: float
    bar: float
    better: str = "higher"

    @property
    def ok(self) -> bool:
        return self.value >= self.bar if self.better == "higher" else self.value <= self.bar


def finish(
    bench: str, results: Mapping[str, float], bars: Mapping[str, Bar], *, verdicts: bool = True
) -> int:
    """Print verdicts and the JSON line; return the exit code: 1 when a bar is missed."""
    for name, bar in bars.items() if verdicts else ():
        verdict = "ok  " if bar.ok else "MISS"
        print(f"{verdict} {name}: {bar.value:.3g} (bar {bar.bar:g}, {bar.better} is better)")
    line = {
        "bench": bench,
        "commit": commit(),
        "machine": f"{cpu_count()} x {processor()}",
        "results": {name: round(value, 4) for name, value in results.items()},
        "bars": {
            name: {**bar._asdict(), "value": round(bar.value, 4), "ok": bar.ok} for name, bar in bars.items()
        },
    }
    print(json.dumps(line), flush=True)
    return 0 if all(bar.ok for bar in bars.values()) else 1


def commit() -> str:
    """Short hash of HEAD, "+" when files differ from it; "unknown" outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return ran.stdout.strip() or "unknown"


def processor() -> str:
    """The CPU's name as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
