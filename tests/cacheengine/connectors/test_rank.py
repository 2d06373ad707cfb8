"""Where a rank's I/O threads may run: on cores nobody computes on."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from cacheengine.connectors.geometry import compute_cores
from cacheengine.connectors.rank import spare_cores

CORES = frozenset(range(os.cpu_count() or 1))


def spare_beside(model_thread: set[int], computing: set[int]) -> frozenset[int]:
    """As a model thread bound to these cores finds them."""

    def bound() -> frozenset[int]:
        os.sched_setaffinity(0, model_thread)  # of this thread
        return spare_cores(frozenset(computing))

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(bound).result()


def test_io_threads_leave_the_model_thread_alone():
    if len(CORES) < 2:
        pytest.fail("a machine of one core proves nothing here")
    assert spare_beside({0}, set()) == CORES - {0}


def test_io_threads_leave_every_rank_alone_where_they_can():
    other = {max(CORES)}
    assert spare_beside({0}, {0} | other) == (CORES - {0} - other or CORES)


def test_where_every_core_computes_the_kernel_decides():
    assert spare_beside({0}, set(CORES)) == CORES


@pytest.mark.parametrize(
    ("dealt", "cores"),
    [("0|1", {0, 1}), ("0-3|8-9,11", {0, 1, 2, 3, 8, 9, 11}), ("5", {5}), ("auto", set()), ("nobind", set())],
)
def test_the_ranks_cores_are_those_vllm_was_told(monkeypatch, dealt, cores):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", dealt)
    assert compute_cores() == cores
