"""What a person is told when something cannot start: one sentence, and where to look."""

from pathlib import Path


class LaunchError(Exception):
    """One sentence somebody can act on; `log` names a file that knows more, `tail` its last lines."""

    def __init__(self, sentence: str, log: Path | None = None, tail: str = "") -> None:
        super().__init__(sentence)
        self.log = log
        self.tail = tail
