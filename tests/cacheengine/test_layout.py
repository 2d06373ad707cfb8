"""What a chunk's bytes mean, and whose weights made them."""

import pytest

from cacheengine.errors import LayoutMismatch
from cacheengine.layout import KVLayout, weights_fingerprint

FACTS = {"weights": "w", "rope": "r"}


def layout(**changed: object) -> KVLayout:
    fields = {
        "layers": 30, "block_tokens": 128, "block_bytes": 98_304, "chunk_tokens": 256, "dtype": "bfloat16",
        "name": "LBHNC/vec", "facts": FACTS, **changed,
    }  # fmt: skip
    return KVLayout(**fields)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 20))
    return tmp_path


@pytest.mark.parametrize("offset", [0, 100_000, 1 << 19, (1 << 20) - 1])
def test_one_changed_byte_anywhere_in_the_weights_is_another_model(folder, offset):
    before = weights_fingerprint(str(folder), None)
    with (folder / "model.safetensors").open("r+b") as f:
        f.seek(offset)
        f.write(b"x")
    assert weights_fingerprint(str(folder), None) != before


def test_equal_weights_at_another_path_are_the_same_model(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere")
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert weights_fingerprint(str(other), None) == weights_fingerprint(str(folder), None)


def test_a_branch_name_proves_nothing():
    assert weights_fingerprint("org/model", "c0ffee") == "org/model@c0ffee"
    with pytest.raises(LayoutMismatch, match="local folder"):
        weights_fingerprint("org/model", None)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 31}, {"block_bytes": 98_305}, {"chunk_tokens": 512}, {"dtype": "float32"},
        {"name": "LBHNC/amx"}, {"facts": {**FACTS, "rope": "s"}}, {"facts": {**FACTS, "new": ""}},
    ],
)  # fmt: skip
def test_whatever_changes_the_meaning_changes_the_namespace(change):
    assert layout(**change).scheme.namespace != layout().scheme.namespace


def test_a_chunk_is_whole_blocks():
    assert layout().payload_bytes == 30 * 2 * 98_304
    with pytest.raises(LayoutMismatch, match="multiple of vLLM's block size"):
        layout(chunk_tokens=200)
