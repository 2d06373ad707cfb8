"""The native client against a real server, and what the bench makes of its numbers."""

import json
import shutil
from pathlib import Path

import pytest

from loadtests.bench_gateway import DIRECT, Case, Row, Turn, bars, body, cases, table
from loadtests.loadgen import Generator, Load, Seen
from loadtests.peers.routers_lab import CAIRN, VLLM
from tests.fakes import FakeVLLM, serve
from tests.servers import needed

BODY = json.dumps({"model": "fake", "messages": []}).encode()
STREAM = json.dumps({"model": "fake", "messages": [], "stream": True}).encode()
PATH = "/v1/chat/completions"
SEEN = Seen(100, 100, 0, 0, 0, "", 200, 9, 2.0, 0.1, 1.0, 2.0, 1.5, 0.1, 0.2)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    needed(shutil.which("g++"), "g++")
    return Generator(tmp_path_factory.mktemp("programs"), tmp_path_factory.mktemp("requests"))


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@pytest.mark.e2e
def test_every_answer_is_counted_whole(generator: Generator) -> None:
    with serve(worker := FakeVLLM(tokens=3)) as url:
        whole = generator.ask(port_of(url), PATH, BODY, Load(4, 0.3))
        streamed = generator.ask(port_of(url), PATH, STREAM, Load(4, 0.3))
    assert whole.answered + streamed.answered == len(worker.asked)
    assert whole.errors == streamed.errors == whole.unanswered == streamed.unanswered == 0
    assert streamed.events == 5 * streamed.answered
    assert whole.ttfb_p99 >= whole.ttfb_p50 > 0


@pytest.mark.e2e
def test_those_who_leave_are_no_errors_and_are_heard_by_the_server(generator: Generator) -> None:
    with serve(worker := FakeVLLM(tokens=50, gap=0.001)) as url:
        seen = generator.ask(port_of(url), PATH, STREAM, Load(8, 0.5, aborts=0.5))
    assert seen.aborted > 0
    assert seen.errors == 0
    assert seen.answered + seen.aborted == seen.requests
    assert worker.aborted > 0


@pytest.mark.e2e
def test_refusals_are_errors_and_open_loops_do_not_wait(generator: Generator) -> None:
    with serve(FakeVLLM(status=500)) as url:
        refused = generator.ask(port_of(url), PATH, BODY, Load(1, 0.2))
    assert refused.errors == refused.answered > 0
    assert refused.error.endswith("500")
    with serve(FakeVLLM(gap=0.1)) as url:
        waiting = generator.ask(port_of(url), PATH, STREAM, Load(1, 0.3, rate=100))
    assert waiting.requests > 3  # one connection alone could not have
    assert waiting.answered == waiting.requests


def row(name: str, direct: float, ours: float, theirs: float, **more: float) -> Row:
    seen = {DIRECT: direct, CAIRN: ours, VLLM: theirs}
    turns = {
        side: [Turn(Seen(**{**_fields(), "ttfb_p50": p50, **more}), cpu=0.1)] for side, p50 in seen.items()
    }
    return Row(Case(name, 1024, Load()), turns)


def _fields() -> dict[str, object]:
    return {name: getattr(SEEN, name) for name in SEEN.__struct_fields__}


def test_what_is_added_is_compared_not_what_is_measured() -> None:
    found = bars({"1 KB, C=1": row("1 KB, C=1", direct=10, ours=13, theirs=12)})
    (bar,) = (bar for name, bar in found.items() if name.startswith("added p50"))
    assert bar.value == pytest.approx(1.5)
    assert bar.ok
    assert not bars({"x": row("x", 1, 2, 2, errors=1)})["Cairn's errors"].ok
    assert table([row("1 KB, C=1", 10, 13, 12)]).row_count == 4


def test_every_case_has_a_body_of_its_size_and_the_quick_ones_are_among_all() -> None:
    words = Path(__file__).read_text().split()
    for case in cases(quick=False):
        assert 0.7 * case.bytes < len(body(case, words)) < 1.3 * case.bytes + 1024
    assert {case.name for case in cases(quick=True)} <= {case.name for case in cases(quick=False)}
