"""A peer's own virtual environment: its pinned packages, and the project's vLLM and torch on loan.

A second vLLM with torch would be three gigabytes for nothing, and another vLLM than ours would be another
comparison.  So a .pth line appends the project's site-packages behind the peer's: what the peer brings wins,
what it does not bring is ours.
"""

import json
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from gateway.launch.board import Board
from loadtests.engine import BenchFailed

_LOAN = "zz-project.pth"  # behind every .pth of the peer's own
_PIP_SECONDS = 900.0
_LOOK_SECONDS = 60.0
_LOOK = """
import importlib.util, json, sys
found = {name: importlib.util.find_spec(name) for name in sys.argv[1:]}
print(json.dumps({name: spec.origin if spec else None for name, spec in found.items()}))
"""


def ensure(
    folder: Path, packages: Sequence[str], own: Sequence[str], lent: Sequence[str], board: Board
) -> Path:
    """The peer's python; the environment is made when it is missing or holds other packages.

    `own` are modules that must be the peer's, `lent` those that must be the project's.  Raises BenchFailed.
    """
    python, stamp = folder / "bin" / "python", folder / "packages.txt"
    wanted = "\n".join(packages) + "\n"
    if not stamp.exists() or stamp.read_text() != wanted:
        board.begin("peer", f"installing {packages[0]}")
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
        _run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", *packages])
        stamp.write_text(wanted)
        board.done("peer", packages[0])
    ours = Path(sysconfig.get_path("purelib")).resolve()
    _site_packages(folder).joinpath(_LOAN).write_text(f"{ours}\n")
    if wrong := strangers(origins(python, (*own, *lent)), folder, ours, own, lent):
        raise BenchFailed(f"{folder}: {wrong}; delete the folder and try again")
    return python


def strangers(
    found: dict[str, str | None], folder: Path, ours: Path, own: Sequence[str], lent: Sequence[str]
) -> str:
    """Which module does not come from where it must; "" when all do."""
    home = {**dict.fromkeys(own, folder.resolve()), **dict.fromkeys(lent, ours)}
    wrong = [name for name, root in home.items() if not within(found.get(name), root)]
    return ", ".join(f"{name} comes from {found.get(name) or 'nowhere'}" for name in wrong)


def within(path: str | None, root: Path) -> bool:
    return path is not None and Path(path).resolve().is_relative_to(root)


def origins(python: Path, modules: Sequence[str]) -> dict[str, str | None]:
    """Where that interpreter would import each module from.  Parents are imported, the modules are not."""
    return dict(json.loads(_run([str(python), "-c", _LOOK, *modules], _LOOK_SECONDS)))


def _site_packages(folder: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))


def _run(command: Sequence[str], seconds: float = _PIP_SECONDS) -> str:
    """Its standard output.  Raises BenchFailed with the last line it complained with."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise BenchFailed(f"{command[0]} did not end within {seconds:.0f} s") from None
    if ran.returncode:
        said = (ran.stderr or ran.stdout).strip().splitlines()[-1:] or ["no word"]
        raise BenchFailed(f"{' '.join(command[:4])} … failed: {said[0]}")
    return ran.stdout
