"""Load on a running gateway: chats, questions over documents, one-off prompts.   make load

The question: what do users feel, and how many prompt tokens need not be computed?
The floor: OneOff, whose prompts nobody can have in a cache.

Locust's own statistics (also in its web page) get an entry per scenario under TTFT (asked to first token),
ITL (one token to the next) and E2E (asked to [DONE]).  --seed decides who asks what and when; OneOff prompts
and the students' names in chats are new in every run, or a second run would find all its answers' prefixes.
The exit code is 1 when any request failed.
"""

import random
import secrets
import time
from argparse import ArgumentParser
from collections import Counter
from typing import Any, cast

import requests
from locust import User, constant, events, task
from locust.env import Environment
from locust.runners import MasterRunner
from rich.console import Console

from loadtests import texts
from loadtests.report import finish
from loadtests.sse import Answer, StreamFailed
from loadtests.summary import Run

_TIMEOUT = (5, 120)  # seconds to connect; between two bytes
_LOAD = "cairn_load"  # where the environment carries ours


class Load:
    """What the users of one run share."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.options: Any = environment.parsed_options
        self.host = (environment.host or Talker.host).rstrip("/")
        self.model = ""
        self.begin()

    def begin(self, **_: Any) -> None:
        self.run = Run(time.monotonic())
        self.name = secrets.token_hex(4)  # never seen before
        self._numbers: Counter[str] = Counter()

    def find_model(self, **_: Any) -> None:
        """Raises SystemExit with a sentence: without a gateway there is nothing to load."""
        self.model = self.options.model
        if self.model:
            return
        try:
            reply = requests.get(f"{self.host}/v1/models", timeout=_TIMEOUT)
            self.model = reply.json()["data"][0]["id"]
        except (requests.RequestException, ValueError, LookupError) as exc:
            raise SystemExit(f"{self.host} lists no model ({type(exc).__name__}); `make up` first") from None

    def number(self, scenario: str) -> int:
        """The user's number in its scenario, from 1."""
        self._numbers[scenario] += 1
        return self._numbers[scenario]

    def end(self, **_: Any) -> None:
        self.run.ended = time.monotonic()

    def judge(self, **_: Any) -> None:
        if not all(bar.ok for bar in self.run.bars().values()):
            self.environment.process_exit_code = 1

    def print(self, **_: Any) -> None:
        """After locust's own tables, so that the JSON is the last line."""
        Console().print(self.run.table())
        finish("load", self.run.results(), self.run.bars())


class Talker(User):
    """Streams one answer after another; a failed request is reported and the talk goes on."""

    abstract = True
    host = "http://127.0.0.1:8000"
    wait_time = constant(0)  # the pause after an answer is drawn from the user's own seed

    def on_start(self) -> None:
        self.scenario = type(self).__name__
        self.load = cast(Load, getattr(self.environment, _LOAD))
        self.number = self.load.number(self.scenario)
        self.rng = random.Random(f"{self.load.options.seed}/{self.scenario}/{self.number}")
        self.asked = 0
        self.http = requests.Session()
        self.http.trust_env = False

    def on_stop(self) -> None:
        self.http.close()

    def tag(self) -> str:
        """Never seen before: the run, the user, the question."""
        self.asked += 1
        return f"{self.load.name}-{self.number}-{self.asked}"

    def pause(self) -> None:
        time.sleep(self.rng.uniform(0.2, 1.0))

    def ask(self, messages: list[texts.Message]) -> str | None:
        """The answer's text; None when the request failed."""
        answer = Answer(time.perf_counter())
        tally = self.load.run.of(self.scenario)
        try:
            self._stream(answer, messages)
        except (requests.RequestException, StreamFailed) as exc:
            tally.failed += 1
            self._fire("E2E", time.perf_counter() - answer.began, error=exc)
            return None
        tally.answer(answer)
        self._fire("TTFT", answer.ttft)
        for gap in answer.gaps:
            self._fire("ITL", gap)
        self._fire("E2E", answer.seconds, size=len(answer.text))
        return answer.text

    def _stream(self, answer: Answer, messages: list[texts.Message]) -> None:
        body = {
            "model": self.load.model, "messages": messages, "max_tokens": self.load.options.max_tokens,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        url = f"{self.load.host}/v1/chat/completions"
        with self.http.post(url, json=body, stream=True, timeout=_TIMEOUT) as reply:
            if reply.status_code != requests.codes.ok:
                raise StreamFailed(f"{reply.status_code}: {reply.text[:200]}")
            for piece in reply.iter_content(chunk_size=None):
                answer.feed(piece, time.perf_counter())
        answer.finish()

    def _fire(self, kind: str, seconds: float, *, error: Exception | None = None, size: int = 0) -> None:
        self.environment.events.request.fire(
            request_type=kind, name=self.scenario, response_time=1000 * seconds,
            response_length=size, exception=error, context={},
        )  # fmt: skip


class Chat(Talker):
    """A conversation that grows turn by turn; all share one system prompt."""

    weight = 3

    @task
    def talk(self) -> None:
        messages = [{"role": "system", "content": texts.SYSTEM}]
        student = self.tag()
        for _ in range(texts.TURNS):
            messages.append({"role": "user", "content": texts.chat_question(self.rng, student)})
            said = self.ask(messages)
            self.pause()
            if said is None:
                return
            messages.append({"role": "assistant", "content": said})


class Rag(Talker):
    """The same documents, different questions."""

    weight = 2

    @task
    def question(self) -> None:
        self.ask(texts.rag(self.rng))
        self.pause()


class OneOff(Talker):
    """Prompts without anything to reuse."""

    weight = 1

    @task
    def question(self) -> None:
        self.ask(texts.one_off(self.rng, self.tag()))
        self.pause()


@events.init_command_line_parser.add_listener
def _arguments(parser: ArgumentParser, **_: Any) -> None:
    parser.add_argument("--seed", type=int, default=0, help="decides who asks what and when")
    parser.add_argument("--max-tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--model", default="", help="default: the first one the gateway lists")


@events.init.add_listener
def _attach(environment: Environment, **_: Any) -> None:
    load = Load(environment)
    setattr(environment, _LOAD, load)
    load.find_model()
    environment.events.test_start.add_listener(load.begin)
    environment.events.test_stop.add_listener(load.end)
    if not isinstance(environment.runner, MasterRunner):  # a distributed run: each worker tells its share
        environment.events.quitting.add_listener(load.judge)
        environment.events.quit.add_listener(load.print)
