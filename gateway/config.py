"""The gateway's knobs.  Loaded like every process's: defaults < file < CAIRN_* environment < flags."""

import re
import ssl
from ipaddress import ip_address
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cacheengine.config import Config, Positive
from router.policy import POLICIES
from router.sources import Dns, DnsName, Source, WorkersFile, parse_worker
from router.worker import StaticWorker

_ALIAS = re.compile(r"([^=]+)=([^=]+)")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _split(value: object) -> object:
    """`a,b` from an environment variable is a list."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _parse(text: str) -> StaticWorker | Source:
    """A worker, or where to look for some.  Raises ValueError as parse_worker() does."""
    if text.startswith("file:///"):
        return WorkersFile(text.removeprefix("file://"))
    worker = parse_worker(text)
    return Dns(worker) if isinstance(worker, DnsName) else worker


class GatewayConfig(Config):
    """Knobs of one gateway process."""

    host: str = Field(
        "127.0.0.1",
        description="Address to listen on. Beyond loopback, ask for keys (`auth`), and name an `admin_port`.",
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    auth: Literal["off", "keys"] = Field(
        "off",
        description="Whether callers need an API key (`cairn keys create`): with `keys`, limits, allow-lists "
        "and cache isolation are those of the key. Keys are kept in Redis, or in `keys_file`.",
    )
    keys_file: str = Field(
        "",
        description="A YAML or JSON file with the records of API keys, digests only, read again whenever it "
        "changes. Leave it alone with a Redis: limits are then shared by all gateways.",
    )
    admin_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port of the admin pages: on loopback, or with an admin_token on `host`. 0: on `port`, "
        "which is allowed on loopback only.",
    )
    admin_token: SecretStr = Field(
        SecretStr(""),
        description="What the admin pages ask for, as `Authorization: Bearer`. Put it in CAIRN_ADMIN_TOKEN, "
        "not in argv; empty: nothing, which is for loopback.",
    )
    processes: Annotated[int, Field(ge=1, le=32)] = Field(
        1,
        description="Processes that share the port, the load they cause and /metrics; bounds such as "
        "max_inflight are each one's. One carries some thousand requests a second: raise it where its core "
        "is busy.",
    )
    shutdown_grace_seconds: float = Field(
        30.0,
        ge=0,
        description="How long open answers may still take after SIGTERM, in seconds; a reload (SIGHUP) lets "
        "them finish. Keep it below the patience of whatever stops the gateway.",
    )
    tls_cert: str = Field(
        "", description="PEM file with the listener's certificate and its chain; empty: no TLS."
    )
    tls_key: str = Field("", description="PEM file with the key of tls_cert; empty: it is in the same file.")
    tls_client_ca: str = Field(
        "",
        description="PEM file with who signs callers' certificates; others are refused (mTLS).",
    )
    workers_ca: str = Field(
        "",
        description="PEM file with who signs certificates of workers with https URLs; empty: the system's.",
    )
    redis_url: str = Field(
        "",
        description="Redis or Valkey with the fleet registry and the chunk index (redis://, rediss://, "
        "unix://, redis-sentinel:// or redis-cluster://); empty: only `workers`, routed "
        "by load and consistent hashing. Put it in CAIRN_REDIS_URL, not in argv, when it holds a password.",
    )
    workers: Annotated[list[str], BeforeValidator(_split)] = Field(
        default_factory=list,
        description="Workers that do not register themselves, as `model=http://host:port`, or "
        "`model=dns://host:port` for every address of a name (of one family where it has both), asked again "
        "every 5 s, or `file:///path` for a YAML or JSON list of the first kind, read again whenever it "
        "changes (comma separated in the environment). Leave it alone when workers use Cairn's connector.",
    )
    aliases: Annotated[list[str], BeforeValidator(_split)] = Field(
        default_factory=list,
        description="Further names of models or adapters, as `alias=model`. Requests under an alias reach "
        "the worker under the model's name.",
    )
    warmup_seconds: float = Field(
        30.0,
        ge=0,
        description="How long a worker that joins takes only a rising share of the prompts it holds nothing "
        "of, in seconds; 0: all at once. Leave it alone unless first requests are slow for longer.",
    )
    cors_origins: Annotated[list[str], BeforeValidator(_split)] = Field(
        default_factory=list,
        description="Origins whose web pages may call the API from a browser, as `https://host` (comma "
        "separated in the environment), or `*`; never the admin pages. Leave it alone unless there are any.",
    )
    policy: str = Field(
        "predicted_ttft",
        description=f"How a worker is chosen: {', '.join(POLICIES)} "
        "(docs/operations.md says what each does). Leave it alone except to compare.",
    )
    shadow_policy: str = Field(
        "",
        description="A policy to score beside the real one without using it: see "
        "cairn_router_shadow_decisions_total. Costs a second scoring per request; empty: none.",
    )
    tokenizer_path: str = Field(
        "",
        description="Folder with tokenizer.json and the chat template; empty: the path each worker tells. "
        "Leave it alone unless the gateway sees the model under another path.",
    )
    max_body_bytes: ByteSize = Field(
        ByteSize(16 << 20),
        description="Longest request body in bytes; a longer one is answered 413. "
        "Raise it for pictures sent inline.",
    )
    max_inflight: Positive = Field(
        4096,
        description="Requests carried at once; beyond it 503 with Retry-After. Each keeps its body in RAM: "
        "lower it where max_body_bytes is raised.",
    )
    receive_timeout_seconds: float = Field(
        20.0,
        gt=0,
        description="Longest time for a request to arrive, in seconds, and one second more for every 16 KiB "
        "of it; later is answered 408. Leave it alone.",
    )
    max_retries: int = Field(
        1,
        ge=0,
        description="How many further workers may get a request that a worker dropped or refused before "
        "its first byte. Workers that could not be connected to do not count. Leave it alone: a request that "
        "kills workers kills this many more.",
    )
    connect_timeout_seconds: float = Field(
        2.0,
        gt=0,
        description="Longest TCP connect to a worker, in seconds. Leave it alone within one data centre.",
    )
    first_byte_timeout_seconds: float = Field(
        600.0,
        gt=0,
        description="Longest silence before a worker's first byte, in seconds: queueing, prefill and, "
        "without streaming, the whole answer. Raise it for long answers that are not streamed.",
    )
    idle_timeout_seconds: float = Field(
        120.0,
        gt=0,
        description="Longest pause in mid-answer, in seconds, whether the worker is silent or the "
        "client does not read. Leave it alone.",
    )
    total_timeout_seconds: float = Field(
        3600.0,
        gt=0,
        description="Longest life of a request once its body is read, waiting included, in seconds. "
        "Raise it for answers that are streamed for longer.",
    )
    max_queue: int = Field(
        1024,
        ge=0,
        description="Requests that may wait for room, of all models together; beyond it 503 with "
        "Retry-After. They count in max_inflight too. Leave it alone.",
    )
    queue_timeout_seconds: float = Field(
        60.0,
        gt=0,
        description="Longest wait for room, in seconds; longer is 503 with Retry-After. Keep it below your "
        "callers' own patience.",
    )
    worker_seats: int = Field(
        0,
        ge=0,
        description="Requests a worker gets at once, of each gateway process; more wait here, in order of "
        "priority and fair share. 0: its max_num_seqs and an eighth more where it tells (Cairn's connector "
        "does), else 1024. Set it for workers without the connector whose max_num_seqs is smaller.",
    )
    keepalive_seconds: float = Field(
        15.0,
        ge=0,
        description="Time between comments in a stream that has not begun, in seconds, so that no proxy cuts "
        "it for silence; 0: none. The first one settles status 200: later refusals are events. Keep it below "
        "the read timeout of what is in front.",
    )
    wedge_seconds: float = Field(
        60.0,
        ge=0,
        description="How long a worker may run requests without computing a token, in seconds, before it "
        "gets no more of them; 0: for ever. Raise it where a single step of the engine takes longer.",
    )
    index_deadline_ms: float = Field(
        2.0,
        gt=0,
        description="Longest wait for the chunk index, in milliseconds; later is routed by hashing. "
        "Leave it alone unless Redis is more than a switch away.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="Least severe line that is logged. `info` has one for each request when it is over; "
        "`warning` where spans or metrics suffice and the log is paid by volume.",
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="How lines of the log are written. `json` where a collector parses them."
    )

    @model_validator(mode="after")
    def _safe(self) -> Self:
        if self.auth == "keys" and not (self.redis_url or self.keys_file):
            raise ValueError("auth=keys needs redis_url, or a keys_file, to find the keys in")
        if not self.admin_port and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached from elsewhere, and so could the admin pages: give them an "
                "admin_port of their own (CAIRN_ADMIN_PORT; it is on loopback unless there is an admin_token)"
            )
        if self.admin_port and self.admin_port == self.port:
            raise ValueError("admin_port and port must differ")
        return self

    @property
    def admin_host(self) -> str:
        """Where the admin pages are, when they have a port of their own."""
        return self.host if self.admin_token.get_secret_value() else "127.0.0.1"

    @property
    def api(self) -> dict[str, Any] | None:
        """Where the API is, for admin pages on a port of their own; host "": where they are."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        here = self.host in ("0.0.0.0", "::")
        return {"host": "" if here else host, "port": self.port} if self.admin_port and self.port else None

    @field_validator("workers")
    @classmethod
    def _name_a_model(cls, workers: list[str]) -> list[str]:
        for worker in workers:
            _parse(worker)
        return workers

    @field_validator("tls_key", "tls_client_ca")
    @classmethod
    def _needs_a_certificate(cls, path: str, info: ValidationInfo) -> str:
        if path and not info.data.get("tls_cert"):
            raise ValueError("it needs tls_cert beside it")
        return path

    @field_validator("aliases")
    @classmethod
    def _name_two(cls, aliases: list[str]) -> list[str]:
        for alias in aliases:
            if not _ALIAS.fullmatch(alias):
                raise ValueError(f"{alias!r} should read alias=model")
        return aliases

    @field_validator("policy", "shadow_policy")
    @classmethod
    def _is_a_policy(cls, policy: str, info: ValidationInfo) -> str:
        if policy not in POLICIES and (policy or info.field_name == "policy"):
            raise ValueError(f"{policy!r} is none of {', '.join(POLICIES)}")
        return policy

    def static_workers(self) -> list[StaticWorker]:
        """Those of `workers` that have an address."""
        return [worker for worker in map(_parse, self.workers) if isinstance(worker, StaticWorker)]

    def sources(self) -> list[Source]:
        """Where else workers are looked for."""
        return [source for source in map(_parse, self.workers) if not isinstance(source, StaticWorker)]

    def tls(self) -> dict[str, Any]:
        """Of listeners, as uvicorn names its settings; nothing without a certificate."""
        if not self.tls_cert:
            return {}
        return {
            "ssl_certfile": self.tls_cert,
            "ssl_keyfile": self.tls_key or None,
            "ssl_ca_certs": self.tls_client_ca or None,
            "ssl_cert_reqs": ssl.CERT_REQUIRED if self.tls_client_ca else ssl.CERT_NONE,
        }

    def alias_map(self) -> dict[str, str]:
        """Alias → model."""
        return dict(alias.split("=") for alias in self.aliases)
