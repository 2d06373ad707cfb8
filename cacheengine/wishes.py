"""What people want of the cache: desired state in Redis that every worker of a namespace makes true.

    cairn:{<ns>}:pins      SET   chunk keys that must not be evicted, 32 hex digits each
    cairn:{<ns>}:wishes    HASH  pins_version, clear_epoch, model; for people also who and when

The braces are part of the names: both keys share a Cluster slot, so one script changes them together.

Nobody is called.  A worker reads the two numbers with every beat; where one is not what it last obeyed, it
reads the rest, obeys, and announces the number in its lease, where whoever made the wish can wait for it.
Beside its disk tier it keeps a note of what it has obeyed: a worker that was down while something was said
catches up before it serves, and a Redis that lost everything is told again.
"""

import json
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast

import redis
from redis.client import Pipeline

from cacheengine import redis_url
from cacheengine.config import ConfigError
from cacheengine.errors import CacheError
from cacheengine.keys import KEY_BYTES, ChunkKey

log = logging.getLogger(__name__)

MAX_PINS = 100_000  # of one namespace: pins are for the few prompts that must never be slow
START_SECONDS = 1.0  # how long a starting worker waits for Redis to say what it missed
NUMBERS = ("pins_version", "clear_epoch")
Verb = Literal["pin", "unpin", "clear"]

_LUA = Path(__file__).parent


class Wish(NamedTuple):
    """What the workers of a namespace should do.  A number is the server's clock in microseconds when it was
    said, or one above the last; 0: nothing was said."""

    pins_version: int = 0
    clear_epoch: int = 0
    pins: frozenset[ChunkKey] = frozenset()  # exactly these are pinned, held now or later

    @classmethod
    def of(cls, numbers: Sequence[bytes | str | None], pins: Collection[bytes | str] = ()) -> Self:
        """From what Redis, a lease or a note says.  A pin that is no chunk key is left out, and a number that
        is none was not said: whoever can write to Redis must not be able to stop a worker."""
        version, epoch = map(_number, numbers)
        texts = (pin.decode("ascii", "replace") if isinstance(pin, bytes) else str(pin) for pin in pins)
        return cls(version, epoch, frozenset(key for text in texts if (key := parse_key(text))))


def _number(said: bytes | str | None) -> int:
    try:
        return int(said or 0)
    except ValueError:
        return 0


# (what is wanted, what was obeyed before): a number that differs is a job to do
Obey = Callable[[Wish, Wish], None]


class TooManyPins(CacheError):
    """Pinning that would make more than MAX_PINS."""


def names_of(namespace: str) -> tuple[str, str]:
    """Wishes and pins; `namespace` in hex."""
    return f"cairn:{{{namespace}}}:wishes", f"cairn:{{{namespace}}}:pins"


def make(
    client: redis.Redis, namespace: str, verb: Verb, keys: Collection[ChunkKey], who: str
) -> tuple[int, int]:
    """Say a wish.  Returns (the number workers will announce, how many pins it changed).

    `keys` is empty for "clear".  Raises TooManyPins, and what redis-py raises.
    """
    client = redis_url.server_of(client, names_of(namespace)[0])
    script = client.register_script((_LUA / "wishes_make.lua").read_text())
    number, changed = script(names_of(namespace), [verb, who, MAX_PINS, *(key.hex() for key in keys)])
    if not int(number):
        raise TooManyPins(f"{changed} chunks are pinned and at most {MAX_PINS} can be; unpin some first")
    return int(number), int(changed)


def read(client: redis.Redis, namespace: str) -> Wish:
    """The numbers and the pins, of one moment.  Raises what redis-py raises."""
    wishes, pins = names_of(namespace)
    with redis_url.server_of(client, wishes).pipeline(transaction=True) as pipe:
        pipe.hmget(wishes, *NUMBERS)
        pipe.smembers(pins)
        numbers, members = pipe.execute()
    return Wish.of(numbers, members)


def obeyed_in(lease: Mapping[str, str]) -> Wish:
    """The numbers a worker announces, without the pins; 0 where it announces none."""
    return Wish.of([lease.get(name) for name in NUMBERS])


class Listener:
    """A worker's side.  REQUIRES: start() before the index writer's thread runs, then that thread only.

    `note` is a file beside the disk tier; None where nothing outlives the process.  `obey` may raise OSError,
    CacheError or ConfigError: the wish then counts as not obeyed and is tried again with the next beat.
    """

    def __init__(self, namespace: str, model: str, obey: Obey, note: Path | None = None) -> None:
        self._namespace, self._model, self._obey, self._note = namespace, model, obey, note
        self._refused = Wish()
        self.obeyed = _read_note(note, namespace) if note else Wish()

    def start(self, url: str) -> None:
        """Pin again what was pinned, then obey what was said while this worker was down.  Never raises: a
        Redis that does not answer now is heard later."""
        if self.obeyed.pins:
            self._obey(self.obeyed, self.obeyed._replace(pins_version=0))
        if not url:
            return
        try:
            with redis_url.client(
                url, socket_timeout=START_SECONDS, socket_connect_timeout=START_SECONDS, protocol=2
            ) as client:
                wish = read(client, self._namespace)
            self._follow(wish)
        except (*redis_url.DOWN, OSError) as exc:
            log.warning("wishes made while this worker was down are read later: %s", type(exc).__name__)

    def words(self) -> dict[str, str]:
        """What the lease announces."""
        return {name: str(getattr(self.obeyed, name)) for name in NUMBERS}

    def ask(self, pipe: Pipeline) -> None:
        """Two commands for the beat's pipeline; their two answers are for hear().

        Counting the pins is also a use of them: a server that evicts what nobody reads keeps them.
        """
        wishes, pins = names_of(self._namespace)
        pipe.scard(pins)
        pipe.hmget(wishes, *NUMBERS, "model")

    def hear(self, client: redis.Redis, answers: Sequence[Any]) -> bool:
        """Obey what differs; True when there is something new to announce.  Raises what redis-py raises."""
        count, (*numbers, model) = answers
        found = Wish.of(numbers)
        if model is None:
            client.hset(names_of(self._namespace)[0], "model", self._model)
        mine = self.obeyed
        same = found.pins_version == mine.pins_version
        gone = same and count < len(mine.pins)
        if gone or found.pins_version < mine.pins_version or found.clear_epoch < mine.clear_epoch:
            self._tell_again(client)
        more = same and count > len(mine.pins)  # this worker read them while they were lost
        if found[:2] == mine[:2] and not more:
            return False
        wish = read(client, self._namespace)
        if wish == mine:  # more, and none of it a key
            self._tell_again(client)
        return self._follow(wish)

    def _follow(self, wish: Wish) -> bool:
        """Numbers only rise here: what a server that lost its memory says is not a wish."""
        mine = self.obeyed
        if wish.pins_version < mine.pins_version:
            wish = wish._replace(pins_version=mine.pins_version, pins=mine.pins)
        elif wish.pins_version == mine.pins_version:  # where they differ, one of the two lost some
            wish = wish._replace(pins=wish.pins | mine.pins)
        wish = wish._replace(clear_epoch=max(wish.clear_epoch, mine.clear_epoch))
        if wish == mine:
            return False
        try:
            self._obey(wish, mine if wish.pins == mine.pins else mine._replace(pins_version=0))
        except (OSError, CacheError, ConfigError) as exc:
            if wish != self._refused:  # said once, tried with every beat
                log.warning("a wish could not be obeyed and is tried again: %s", exc)
            self._refused = wish
            return False
        if wish.clear_epoch != mine.clear_epoch:
            log.info("cleared, as asked")
        if wish.pins != mine.pins:
            log.info("%d chunks are pinned, as asked", len(wish.pins))
        self.obeyed = wish
        if self._note:
            _write_note(self._note, self._namespace, wish)
        return True

    def _tell_again(self, client: redis.Redis) -> None:
        script = client.register_script((_LUA / "wishes_restore.lua").read_text())
        mine = self.obeyed
        keys = [key.hex() for key in mine.pins]
        script(names_of(self._namespace), [mine.pins_version, mine.clear_epoch, *keys])
        log.warning("redis had lost the wishes of this namespace; told again, with %d pins", len(keys))


def parse_key(text: str) -> ChunkKey | None:
    """A chunk key from 32 hex digits; None for anything else."""
    try:
        raw = bytes.fromhex(text) if len(text) == 2 * KEY_BYTES else b""
    except ValueError:
        return None
    return ChunkKey(raw) if len(raw) == KEY_BYTES else None


def _read_note(path: Path, namespace: str) -> Wish:
    """Nothing when there is no note, or it is another namespace's or damaged: everything is obeyed anew."""
    try:
        held = json.loads(path.read_text())
        if held["namespace"] != namespace:
            return Wish()
        return Wish.of([str(held[name]) for name in NUMBERS], held["pins"])
    except FileNotFoundError:
        return Wish()
    except (OSError, ValueError, TypeError, LookupError) as exc:
        log.warning("ignoring the note of wishes %s: %s", path, exc)
        return Wish()


def _write_note(path: Path, namespace: str, wish: Wish) -> None:
    """Replaced in one step.  Without it the wish is merely obeyed once more after a restart."""
    held: dict[str, Any] = {
        "namespace": namespace,
        **{name: getattr(wish, name) for name in NUMBERS},
        "pins": sorted(key.hex() for key in wish.pins),
    }
    scratch = path.with_suffix(".new")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(scratch, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
            json.dump(held, file, indent=1)
        os.replace(scratch, path)
    except OSError as exc:
        log.warning("no note of wishes at %s: %s", path, exc.strerror)


def model_of(client: redis.Redis, namespace: str) -> str:
    """Which model a namespace is of, as its workers said, alive or not; empty when nobody did."""
    held = cast("bytes | None", client.hget(names_of(namespace)[0], "model"))
    return held.decode() if held else ""
