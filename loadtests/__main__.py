"""List the benches, or run them.   python -m loadtests [--quick] [NAME …]

Without arguments: one line each.  With --quick or names: those (or all that need no running stack), one
after another, each ending with its line of JSON.  The exit code is the highest of theirs.
"""

import argparse
import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from loadtests.report import ROOT

FOLDER = Path(__file__).parent


class Bench(NamedTuple):
    name: str
    title: str
    path: Path

    @property
    def module(self) -> str:
        return ".".join(self.path.relative_to(ROOT).with_suffix("").parts)


def benches() -> Iterator[Bench]:
    """From the docstrings, without importing: some start engines, and the locustfile patches sockets."""
    micro, whole = sorted((FOLDER / "micro").glob("bench_*.py")), sorted(FOLDER.glob("bench_*.py"))
    replays, index = sorted(FOLDER.glob("replay_*.py")), sorted(FOLDER.glob("*index*.py"))
    storms = [FOLDER / "abort_storm.py", FOLDER / "overload.py"]
    for path in (*micro, *replays, *index, *storms, *whole):
        yield Bench(path.stem.removeprefix("bench_"), title_of(path), path)


def title_of(path: Path) -> str:
    """The first sentence of its docstring; the command follows after three spaces."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return docstring.partition("\n")[0].partition("   ")[0]


def listing() -> str:
    lines = [f"{bench.name:<10} {bench.title}" for bench in benches()]
    lines.append(f"{'load':<10} {title_of(FOLDER / 'locustfile.py')} (make load)")
    for name in ("lmcache", "routers"):
        title = title_of(FOLDER / "peers" / f"{name}.py")
        lines.append(f"{name:<10} {title} (python -m loadtests.peers.{name})")
    return "\n".join(lines)


def run(names: list[str], quick: bool) -> int:
    """Raises SystemExit with a sentence for a name that is no bench."""
    known = {bench.name: bench for bench in benches()}
    if unknown := set(names) - set(known):
        raise SystemExit(f"no bench {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    worst = 0
    for name in names or known:
        print(f"\n== {name}: {known[name].title}", flush=True)
        command = [sys.executable, "-m", known[name].module, *(["--quick"] if quick else [])]
        worst = max(worst, abs(subprocess.run(command, cwd=ROOT).returncode))
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests", description="List the benches, or run them.")
    parser.add_argument("names", nargs="*", help="which; all when left out, with --quick")
    parser.add_argument("--quick", action="store_true", help="run, but only for a first look")
    args = parser.parse_args()
    if args.names or args.quick:
        return run(args.names, args.quick)
    print(listing())
    return 0


if __name__ == "__main__":
    sys.exit(main())
