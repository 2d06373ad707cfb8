"""Builds the native ops:  python -m cacheengine.build

    csrc/kv_cpu.cpp  kv_codec.cpp  --c++-->   cacheengine/_kvops.so
    csrc/kv_cuda.cu  kv_codec.cu   --nvcc-->  cacheengine/_kvops_cuda.so    (only where nvcc is installed)

Each library carries the hash of its sources and its command line in its own bytes, so a second run builds
nothing and a changed source is never missed.  Libraries are replaced atomically: a worker that starts during
a build loads the old one or the new one.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cacheengine.config import ConfigError

PACKAGE = Path(__file__).resolve().parent
CSRC = PACKAGE.parent / "csrc"
CPU_LIBRARY = PACKAGE / "_kvops.so"
CUDA_LIBRARY = PACKAGE / "_kvops_cuda.so"

COMPILERS = ("g++", "clang++", "c++")
# No -march: the copy loop is memory bound and SSE2, which every x86-64 has, reaches the limit; the codecs
# choose at run time.  Nobody reads floating-point exception flags, and keeping them would forbid vectors.
CPU_FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Werror"),
)
CUDA_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC,-Wall,-Wextra"),
    *("-gencode", "arch=compute_80,code=sm_80"),  # A100
    *("-gencode", "arch=compute_90,code=sm_90"),  # H100
    *("-gencode", "arch=compute_90,code=compute_90"),  # PTX for whatever comes later
)


def compiler(find: Callable[[str], str | None] = shutil.which) -> str:
    """Path of a C++ compiler, empty when there is none."""
    return next(filter(None, map(find, COMPILERS)), "")


def load_library(path: Path) -> ctypes.CDLL:
    """Calls into it do not hold the interpreter lock.  Raises ConfigError when it is not built."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        raise ConfigError(f"{path.name} is not built: run `python -m cacheengine.build`") from None


def build_cpu(library: Path = CPU_LIBRARY, csrc: Path = CSRC) -> bool:
    """Build the CPU ops; True when something was built, False when the library was current.

    Raises ConfigError without a C++ compiler, without sources, or when the compiler refuses.
    """
    path = compiler()
    if not path:
        raise ConfigError(
            f"no C++ compiler ({', '.join(COMPILERS)}) in PATH: install one, e.g. apt-get install g++"
        )
    sources = [csrc / "kv_cpu.cpp", csrc / "kv_codec.cpp"]
    return _build(library, [path, *CPU_FLAGS], sources, [csrc / "kv_batch.h", csrc / "kv_codec.h"])


def build_cuda(library: Path = CUDA_LIBRARY) -> bool | None:
    """Build the CUDA ops for sm_80, sm_90 and PTX; None where there is no nvcc.  Raises as build_cpu()."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    headers = [CSRC / name for name in ("kv_batch.h", "kv_kernels.cuh", "kv_codec.h", "kv_codec.cuh")]
    sources = [CSRC / "kv_cuda.cu", CSRC / "kv_codec.cu"]
    return _build(library, [nvcc, *CUDA_FLAGS], sources, headers)


def _build(library: Path, command: Sequence[str], sources: Sequence[Path], headers: Sequence[Path]) -> bool:
    try:
        text = b"\0".join(path.read_bytes() for path in (*sources, *headers))
    except FileNotFoundError as exc:
        raise ConfigError(
            f"no native sources at {exc.filename}: build from a checkout of the project"
        ) from None
    mark = "cairn-build:" + hashlib.sha256(repr(command).encode() + text).hexdigest()
    if library.exists() and mark.encode() in library.read_bytes():
        return False
    fresh = library.with_name(f".{library.name}.{os.getpid()}")
    define = f'-DKV_BUILD_MARK="{mark}"'
    try:
        ran = subprocess.run(
            [*command, define, *map(str, sources), "-o", str(fresh)], capture_output=True, text=True
        )
        if ran.returncode:
            names = " ".join(source.name for source in sources)
            raise ConfigError(f"{Path(command[0]).name} could not build {names}:\n{ran.stderr.strip()}")
        fresh.replace(library)
    finally:
        fresh.unlink(missing_ok=True)
    return True


def main() -> int:
    """0 when every library this machine can build is there and current."""
    try:
        results = {CPU_LIBRARY: build_cpu(), CUDA_LIBRARY: build_cuda()}
    except ConfigError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    words = {True: "built", False: "current", None: "skipped (no nvcc)"}
    for library, built in results.items():
        sys.stdout.write(f"{library.name}: {words[built]}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
