"""A disk tier in fp8 on a real worker: chunks outlive it and answers stay sane.

bf16 and greedy; what the codec costs in probability is loadtests/bench_codecs.py's business, not this file's.
"""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests.texts import MANUAL

CHUNK = 256
SPLIT = ("--no-enable-prefix-caching", "--max-num-batched-tokens", str(CHUNK))
TOKENS = 4 * CHUNK + 40


def test_vllm_s_own_kernel_keeps_k_and_v_of_a_head_in_the_halves_we_code() -> None:
    probe = [sys.executable, "-m", "tests.engine.page_probe"]
    ran = subprocess.run(probe, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    assert len(ran.stdout.splitlines()) >= 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


def cache(folder: Path) -> dict[str, str | int]:
    """Room for seven raw chunks on disk, so that eight fit only in fp8; an arena of five."""
    return {
        "worker_id": "w", "host_bytes": 30 << 20, "disk_path": str(folder), "disk_bytes": 40 << 20,
        "disk_codec": "fp8",
    }  # fmt: skip


def test_more_chunks_than_fit_raw_outlive_the_worker_and_are_used_again(start, folder: Path) -> None:
    before = start("fp8", cache(folder), args=SPLIT).ready()
    ids = before.tokens(MANUAL[:40_000])
    at = random.Random(7).sample(range(0, len(ids) - TOKENS), 2)
    prompts = [ids[i : i + TOKENS] for i in at]
    answers = []
    for number, prompt in enumerate(prompts, 1):
        answers.append(before.complete(prompt, 16))
        before.settled("disk", 4 * number)
    assert before.metric("cairn_engine_saved_chunks_total", tier="disk") == 8
    before.kill()

    again = start("fp8 again", cache(folder), args=SPLIT).ready()
    assert "disk tier: 8 chunks found, 8 usable" in again.log.read_text(errors="replace")
    came_back = [again.complete(prompt, 16) for prompt in prompts]
    assert again.hits("disk") > 0
    assert again.metric("cairn_engine_bad_frames_total", tier="disk") == 0
    same = sum(new[0] == old[0] for new, old in zip(came_back, answers, strict=True))
    assert same, "fp8 KV should rarely change what a model says next"
