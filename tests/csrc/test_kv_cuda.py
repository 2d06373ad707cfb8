"""What nvcc makes of the CUDA sources.  Needs no GPU; says loudly what it could not check."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cacheengine import ops
from cacheengine.build import build_cuda
from tests.csrc.moves import CHUNKS, SHAPES, Cache, Shape, Slots, assert_same_bytes, scatter_ref, sizes

ARCHITECTURES = ["sm_80", "sm_90"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuda") / "kv_cuda.so"
    if build_cuda(path) is None:
        pytest.skip("LOUD: no nvcc here, THE CUDA BUILD IS NOT CHECKED")
    return path


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    beside_triton = importlib.util.find_spec("triton")
    folders = beside_triton.submodule_search_locations if beside_triton else None
    bundled = f"{folders[0]}/backends/nvidia/bin" if folders else ""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=bundled)
    if found is None:
        pytest.skip("LOUD: no cuobjdump in PATH or in triton, VECTOR WIDTH AND SPILLS ARE NOT CHECKED")
    return found


def dump(cuobjdump: str, library: Path, architecture: str, what: str) -> str:
    command = [cuobjdump, what, "-arch", architecture, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_kernels_move_128_bits_a_time_and_never_spill(
    library: Path, cuobjdump: str, architecture: str
) -> None:
    sass = dump(cuobjdump, library, architecture, "-sass")
    kernels = [text for text in sass.split("Function : ")[1:] if "move_blocks" in text.splitlines()[0]]
    assert len(kernels) == 2
    for kernel in kernels:
        assert len(re.findall(r"\bLDG\.\S*128", kernel)) >= 4  # the loads in flight are really unrolled
        assert len(re.findall(r"\bSTG\.\S*128", kernel)) >= 4
        assert not re.findall(r"\b(?:LDL|STL)\b", kernel), "a register spilled to local memory"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_codec_kernels_read_and_write_128_bits_a_time_and_never_spill(
    library: Path, cuobjdump: str, architecture: str
) -> None:
    """Sixteen elements a thread: two loads of 16-bit values, four of float32; one store of bytes."""
    sass = dump(cuobjdump, library, architecture, "-sass")
    kernels = {text.split("\n")[0].strip(): text for text in re.split(r"Function : ", sass)[1:]}
    for kind, words in (("Ll0", 2), ("Ll1", 2), ("Ll2", 4)):
        for verb, loads, stores in (
            ("find_amax", words, 0), ("encode_pages", words, words + 1), ("decode_pages", words + 1, words)
        ):  # fmt: skip
            (text,) = (t for name, t in kernels.items() if verb in name and kind in name)
            assert len(re.findall(r"\bLDG\.\S*128", text)) == loads, (verb, kind)
            assert len(re.findall(r"\bSTG\.\S*128", text)) == stores, (verb, kind)
            assert not re.findall(r"\b(?:LDL|STL)\b", text), "a register spilled to local memory"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_leave_room_for_full_occupancy(library: Path, cuobjdump: str, architecture: str) -> None:
    usage = dump(cuobjdump, library, architecture, "-res-usage")
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    assert len(kernels) == 12
    for name, registers, stack, local in kernels:
        # 65,536 registers hold 2,048 threads of 32; the codecs compute, and are content with 1,536 of 40
        assert int(registers) <= (32 if "move_blocks" in name else 40), name
        assert (stack, local) == ("0", "0")


def test_the_library_carries_ptx_for_newer_gpus(library: Path, cuobjdump: str) -> None:
    listed = subprocess.run([cuobjdump, "-lptx", str(library)], capture_output=True, text=True, check=True)
    assert "sm_90.ptx" in listed.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_a_launch_is_an_error_and_not_a_crash(library: Path) -> None:
    cache, slots = Cache(SHAPES[0]), Slots(sizes(4, 3 * 128 * 128 * 2, CHUNKS))
    words = ops.batch_words(ops.Paged.of(cache.tensors), CHUNKS, slots.addresses)
    launch = ctypes.CDLL(str(library)).kv_cuda_gather
    launch.restype = ctypes.c_int64
    at = ctypes.c_void_p(words.buffer_info()[0])
    with pytest.raises(RuntimeError, match="CUDA error"):
        ops.raise_for(launch(at, at, ctypes.c_int64(len(words)), None), CHUNKS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="LOUD: no GPU, CUDA OPS RAN ONLY AS HOST CODE")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu_chunks_go_out_and_come_back(shape: Shape, library: Path) -> None:
    cache, blank = Cache(shape, "cuda"), Cache(shape, "cuda")
    blank.raw.fill_(0xA5)
    expected = blank.twin(shape)
    paged = ops.Paged.of(cache.tensors)
    slots = Slots(sizes(shape.layers, paged.block_bytes, CHUNKS), pinned=True)
    ops.gather(paged, CHUNKS, slots.addresses)
    ops.scatter(ops.Paged.of(blank.tensors), CHUNKS, slots.addresses)
    torch.cuda.synchronize()
    scatter_ref(expected.tensors, CHUNKS, [slot.cuda() for slot in slots.slots])
    assert_same_bytes(blank.raw, expected.raw)
