"""What the comparison makes of its measurements; the measuring needs vLLM and LMCache."""

import io
import subprocess
import sys
import sysconfig
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from gateway.launch.board import Board
from gateway.launch.processes import Child, Spec
from loadtests.engine import BenchFailed, Engine
from loadtests.peers import lmcache, load, tiers, values, venv
from loadtests.peers.daemon import Stored, daemon_command, in_redis, on_disk, transfer_config
from loadtests.peers.lines import Line, bars, notes, rotated, table
from tests.fakes import FakeVLLM, refusing_url, serve

FASTER = Line("host", "s", [0.5, 0.6, 0.4], [0.1, 0.2, 0.4])


def test_seconds_are_better_when_fewer_and_rates_when_more():
    assert FASTER.ratios == pytest.approx([5, 3, 1])
    assert FASTER.ratio == pytest.approx(3)
    assert Line("set", "GB/s", [2.0], [3.0]).ratio == pytest.approx(1.5)


def test_the_best_turns_are_told_beside_the_median():
    assert FASTER.best == pytest.approx(4)
    assert Line("set", "GB/s", [1.0, 2.0], [3.0, 2.5]).best == pytest.approx(1.5)


def test_after_a_fault_the_slowest_are_compared():
    line = Line("killed", "s", [1.0, 60.0], [2.0, 3.0], worst=True)
    assert line.ratio == pytest.approx(20)
    assert "killed, ratio min" not in dict(line.results())


def test_where_we_lose_the_bench_says_so():
    found = bars([FASTER, Line("get", "GB/s", [4.0, 4.0], [3.0, 2.0])])
    assert {name.partition(":")[0]: bar.ok for name, bar in found.items()} == {"host": True, "get": False}


def test_an_unanswered_request_of_ours_is_a_miss_however_slow_the_other_was():
    found = bars([load.fault("killed", [load.Waited(59.0)], [load.Waited(0.1, "w1 said 500")])])
    assert [bar.ok for bar in found.values()] == [False, False]


def test_who_was_not_answered_waited_to_the_end():
    line = load.fault("x", [load.Waited(4.0), load.Waited(0.1, "said 500")], [load.Waited(4.0)] * 2)
    assert line.lmcache == [4.0, load.PATIENCE_SECONDS]
    assert line.note == "LMCache: 1 of 2 answered (said 500); Cairn: 2 of 2 answered"


def test_results_have_the_spread_of_every_side():
    found = dict(Line("cold", "s", [4.0, 6.0], [4.0, 4.2], [3.9]).results())
    assert found["cold, LMCache s"] == 5.0
    assert (found["cold, LMCache min s"], found["cold, LMCache max s"]) == (4.0, 6.0)
    assert found["cold, plain vLLM s"] == 3.9
    assert found["cold, ratio max"] == pytest.approx(6 / 4.2)


def test_the_table_fits_into_eighty_columns():
    long = Line("disk after kill -9, page cache warm", "tokens/s", [1234.567] * 2, [2345.678] * 2, [0.1])
    out = io.StringIO()
    Console(file=out, width=80).print(table([FASTER, long], "title"))
    assert "…" not in out.getvalue()
    assert "3.00×" in out.getvalue()
    assert notes([FASTER, Line("b", "s", [1.0], [1.0], note="why")]) == "b: why"


def test_everybody_goes_first_in_turn():
    assert [rotated("abc", turn)[0] for turn in range(4)] == ["a", "b", "c", "a"]
    assert sorted(rotated("abc", 2)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("hits", "words"),
    [
        ([0, 0], "LMCache: no hit"),
        ([2944, 2944], "LMCache hit 2,944 tokens"),
        ([0, 2944], "LMCache hit 0 to 2,944 tokens"),
    ],
)
def test_no_hit_is_a_measurement(hits, words):
    assert tiers.told(hits) == words


def test_only_whole_chunks_are_waited_for():
    assert tiers.chunks([[0] * 3000, [0] * 127], 128) == 23


def status(**more: int) -> dict[str, object]:
    above = {"total_object_count": 23, "write_locked_count": 0}
    below = {"pending_keys_count": 0, "in_flight_task_count": 0}
    for part in (above, below):
        part.update({key: value for key, value in more.items() if key in part})
    return {"storage_manager": {"l1_manager": above, "store_controller": below}}


@pytest.mark.parametrize("busy", ["write_locked_count", "pending_keys_count", "in_flight_task_count"])
def test_lmcache_has_settled_when_nothing_is_on_its_way(busy):
    assert Stored.of(status()) == Stored(chunks=23, busy=0)
    assert Stored.of(status(**{busy: 2})).busy == 2


def test_lmcache_stays_on_loopback_and_its_password_out_of_argv():
    adapter, secret = in_redis("redis://:s3cret@127.0.0.1:7000/0")
    argv = daemon_command(Path("/v/lmcache"), 1, 2, "shm", 128, [on_disk(Path("/d")), adapter])
    assert secret == "s3cret"
    assert "s3cret" not in " ".join(argv)
    assert adapter == {"type": "resp", "host": "127.0.0.1", "port": 7000}
    assert argv[argv.index("--host") + 1] == "127.0.0.1"
    assert argv.count("--l2-adapter") == 2


def test_both_sides_recompute_what_they_cannot_load():
    assert transfer_config(1)["kv_load_failure_policy"] == "recompute"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An environment that claims to hold packages already, so that nothing is downloaded."""
    made = tmp_path / "peer"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made)], check=True)
    (made / "packages.txt").write_text("peer==1\n")
    return made


def ensure(folder: Path, own: tuple[str, ...], lent: tuple[str, ...]) -> Path:
    return venv.ensure(folder, ["peer==1"], own, lent, Board(Console(quiet=True)))


def test_the_peer_borrows_what_it_does_not_bring(folder):
    assert ensure(folder, (), ("httpx",)) == folder / "bin" / "python"


def test_what_the_peer_brings_wins(folder):
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    (site / "httpx.py").write_text("")
    assert ensure(folder, ("httpx",), ("rich",)).exists()
    with pytest.raises(BenchFailed, match=r"httpx comes from .*; delete the folder"):
        ensure(folder, (), ("httpx",))


def test_a_peer_without_its_package_is_no_peer(folder):
    with pytest.raises(BenchFailed, match="nowhere_to_be_found comes from nowhere"):
        ensure(folder, ("nowhere_to_be_found",), ())


def test_our_values_go_to_redis_and_come_back(valkey):
    with values.ours(valkey.url, 2) as turn:
        assert turn("set", 1) > 0
        assert turn("get", 1) > 0
        with pytest.raises(BenchFailed, match="did 0 of"):
            turn("get", 2)


def test_a_client_that_cannot_start_is_a_sentence(valkey):
    with (
        pytest.raises(BenchFailed, match="resp client ended"),
        values.theirs(Path(sys.executable), "resp", 1, valkey.url),  # there is no lmcache in ours
    ):
        pass


def engine(http: httpx.Client, tmp_path: Path) -> Engine:
    child = Child(Spec(name="w1", argv=("true",), log=tmp_path / "log", ready=lambda: True))
    return Engine(child, http, "fake")


def test_who_is_refused_at_once_does_not_end_the_asking(tmp_path):
    worker = FakeVLLM(status=500)
    with serve(worker) as url, httpx.Client(base_url=url) as http:
        waits = load.after(engine(http, tmp_path), [[1], [2]])
    assert len(worker.asked) == 2
    assert all("500" in waited.why_not for waited in waits)


def test_a_dead_worker_is_told_at_once_and_counted_to_the_end(tmp_path):
    with httpx.Client(base_url=refusing_url()) as http:
        [waited] = load.after(engine(http, tmp_path), [[1]])
    assert waited.why_not
    assert load.counted(waited) == load.PATIENCE_SECONDS


def test_a_section_that_is_none_is_refused_before_anything_starts(capsys):
    with pytest.raises(SystemExit):
        lmcache.main(["--only", "host,moon"])
    assert "no section moon; there are host, disk" in capsys.readouterr().err


def test_every_section_is_named_in_the_help():
    assert all(name in str(lmcache.__doc__) for name in lmcache.SECTIONS)
