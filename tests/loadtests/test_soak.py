"""What the soak makes of answers, kills and memory; the soak itself needs a stack."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from loadtests import bench_never_blocks, soak
from loadtests.chaos import Chaos
from loadtests.engine import BenchFailed
from loadtests.memory import Memory, part_of, processes
from tests.fakes import wait_until

TRUTH = soak.Reference([1, 2, 3], [0.5, 0.0001, 0.5])


@pytest.mark.parametrize(
    ("got", "verdict"),
    [
        ([1, 2, 3], "ok"),
        ([1, 9, 9], "tie"),
        ([9, 2, 3], "wrong"),
        ([1, 2, 9], "wrong"),
        ([1, 2], "wrong"),
        ([1], "wrong"),
        ([], "wrong"),
        ([1, 2, 3, 4], "wrong"),
    ],
)
def test_an_answer_is_right_wrong_or_a_matter_of_rounding(got, verdict):
    assert soak.judge(got, TRUTH) == verdict


@pytest.mark.parametrize(
    ("start", "end", "verdict"), [(1, 4, "failed"), (1, 6, "cut"), (5.1, 6, "cut"), (5.5, 9, "failed")]
)
def test_only_what_was_under_way_at_a_kill_is_excused(start, end, verdict):
    assert soak.excuse(start, end, [5.0]) == verdict


def test_prompts_share_documents_and_popular_ones_come_more_often():
    prompts = soak.Prompts(range(100_000), 10, 2, random.Random(0))
    assert len(prompts.all) == 20
    assert prompts.all[0][:150] == prompts.all[1][:150]
    assert prompts.all[0] != prompts.all[1]
    rng = random.Random(1)
    drawn = [prompts.popular(rng) // 2 for _ in range(1000)]
    assert drawn.count(0) > drawn.count(5) > 0
    assert set(drawn) == set(range(10))


def test_growth_is_judged_on_parts_that_stayed():
    memory = Memory(0, 8000)
    for quarter in range(100):
        when = quarter / 100
        memory._seen.setdefault(("w1", 1), []).append((when, 1000.0 if when < 0.75 else 1050.0))
        memory._seen.setdefault(("valkey", 2), []).append((when, 100.0 * quarter))
        if when > 0.6:
            memory._seen.setdefault(("w2", 3), []).append((when, 10.0 * quarter))
    assert memory.growth() == {"w1": pytest.approx(0.05)}


def test_parts_are_told_by_their_command():
    assert part_of("/x/valkey-server -", 8000) == "valkey"
    assert part_of("python -m gateway.launch.serve {}", 8000) == "gateway"
    assert part_of("python -m vllm.entrypoints.openai.api_server --port 8002 --dtype float32", 8000) == "w2"
    assert part_of("python -m vllm.entrypoints.openai.api_server --port 80021 ", 8000) == ""
    me = next(p for p in processes() if p.pid == os.getpid())
    assert me.parent == os.getppid()
    assert me.mib > 5


class Rehearsal(Chaos):
    """Faults on a process and a file of the test."""

    def __init__(self, parts, disk):
        super().__init__(lambda: parts, "redis://127.0.0.1:1/0", disk, "http://127.0.0.1:1", 0, lambda: True)


def test_every_fault_is_undone_and_a_dead_part_is_no_trouble(tmp_path):
    (tmp_path / "w1").mkdir()
    path = tmp_path / "w1" / "rank0.slots"
    path.write_bytes(bytes(100_000))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        chaos = Rehearsal({"valkey": process.pid}, tmp_path)
        assert chaos.freeze() > 0
        wait_until(lambda: _state(process.pid) == "T")
        chaos.heal()
        wait_until(lambda: _state(process.pid) != "T")
        assert chaos.flip() is not None
        assert path.read_bytes() != bytes(100_000)
        assert path.stat().st_size == 100_000
        assert chaos.truncate() is not None
        assert path.stat().st_size < 100_000
        chaos.heal()
        assert path.stat().st_size == 100_000
        assert (chaos.squeeze(), chaos.flush(), chaos.kill_worker()) == (None, None, None)  # nobody there
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert chaos.freeze() is not None
        chaos.heal()


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rpartition(")")[2].split()[0]


def test_faults_come_one_after_another(tmp_path):
    chaos = Rehearsal({}, tmp_path)
    chaos._next = 0.0
    drawn = []
    for _ in range(18):
        chaos.tick(kills=True)
        drawn.append(chaos.last)
        chaos._next = min(chaos._next, time.monotonic())
    assert drawn[:2] == ["kill_worker", "freeze"]
    assert len(set(drawn[2:10])) == 8
    assert chaos.counts.keys() == {"flood"}  # there was nothing else to break


def test_gaps_are_split_by_what_they_overlap():
    beside, during = bench_never_blocks.split([0, 1, 2, 3, 4, 5], 1.5, 3.5)
    assert (beside, during) == ([1, 1], [1, 1, 1])
    with pytest.raises(BenchFailed, match="did not outlast"):
        bench_never_blocks.split([0, 1, 2], 1.5, 3.5)


def test_growth_of_the_p99_is_that_of_the_worst_in_a_hundred():
    one = bench_never_blocks.Repetition([1.0] * 199 + [2.0], [1.0] * 90 + [3.0] * 10, 6.0)
    assert one.growth(99) == 3.0
    assert one.growth(50) == 1.0
