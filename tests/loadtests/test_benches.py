"""What the two engine benches make of their measurements; the measuring needs a real vLLM."""

import pytest

from loadtests import bench_overhead, bench_ttft
from loadtests.__main__ import benches, listing


@pytest.fixture
def times() -> bench_ttft.Times:
    host, disk, redis = bench_ttft._NAMES.values()
    return bench_ttft.Times(
        {
            bench_ttft.PLAIN: [4.1, 4.0, 4.2],
            bench_ttft.DEVICE: [0.2, 0.1, 0.3],
            bench_ttft.COLD: [4.4, 4.3, 9.0],
            host: [0.30, 0.29, 0.31],
            disk: [0.4, 0.3, 0.5],
            redis: [0.8, 0.7, 0.9],
        }
    )


def test_the_lower_cold_median_is_divided(times):
    assert times.cold == 4.1


def test_bars_are_honest(times):
    bars = times.bars()
    assert {name: bar.ok for name, bar in bars.items()} == {
        "cold / host": True, "cold / disk": True, "cold / redis": False, "host / device": False,
    }  # fmt: skip
    assert bars["cold / redis"].value == pytest.approx(4.1 / 0.8)
    assert bars["host / device"].value == pytest.approx(0.30 / 0.2)


def test_every_case_has_a_row_and_its_spread(times):
    assert times.table(3000).row_count == 6
    assert times.results()["cold, Cairn max s"] == 9.0


def test_the_overhead_is_the_median_of_the_rounds_beside_what_plain_differs_by_from_itself():
    rounds = [
        bench_overhead.Round(100, 100, 99, 0.2),
        bench_overhead.Round(100, 120, 111, 0.1),
        bench_overhead.Round(100, 80, 60, 5),
    ]
    found = bench_overhead.summary(rounds)
    assert found["ratio"] == pytest.approx(0.99)
    assert (found["ratio min"], found["ratio max"]) == (pytest.approx(60 / 90), pytest.approx(111 / 110))
    assert (found["control"], found["control min"], found["control max"]) == (1, 0.8, 1.2)
    assert bench_overhead.report(rounds).row_count == 3


def test_every_bench_is_listed_with_what_it_asks():
    names = {bench.name for bench in benches()}
    assert {"ttft", "overhead", "gather", "index", "tokenize"} <= names
    lines = listing().splitlines()
    assert len(lines) == len(names) + 3  # and the load test, and the two peers
    assert all(len(line) <= 110 and line.partition(" ")[2].strip() for line in lines)


def test_every_bench_is_quick_when_asked():
    for bench in benches():
        assert "--quick" in bench.path.read_text(), bench.name


@pytest.mark.parametrize("arguments", [["--tokens", "100"], ["--tokens", "9999"]])
def test_prompts_that_prove_nothing_are_refused_before_anything_starts(arguments, capsys):
    assert bench_ttft.main(arguments) == 2
    assert "--tokens must be between" in capsys.readouterr().err
