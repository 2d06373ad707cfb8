"""Outlives a launcher that was killed, and stops what it left behind.

Reads `+<group>` and `-<group>` lines from standard input.  End of file means the launcher is gone: every
group still listed is asked to stop, then killed.  Normal shutdown removes all groups first.
"""

import signal
import sys
from collections.abc import Iterable

from gateway.launch.processes import kill_group, wait_until_gone

_GRACE_SECONDS = 10.0


def remaining(lines: Iterable[str]) -> list[int]:
    """Groups added and not removed, in order."""
    groups: dict[int, None] = {}
    for line in lines:
        group = int(line[1:])
        if line[0] == "+":
            groups[group] = None
        else:
            groups.pop(group, None)
    return list(groups)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    groups = remaining(sys.stdin)
    for group in groups:
        kill_group(group, signal.SIGTERM)
    for group in groups:
        wait_until_gone(group, _GRACE_SECONDS)
        kill_group(group)


if __name__ == "__main__":
    main()
