"""Preflight: what would make `cairn up` fail slowly, said at once and in one sentence.

Every check is a question answered from facts of the machine; the facts are read here and nowhere else.
"""

import shutil
import socket
from collections.abc import Iterable
from pathlib import Path

from cacheengine.build import CPU_LIBRARY, compiler
from cacheengine.config import ConfigError
from cacheengine.redis_url import DOWN, client
from gateway.launch.config import LaunchConfig
from gateway.launch.errors import LaunchError

GIB = 1 << 30
WORKER_BYTES = 3 * GIB  # one vLLM CPU worker with 1 GiB of KV cache: processes, weights, workspaces
_LISTEN = "0A"
_LAST_PORT = 65535


def preflight(config: LaunchConfig) -> None:
    """Raises LaunchError for the first thing that stands in the way."""
    if (last := max(config.worker_ports)) > _LAST_PORT:
        raise LaunchError(
            f"the workers would need ports up to {last}, and there are none above {_LAST_PORT}; "
            "choose a lower PORT"
        )
    for port in (config.port, *config.worker_ports):
        if not port_is_free(port):
            raise LaunchError(port_sentence(port, port_owner(port)))
    if sentence := memory_sentence(config, available_memory()):
        raise LaunchError(sentence)
    if sentence := native_sentence(CPU_LIBRARY.exists(), compiler()):
        raise LaunchError(sentence)
    if sentence := disk_sentence(config, disk_free(config.root)):
        raise LaunchError(sentence)


def port_is_free(port: int) -> bool:
    """Nobody listens on loopback or on every address."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def port_sentence(port: int, pid: int | None) -> str:
    owner = f" by process {pid} ({process_name(pid)})" if pid else ""
    return f"port {port} is in use{owner}; stop it or choose another with PORT={port + 100}"


def port_owner(port: int, proc: Path = Path("/proc")) -> int | None:
    """The pid that listens on `port`, where the kernel lets us see it."""
    inodes = {inode for table in ("tcp", "tcp6") for inode in _listening(proc / "net" / table, port)}
    if not inodes:
        return None
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for folder in proc.glob("[0-9]*"):
        try:
            if any(str(link.readlink()) in wanted for link in (folder / "fd").iterdir()):
                return int(folder.name)
        except OSError:  # it ended, or is not ours to read
            continue
    return None


def _listening(table: Path, port: int) -> Iterable[str]:
    try:
        rows = table.read_text().splitlines()[1:]
    except OSError:
        return
    for row in rows:
        cells = row.split()
        if cells[3] == _LISTEN and int(cells[1].rpartition(":")[2], 16) == port:
            yield cells[9]


def process_name(pid: int) -> str:
    """What it was started as, shortened; empty when it is gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return " ".join(Path(word.decode(errors="replace")).name for word in words[:3] if word)[:60]


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that can be used without swapping; None where the system does not say."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def needed_memory(config: LaunchConfig) -> int:
    """Estimate for the whole stack, in bytes."""
    worker = WORKER_BYTES + int(config.host_bytes)
    valkey = 0 if config.redis_url else int(config.redis_bytes)
    return config.worker_count * worker + valkey


def memory_sentence(config: LaunchConfig, available: int | None) -> str:
    """Empty when the estimate fits, or nothing is known."""
    needed = needed_memory(config)
    if available is None or needed <= available:
        return ""
    return (
        f"{config.worker_count} worker(s) need about {needed / GIB:.0f} GiB of memory and "
        f"{available / GIB:.1f} GiB are available; use fewer WORKERS, or UP_ARGS='--host-bytes 512MiB'"
    )


def native_sentence(built: bool, compiler_path: str) -> str:
    """vLLM's CPU backend compiles at start, and the cache's copy loops are C++."""
    if compiler_path and built:
        return ""
    if not compiler_path:
        return "no C++ compiler found; install g++ (Debian: apt-get install g++, Fedora: dnf install gcc-c++)"
    return "the native copy loops are not built; run `make install` (or python -m cacheengine.build)"


def disk_free(path: Path) -> int:
    """Free bytes on the file system that holds `path`, which need not exist yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def disk_sentence(config: LaunchConfig, free: int) -> str:
    """The disk tier is preallocated: better to know now.  Files of an earlier run are counted as free."""
    if not config.disk_bytes:
        return ""
    needed = config.worker_count * int(config.disk_bytes) - _already_there(config.root / "disk")
    if needed <= free:
        return ""
    return (
        f"the disk tiers need {needed / GIB:.1f} GiB under {config.root} and {free / GIB:.1f} GiB are free; "
        "make it smaller (UP_ARGS='--disk-bytes 1GiB') or leave it out (UP_ARGS=--no-disk)"
    )


def _already_there(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.glob("*/*") if path.is_file())


def redis_sentence(url: str) -> str:
    """Why an outside Redis cannot be used; empty when it answers.

    The URL may hold a password: it is not repeated.
    """
    try:
        with client(url, socket_timeout=2.0, socket_connect_timeout=2.0) as server:
            server.ping()
    except ConfigError as exc:
        return f"{exc}; set REDIS_URL to redis://host:6379/0, for example (a password: percent-encoded)"
    except DOWN as exc:
        return (
            f"the Redis at REDIS_URL does not answer ({type(exc).__name__}); start it or leave REDIS_URL out"
        )
    return ""
