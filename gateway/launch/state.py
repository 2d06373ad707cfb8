"""The note a running stack leaves, so that `cairn status` and `cairn doctor` find it.

One stack per home directory: the note's lock is held for as long as the stack runs.  The note holds the
Redis password and is readable by its owner only.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gateway.launch.errors import LaunchError


@dataclass(frozen=True)
class Stack:
    """What is running, as other processes of the same user may know it."""

    pid: int
    url: str
    redis_url: str
    disk: str = ""
    parts: dict[str, int] = field(default_factory=dict)  # name → pid


def read(root: Path) -> Stack | None:
    """None when no stack runs from this home."""
    try:
        note = Stack(**json.loads((root / "run" / "stack.json").read_text()))
        os.kill(note.pid, 0)
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or its pid is another's
        return None
    except (ValueError, TypeError):  # another version's note
        return None
    return note


def write(root: Path, stack: Stack) -> None:
    """Replaced in one step: a reader sees the old note or the new one."""
    scratch = root / "run" / ".stack.json"
    with os.fdopen(os.open(scratch, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
        json.dump(asdict(stack), file, indent=1)
    os.rename(scratch, root / "run" / "stack.json")


@contextmanager
def owned(root: Path) -> Iterator[None]:
    """The right to run a stack from this home.  Raises LaunchError when another one does."""
    run = root / "run"
    run.mkdir(parents=True, exist_ok=True, mode=0o700)
    run.chmod(0o700)
    with open(run / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = read(root)
            who = f" (process {other.pid}, {other.url})" if other else ""
            raise LaunchError(f"a stack already runs from {root}{who}; stop it or set CAIRN_HOME") from None
        try:
            yield
        finally:
            (run / "stack.json").unlink(missing_ok=True)
