"""Workers that compute nothing, at native speed.   python -m loadtests.mock_worker --ports 9001 --folder F

One native process (mock_worker_cpp/) is all the workers; each port is one, with

* OpenAI's /v1/completions and /v1/chat/completions, streamed or not, /v1/models, /health, /version,
  /tokenize, and /metrics with vLLM's names;
* a prefix cache: least recently used chunks of a prompt under its `cache_salt`, `--capacity` of them;
* one prompt computed at a time, first come first served, at `--prefill-rate` tokens/s for what the cache does
  not hold when its turn comes; then a token every 1/`--decode-rate` seconds, whatever else runs;
* `usage` with cached_tokens, and counters under /mock/stats.

With a Redis in CAIRN_REDIS_URL each worker also joins Cairn's fleet, as a real one does: lease, heartbeat
every two seconds, and its chunks in the index, under the keys the gateway computes.

Prompts must be made of words that are one token with the blank before them (vocabulary()): then looking up
words is tokenizing.  Other text is served too, but no gateway will know its chunks.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO
from uuid import uuid4

from tokenizers import Tokenizer

from cacheengine.build import COMPILERS
from cacheengine.config import CONFIG_FILE_ENV
from cacheengine.index_schema import DEVICE, Entry, WorkerInfo
from cacheengine.index_writer import IndexWriter
from cacheengine.keys import ChunkKey, KeyScheme, namespace_of, probe_keys
from gateway.handshake import PROBE_CHAT, PROBE_PROMPT
from gateway.launch.config import DEFAULT_MODEL, LaunchConfig
from gateway.launch.model import prepare

SOURCES = Path(__file__).parent / "mock_worker_cpp"
FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror")
# the mock counts words of all messages: a template that adds nothing keeps the gateway's tokens the same
TEMPLATE = "{%- for message in messages -%}{{ ' ' + message['content'] }}{%- endfor -%}"
TTL_SECONDS, LEASE_SECONDS = 1800.0, 6.0  # the engine's defaults


def build(folder: Path, sources: Path = SOURCES, name: str = "mock-worker") -> Path:
    """The compiled program; built when its sources changed.  Raises OSError or CalledProcessError."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError(f"no C++ compiler ({', '.join(COMPILERS)}) in PATH")
    text = b"\0".join(path.read_bytes() for path in sorted(sources.iterdir()))
    mark = hashlib.sha256(repr((compiler, FLAGS)).encode() + text).hexdigest()[:16]
    program = folder / f"{name}-{mark}"
    if not program.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fresh = program.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *FLAGS, "-o", str(fresh), str(sources / "main.cpp")], check=True)
        fresh.replace(program)
    return program


def vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """Plain lower-case words that are one token with a blank before them, and that token."""
    blank = "\u0120"  # how byte-level BPE writes it
    found = {
        name[1:]: number
        for name, number in tokenizer.get_vocab().items()
        if name.startswith(blank) and name[1:].isascii() and name[1:].isalpha() and name[1:].islower()
    }
    words = sorted(found)
    ids = tokenizer.encode("".join(f" {word}" for word in words), add_special_tokens=False).ids
    if ids != [found[word] for word in words]:
        raise ValueError("this tokenizer does not keep words apart")
    return found


def equip(folder: Path, model: Path) -> None:
    """What gateway and mock agree on: a tokenizer, a template that adds nothing, words, canned answers."""
    shutil.copy(model / "tokenizer.json", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lines = (f"{word} {number}\n" for word, number in sorted(vocabulary(tokenizer).items()))
    (folder / "vocabulary").write_text("".join(lines))
    chat = "".join(f" {message['content']}" for message in PROBE_CHAT)
    for name, text in (("prompt", PROBE_PROMPT), ("chat", chat)):
        ids = tokenizer.encode(text, add_special_tokens=name == "prompt").ids
        (folder / name).write_text(json.dumps({"tokens": ids, "count": len(ids), "max_model_len": 1 << 20}))


class Member:
    """One mock worker's place in Cairn's fleet."""

    def __init__(self, redis_url: str, url: str, folder: Path, scheme: KeyScheme, model: str, rate: float):
        self._url, self._rate = url, rate
        self._held: dict[ChunkKey, Entry] = {}
        self._lock = threading.Lock()
        info = WorkerInfo(
            worker_id=url.partition("://")[2],
            url=url,
            model=model,
            model_path=str(folder),
            namespace=scheme.namespace.hex(),
            chunk_tokens=scheme.chunk_tokens,
            probe_keys=tuple(probe_keys(scheme)),
            block_size=scheme.chunk_tokens,
            tiers=("device",),
            boot_id=uuid4().hex,
        )
        self.writer = IndexWriter(redis_url, info, TTL_SECONDS, LEASE_SECONDS, self._beat, self._inventory)
        self.writer.start()

    def changed(self, root: ChunkKey, keys: Sequence[ChunkKey], bits: int) -> None:
        entries = [Entry(root, key, bits) for key in keys]
        with self._lock:
            for entry in entries:
                if bits:
                    self._held[entry.key] = entry
                else:
                    self._held.pop(entry.key, None)
        self.writer.publish(entries)

    def _inventory(self) -> list[Entry]:
        with self._lock:
            return list(self._held.values())

    def _beat(self) -> Mapping[str, float]:
        with urllib.request.urlopen(f"{self._url}/mock/stats", timeout=2) as reply:
            stats = json.load(reply)
        return {name: float(stats[name]) for name in ("running", "waiting", "queued_tokens")} | {
            "prefill_rate": self._rate
        }


def follow(news: IO[str], members: Sequence[Member]) -> None:
    """Publish what the mock says it gained and lost, until it ends."""
    for line in news:
        number, verb, *keys = line.split()
        if members:
            root, *changed = (ChunkKey(bytes.fromhex(key)) for key in keys)
            members[int(number)].changed(root, changed, DEVICE if verb == "+" else 0)


def command(program: Path, folder: Path, scheme: KeyScheme, args: argparse.Namespace) -> list[str]:
    options = {
        "--prefill-rate": args.prefill_rate,
        "--decode-rate": args.decode_rate,
        "--chunk-tokens": scheme.chunk_tokens,
        "--capacity": args.capacity,
        "--model": args.model,
        "--namespace": scheme.namespace.hex(),
        "--root": scheme.root().hex(),
        "--vocab": folder / "vocabulary",
        "--tokenized": folder,
    }
    return [str(program), *(str(part) for option in options.items() for part in option)]


def run(args: argparse.Namespace) -> int:
    root = LaunchConfig.load(
        env={name: value for name, value in os.environ.items() if name != CONFIG_FILE_ENV}
    ).root
    program = build(root / "bench")
    equip(args.folder, args.tokenizer or prepare(DEFAULT_MODEL, root).path)
    scheme = KeyScheme(namespace_of({"mock": args.model, "chunk": args.chunk_tokens}), args.chunk_tokens)
    listeners = [socket.create_server(("127.0.0.1", port), backlog=1024) for port in args.ports]
    argv = command(program, args.folder, scheme, args)
    for listener in listeners:
        listener.setblocking(False)
        argv += ["--fd", str(listener.fileno())]
    fds = [listener.fileno() for listener in listeners]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, pass_fds=fds) as mock:
        signal.signal(signal.SIGTERM, lambda number, frame: mock.terminate())
        for listener in listeners:
            listener.close()
        redis_url = os.environ.get("CAIRN_REDIS_URL", "")
        urls = [f"http://127.0.0.1:{port}" for port in args.ports] if redis_url else []
        members = [Member(redis_url, url, args.folder, scheme, args.model, args.prefill_rate) for url in urls]
        assert mock.stdout is not None
        try:
            follow(mock.stdout, members)
        except KeyboardInterrupt:
            mock.terminate()
        for member in members:
            member.writer.close()
    return 0


def ports(text: str) -> list[int]:
    return [int(port) for port in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ports", type=ports, required=True, help="comma-separated; a worker on each")
    parser.add_argument("--folder", type=Path, required=True, help="where tokenizer and words are put")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder with tokenizer.json; default the bundled model's"
    )
    parser.add_argument("--model", default="mock", help="served name")
    parser.add_argument("--prefill-rate", type=float, default=8000, help="tokens/s of one worker")
    parser.add_argument("--decode-rate", type=float, default=100, help="tokens/s of one answer")
    parser.add_argument("--chunk-tokens", type=int, default=32, help="unit of the cache")
    parser.add_argument("--capacity", type=int, default=2000, help="chunks a worker's cache holds")
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
