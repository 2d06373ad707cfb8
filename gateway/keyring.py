"""API keys: what a key may do, where its record is kept, and the set of them a gateway knows.

A key is `cairn-` and 256 random bits in base64url.  It is shown once and stored nowhere: records are found by
its SHA-256, and what is random through and through needs no slow hash.  A key's limits are its own; the month
is its tenant's, so that replacing a key does not start it anew.

    cairn:keys    HASH   field <SHA-256, hex>, value a JSON record; fields secret and @version

or, without a Redis, the same records in a YAML or JSON file: `{secret: <hex>, keys: [<record>, ...]}`.
"""

import asyncio
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import yaml

from cacheengine.errors import IndexDown
from cacheengine.index_orders import Orders

log = logging.getLogger(__name__)

KEYS = "cairn:keys"
SECRET = "secret"  # what salts of isolated tenants are made with; of the deployment, made with its first key
PREFIX = "cairn-"
POLL_SECONDS = 1.0
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY_BYTES = 32
_MOST = 10**12  # what Redis, Lua and JSON all count exactly


class Key(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One API key's record.  0 is "no limit" everywhere."""

    id: str
    tenant: str
    digest: str = ""  # SHA-256 of the key, hex
    created: int = 0  # Unix seconds
    expires: int = 0  # Unix seconds; 0: never
    models: tuple[str, ...] = ()  # served names or aliases; empty: all
    rpm: int = 0  # requests a minute
    tpm: int = 0  # tokens a minute, prompt and completion
    concurrency: int = 0  # requests at once
    tokens_per_month: int = 0  # of the tenant, by UTC calendar months
    priority: int = 0  # lower goes first, as vLLM has it
    weight: float = 1.0  # of the tenant, among those of its priority
    isolate: bool = False  # shares cached prompts with nobody but its own tenant

    def __post_init__(self) -> None:
        if not _TENANT.fullmatch(self.tenant):
            raise ValueError("a tenant's name is up to 64 letters, digits, dots, dashes and underscores")
        if min(self.rpm, self.tpm, self.concurrency, self.tokens_per_month, self.expires) < 0:
            raise ValueError("a limit cannot be negative")
        if max(self.rpm, self.tpm, self.concurrency, self.tokens_per_month) > _MOST:
            raise ValueError("a limit is at most 10^12; 0 is none")
        if not 0 < self.weight <= _MOST:
            raise ValueError("a weight must be above 0, and at most 10^12")

    @property
    def name(self) -> str:
        """The tenant's; "" for everybody together."""
        return self.tenant if self.id else ""

    def may_use(self, *names: str | None) -> bool:
        """A model under any of these names."""
        return not self.models or any(name in self.models for name in names)

    def expired(self, now: float) -> bool:
        return 0 < self.expires <= now


ANONYMOUS = Key(id="", tenant="anonymous")  # everybody, where keys are not asked for


def new_key() -> tuple[str, str]:
    """A key and its digest."""
    key = PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    return key, digest_of(key.encode())


def digest_of(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


class KeysDown(Exception):
    """The records cannot be read now.  The text holds no secret."""


class Store(Protocol):
    """Where records are kept."""

    async def read(self) -> Mapping[str, str]:
        """Digest → JSON record, and SECRET.  The same object while nothing has changed.  Raises KeysDown."""

    async def put(self, field: str, record: str) -> None:
        """`record` "" removes it.  Raises KeysDown."""

    async def close(self) -> None: ...


class RedisKeys:
    """REQUIRES: used from one event loop.  A Redis that lost its memory is told again by any gateway that
    remembers, as with orders about workers."""

    def __init__(self, url: str) -> None:
        self._hash = Orders(url, KEYS)
        self._seen: Mapping[str, str] | None = None

    async def read(self) -> Mapping[str, str]:
        try:
            if self._seen is None or await self._hash.changed():
                self._seen = await self._hash.read()
        except IndexDown as exc:
            raise KeysDown(f"Redis does not answer ({type(exc.__cause__).__name__})") from exc
        return self._seen

    async def put(self, field: str, record: str) -> None:
        try:
            await self._hash.give(field, record)
        except IndexDown as exc:
            raise KeysDown(f"Redis does not answer ({type(exc.__cause__).__name__})") from exc

    async def close(self) -> None:
        await self._hash.close()


class FileKeys:
    """Read again whenever it changes; replaced in one step, readable by its owner only."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._stat: tuple[int, int, int] | None = None
        self._seen: Mapping[str, str] = {}

    @property
    def there(self) -> bool:
        return self._path.exists()

    async def read(self) -> Mapping[str, str]:
        return await asyncio.to_thread(self._read)

    async def put(self, field: str, record: str) -> None:
        await asyncio.to_thread(self._put, field, record)

    async def close(self) -> None:
        return

    def _read(self) -> Mapping[str, str]:
        try:
            stat = self._path.stat()
            now = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if now != self._stat:
                self._seen = _listed(yaml.safe_load(self._path.read_text(encoding="utf-8")))
                self._stat = now
        except (OSError, UnicodeError) as exc:
            raise KeysDown(f"{self._path} cannot be read ({type(exc).__name__})") from exc
        except (ValueError, TypeError, LookupError, RecursionError, yaml.YAMLError) as exc:
            # the text may quote a secret
            raise KeysDown(f"{self._path} should read {{secret: ..., keys: [...]}}") from exc
        return self._seen

    def _put(self, field: str, record: str) -> None:
        scratch, guard = (self._path.with_name(f".{self._path.name}.{end}") for end in (os.getpid(), "lock"))
        try:
            with os.fdopen(os.open(guard, os.O_CREAT | os.O_RDWR, 0o600)) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # a file of its own: the other is replaced
                held = dict(self._read()) if self.there else {}
                if field != SECRET or not held.get(SECRET):  # else somebody was faster
                    held[field] = record
                keys = [msgspec.json.decode(text) for name, text in held.items() if name != SECRET and text]
                text = yaml.safe_dump({"secret": held.get(SECRET, ""), "keys": keys}, sort_keys=False)
                with os.fdopen(os.open(scratch, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
                    file.write(text)
                os.rename(scratch, self._path)
        except OSError as exc:
            raise KeysDown(f"{self._path} cannot be written ({type(exc).__name__})") from exc


def _listed(document: Any) -> Mapping[str, str]:
    """Raises ValueError, TypeError."""
    if not isinstance(document, dict) or not isinstance(document.get("keys"), list):
        raise ValueError("no list of keys")  # also a file seen half written
    found = {str(record["digest"]): msgspec.json.encode(record).decode() for record in document["keys"]}
    return found | {SECRET: str(document.get("secret") or "")}


class Keyring:
    """The keys a gateway knows.  What was read last holds while the store is away: nobody is locked out, and
    nobody who was put out comes back.  REQUIRES: used from one event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: Mapping[str, str] | None = None
        self._keys: dict[str, Key] = {}
        self._secret = secrets.token_bytes(_KEY_BYTES)  # until the deployment's is known
        self._trouble = ""

    @property
    def known(self) -> bool:
        """Whether the records have ever been read."""
        return self._seen is not None

    @property
    def ids(self) -> set[str]:
        return {key.id for key in self._keys.values()}

    @property
    def tenants(self) -> set[str]:
        return {key.tenant for key in self._keys.values()}

    def find(self, said: bytes) -> Key | None:
        """The record of what a caller sent; None when there is none, or it has expired."""
        digest = digest_of(said)
        key = self._keys.get(digest)
        if key is None or not hmac.compare_digest(key.digest, digest) or key.expired(time.time()):
            return None
        return key

    def salt(self, tenant: str, theirs: str) -> str:
        """A cache salt nobody else can name: of the tenant, and of its own `theirs` within that."""
        said = tenant.encode() + b"\0" + theirs.encode("utf-8", "surrogatepass")
        return hmac.digest(self._secret, said, "sha256").hex()

    async def refresh(self) -> bool:
        """Read what has changed; whether something has.  Never raises."""
        try:
            held = await self._store.read()
        except KeysDown as exc:
            if str(exc) != self._trouble:  # once, not every second
                log.warning("keeping the API keys read before: %s", exc)
            self._trouble = str(exc)
            return False
        self._trouble = ""
        if held is self._seen:
            return False
        self._seen, self._keys = held, records(held)
        if secret := held.get(SECRET):
            self._secret = secret.encode()
        return True

    async def run(self, changed: Callable[[], None]) -> None:
        """Read again and again; `changed` hears of it when there is something new."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if await self.refresh():
                changed()

    async def close(self) -> None:
        """Idempotent."""
        await self._store.close()


def records(held: Mapping[str, str]) -> dict[str, Key]:
    """Those that can be read, by digest; the others are named in the log by their place."""
    keys: dict[str, Key] = {}
    for place, (digest, text) in enumerate(held.items(), 1):
        if digest == SECRET:
            continue
        try:
            keys[digest] = msgspec.structs.replace(msgspec.json.decode(text, type=Key), digest=digest)
        except (msgspec.MsgspecError, ValueError):
            log.warning("API key record %d of %d cannot be read and is ignored", place, len(held))
    return keys
