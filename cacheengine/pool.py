"""One call to hand work to a thread pool, such that what was refused never runs."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def submit(pool: ThreadPoolExecutor, call: Callable[[], T]) -> "Future[T]":
    """Like pool.submit(call).  Raises RuntimeError when the pool is closed or has no thread to give.

    A pool that cannot start a thread keeps the call it has refused, and would make it later, into memory and
    blocks that are somebody else's by then.  Here the refused call is cancelled and does nothing; where
    another thread has taken it already, it counts.
    """
    answer: Future[T] = Future()

    def run() -> None:
        if answer.set_running_or_notify_cancel():
            try:
                answer.set_result(call())
            except BaseException as exc:  # noqa: BLE001  handed on, as a pool would
                answer.set_exception(exc)

    try:
        pool.submit(run)
    except RuntimeError:
        if answer.cancel():
            raise
    return answer
