"""Resident memory of every part of a running stack, sampled from /proc."""

import statistics
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_PAGE_MIB = 4096 / (1 << 20)


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    group: int
    mib: float  # resident
    command: str


def processes() -> list[Process]:
    """Everything this user may see; what ends meanwhile is left out."""
    found = []
    for folder in _PROC.glob("[0-9]*"):
        try:
            # the name in parentheses may hold anything; fields are counted from behind it
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        parent, group, resident = int(fields[1]), int(fields[2]), int(fields[21])
        found.append(Process(int(folder.name), parent, group, resident * _PAGE_MIB, command))
    return found


def of_group(group: int) -> float:
    """Resident MiB of a process group."""
    return sum(process.mib for process in processes() if process.group == group)


def part_of(command: str, port: int) -> str:
    """Which part of a stack whose gateway listens on `port` this is; "" for none."""
    if "valkey-server" in command:
        return "valkey"
    if "gateway.launch.serve" in command:
        return "gateway"
    for n in range(1, 10):
        if "api_server" in command and f"--port {port + n} " in command:
            return f"w{n}"
    return ""


class Memory:
    """Samples by part.  A part that was restarted begins anew: growth() looks at what stayed."""

    def __init__(self, launcher: int, port: int) -> None:
        self._launcher, self._port = launcher, port
        self._seen: dict[tuple[str, int], list[tuple[float, float]]] = {}  # (part, pid) → (when, MiB)

    def parts(self) -> dict[str, int]:
        """Name → pid of the parts that run now; each leads its own process group."""
        found = ((part_of(p.command, self._port), p) for p in processes() if p.parent == self._launcher)
        return {name: process.pid for name, process in found if name}

    def sample(self, when: float) -> None:
        """`when`: the part of the run that is over, 0 to 1."""
        everything = processes()
        mine = ((part_of(p.command, self._port), p) for p in everything if p.parent == self._launcher)
        for name, leader in mine:
            if name:
                mib = sum(p.mib for p in everything if p.group == leader.pid)
                self._seen.setdefault((name, leader.pid), []).append((when, mib))

    def growth(self) -> dict[str, float]:
        """The last quarter's median against the third's, less 1, for parts that were there for both.  Valkey
        is left out: what it holds comes and goes with its faults, and maxmemory bounds it."""
        grown = {}
        for (name, _), samples in self._seen.items():
            third = [mib for when, mib in samples if 0.5 <= when < 0.75]
            last = [mib for when, mib in samples if when >= 0.75]
            if name != "valkey" and third and last and samples[0][0] <= 0.55:
                grown[name] = statistics.median(last) / statistics.median(third) - 1
        return grown

    def latest(self) -> dict[str, float]:
        """MiB of each part at its last sample."""
        return {name: samples[-1][1] for (name, _), samples in self._seen.items()}

    def line(self) -> str:
        return " ".join(f"{name} {mib:.0f}" for name, mib in sorted(self.latest().items())) + " MiB"
