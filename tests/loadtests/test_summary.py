import io
import json

import pytest
from rich.console import Console

from loadtests.report import finish
from loadtests.sse import Answer
from loadtests.summary import Run, percentile


def answer(ttft: float, gap: float, words: int = 4, prompt: int = 100, cached: int = 0) -> Answer:
    arrivals = [ttft + gap * i for i in range(words)]
    return Answer(0.0, arrivals, "x", prompt, cached, words, ended=arrivals[-1] + 0.5)


@pytest.fixture
def run() -> Run:
    run = Run(began=100.0, ended=104.0)
    for ttft in (0.1, 0.2, 0.3):
        run.of("Chat").answer(answer(ttft, 0.02, prompt=1000, cached=900))
    run.of("OneOff").answer(answer(1.0, 0.04))
    return run


def test_times_and_tokens_are_kept_apart_by_scenario(run):
    found = run.results()
    assert found["Chat ttft p50 s"] == pytest.approx(0.2)
    assert found["Chat itl p50 s"] == pytest.approx(0.02)
    assert found["Chat e2e p50 s"] == pytest.approx(0.2 + 3 * 0.02 + 0.5)
    assert found["OneOff ttft p50 s"] == pytest.approx(1.0)
    assert (found["Chat cached tokens"], found["OneOff cached tokens"]) == (2700, 0)


def test_all_is_the_sum_of_the_scenarios(run):
    total = run.total
    assert (total.answered, total.prompt_tokens, total.completion_tokens) == (4, 3100, 16)
    assert run.tokens_per_second == pytest.approx(16 / 4)


def test_a_failed_request_misses_the_bar(run):
    assert all(bar.ok for bar in run.bars().values())
    run.of("Rag").failed += 1
    assert not run.bars()["failed requests"].ok


def test_a_run_without_answers_proves_nothing():
    assert not Run(0.0, 1.0).bars()["answers"].ok


def test_an_empty_run_can_be_shown():
    assert shown(Run(0.0, 1.0).table())


def test_the_table_fits_into_eighty_columns(run):
    for _ in range(300):
        run.of("Rag").answer(answer(9.87, 1.23, prompt=12_345, cached=12_344))
    text = shown(run.table())
    for name in ("Chat", "OneOff", "Rag", "all", "90%", "9,870/9,870"):
        assert name in text
    assert "…" not in text


def test_the_last_line_is_one_json_object(run, capsys):
    assert finish("load", run.results(), run.bars()) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(line) == {"bench", "commit", "machine", "results", "bars"}
    assert line["bars"]["failed requests"] == {"value": 0, "bar": 0, "better": "lower", "ok": True}


def test_json_only_means_one_line(run, capsys):
    run.of("Chat").failed += 1
    assert finish("load", run.results(), run.bars(), verdicts=False) == 1
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_percentiles_of_few_values():
    assert percentile([], 95) == 0
    assert percentile([3.0], 95) == 3.0
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0


def shown(table) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(table)
    return out.getvalue()
