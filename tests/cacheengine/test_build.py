import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cacheengine.build import CSRC, build_cpu, build_cuda
from cacheengine.config import ConfigError

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CSRC, tmp_path / "csrc"))


def test_a_second_build_has_nothing_to_do(tmp_path: Path) -> None:
    library = tmp_path / "kv.so"
    assert build_cpu(library) is True
    first = library.stat().st_mtime_ns
    assert build_cpu(library) is False
    assert library.stat().st_mtime_ns == first


@pytest.mark.parametrize("source", ["kv_cpu.cpp", "kv_batch.h", "kv_codec.cpp", "kv_codec.h"])
def test_a_changed_source_is_built_again(tmp_path: Path, csrc: Path, source: str) -> None:
    library = tmp_path / "kv.so"
    assert build_cpu(library, csrc) is True
    with (csrc / source).open("a") as file:
        file.write("\n// changed\n")
    assert build_cpu(library, csrc) is True
    assert build_cpu(library, csrc) is False


def test_a_failed_build_names_the_source_and_leaves_the_old_library(tmp_path: Path, csrc: Path) -> None:
    library = tmp_path / "kv.so"
    build_cpu(library, csrc)
    before = library.read_bytes()
    (csrc / "kv_cpu.cpp").write_text("this is not C++\n")
    with pytest.raises(ConfigError, match=r"could not build kv_cpu\.cpp"):
        build_cpu(library, csrc)
    assert library.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["csrc", "kv.so"]


def test_missing_sources_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="build from a checkout"):
        build_cpu(tmp_path / "kv.so", tmp_path / "nowhere")


def test_without_a_compiler_the_command_says_what_to_install() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "cacheengine.build"],
        cwd=REPO,
        env={"PATH": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.startswith("error: no C++ compiler")
    assert ran.stderr.count("\n") == 1  # one sentence


def test_cuda_is_built_where_there_is_nvcc_and_skipped_where_not(tmp_path: Path) -> None:
    library = tmp_path / "cuda.so"
    if shutil.which("nvcc") is None:
        assert build_cuda(library) is None
        assert not library.exists()
    else:
        assert build_cuda(library) is True
        assert build_cuda(library) is False
