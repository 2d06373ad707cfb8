"""What `cairn up` may be told, and where it keeps its things."""

import os
from pathlib import Path

from pydantic import ByteSize, Field, SecretStr

from cacheengine.config import CONFIG_FILE_ENV, Config, ConfigError, Positive
from gateway.launch.errors import LaunchError

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


class LaunchConfig(Config):
    """Knobs of `cairn up`.  defaults < YAML file < CAIRN_* environment < flags."""

    home: Path = Field(
        Path("~/.cache/cairn"),
        description="Directory for models, disk tiers, logs and run files. "
        "Leave it alone unless the home file system is small or slow.",
    )
    model: str = Field(
        DEFAULT_MODEL,
        description="A directory with config.json and safetensors, a Hugging Face id, or the bundled one.",
    )
    served_model_name: str = Field(
        "",
        description="The name clients send as `model`. Empty: the directory's name, or the Hugging Face id.",
    )
    worker_count: Positive = Field(
        2,
        description="vLLM workers to start; each wants a core and 4 GiB. One has nothing to route.",
    )
    port: Positive = Field(
        8000, description="Port of the gateway on loopback; workers use the ports that follow it."
    )
    admin_port: int = Field(
        0, ge=0, le=65535, description="Port of the gateway's admin pages; 0: they are on `port`."
    )
    admin_token: SecretStr = Field(
        SecretStr(""),
        description="What the gateway's admin pages ask for; `cairn status` and `doctor` show it. Put it in "
        "CAIRN_ADMIN_TOKEN, not in argv.",
    )
    redis_url: str = Field(
        "", description="An outside Redis or Valkey (a URL as for redis_url); empty starts a bundled Valkey."
    )
    redis_bytes: ByteSize = Field(
        ByteSize(1 << 30),
        description="Memory limit of the bundled Valkey, in bytes. Not used with an outside Redis.",
    )
    chunk_tokens: Positive = Field(
        128,
        description="Tokens in a chunk. 128 is one block of vLLM on the CPU, so a repeat recomputes no more "
        "than after a hit in vLLM's own cache. Leave it alone: all workers must agree.",
    )
    host_bytes: ByteSize = Field(
        ByteSize(1 << 30), description="Host memory tier of each worker, in bytes (512MiB, 2GiB …)."
    )
    disk_bytes: ByteSize = Field(
        ByteSize(4 << 30), description="Disk tier of each worker, preallocated, in bytes; 0 turns it off."
    )
    dtype: str = Field(
        "auto", description="vLLM's --dtype. `auto` is the model's own; float32 makes greedy output exact."
    )
    max_model_len: Positive = Field(
        8192, description="Longest context in tokens; the model's own limit applies when it is shorter."
    )

    @property
    def root(self) -> Path:
        """`home`, absolute."""
        return self.home.expanduser().absolute()

    @property
    def url(self) -> str:
        """Where the gateway answers."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def admin_url(self) -> str:
        """Where its admin pages are; "" where they are at `url`."""
        return f"http://127.0.0.1:{self.admin_port}" if self.admin_port else ""

    @property
    def worker_ports(self) -> tuple[int, ...]:
        """One port per worker, right after the gateway's."""
        return tuple(range(self.port + 1, self.port + 1 + self.worker_count))


def load_settings(file: str | None = None, **flags: str | int | None) -> LaunchConfig:
    """Of this process.  CAIRN_CONFIG is read by `up` alone, which names it as `file`: elsewhere it may be
    another process's.  Raises LaunchError."""
    env = {name: value for name, value in os.environ.items() if name != CONFIG_FILE_ENV}
    try:
        return LaunchConfig.load(file, env, **flags)
    except ConfigError as exc:
        raise LaunchError(str(exc)) from None
