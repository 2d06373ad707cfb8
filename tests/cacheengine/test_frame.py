"""docs/format.md, executable."""

import random
import re
from pathlib import Path

import pytest

from cacheengine import frame
from cacheengine.errors import BadFrame
from cacheengine.frame import FrameInfo, OtherCodec
from cacheengine.keys import ChunkKey, KeyScheme, Namespace

NAMESPACE = Namespace(bytes(range(16)))
SCHEME = KeyScheme(NAMESPACE, 16)
ROOT, KEY = SCHEME.keys(range(32))
PAYLOAD = bytes(range(256)) * 2
FORMAT = Path(__file__).parents[2] / "docs" / "format.md"


def header(payload: bytes = PAYLOAD, parent: bytes = ROOT, root: bytes = ROOT) -> bytes:
    return frame.pack(NAMESPACE, KEY, parent, root, payload, 16, 1, 2)


def parse(raw: bytes, key: ChunkKey | None = KEY, namespace: Namespace = NAMESPACE) -> FrameInfo:
    return frame.parse(raw, namespace, key, len(PAYLOAD), 1, 2)


def resealed(raw: bytes, at: int, value: bytes) -> bytes:
    """A header with other bytes at an offset and a checksum that fits them: a liar, not an accident."""
    body = (raw[:at] + value + raw[at + len(value) :])[:120]
    return body + frame.xxh3_64_intdigest(body).to_bytes(8, "little")


def test_what_was_packed_is_parsed_back():
    info = parse(header())
    assert info == FrameInfo(NAMESPACE, KEY, ROOT, ROOT, "raw", 16, 1, 2, len(PAYLOAD), info.checksum)
    frame.verify(info, PAYLOAD)


def test_a_header_is_128_bytes_and_says_its_checksum_again():
    assert len(header()) == frame.HEADER_BYTES == 128
    assert frame.payload_checksum(header()) == parse(header()).checksum


def test_a_chunk_without_parent_and_root_says_so():
    info = parse(header(parent=b"", root=b""))
    assert (info.parent, info.root) == (b"", b"")


def test_a_scan_takes_any_key():
    assert parse(header(), key=None).key == KEY


def test_the_worked_example_in_the_documentation_is_what_the_code_writes():
    hexdump = re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} ?)+)", FORMAT.read_text(), re.MULTILINE)
    assert bytes.fromhex("".join(hexdump)) == header()


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, b"PK", "no magic"),
        (4, b"\x02", "version 2"),
        (6, b"\x40", "header of 64 bytes"),
        (8, b"\xff", "another namespace"),
        (24, b"\xff", "another key"),
        (72, b"zstd", "codec 'zstd', expected 'raw'"),
        (84, b"\x00", "rank 0 of 2"),
        (86, b"\x04", "rank 1 of 4"),
        (88, b"\x01", "length 513"),
    ],
)
def test_a_well_formed_header_for_something_else_is_refused(at: int, value: bytes, reason: str):
    with pytest.raises(BadFrame, match=reason):
        parse(resealed(header(), at, value))


def test_a_reader_names_the_codec_it_wants():
    raw = frame.pack(NAMESPACE, KEY, ROOT, ROOT, PAYLOAD, 16, 1, 2, "k16v8")
    assert frame.parse(raw, NAMESPACE, KEY, len(PAYLOAD), 1, 2, "k16v8").codec == "k16v8"
    with pytest.raises(OtherCodec, match="codec 'k16v8', expected 'raw'"):
        parse(raw)
    with pytest.raises(OtherCodec, match="codec 'raw', expected 'k16v8'"):
        frame.parse(header(), NAMESPACE, KEY, len(PAYLOAD), 1, 2, "k16v8")


@pytest.mark.parametrize("name", ["", "ninechars"])
def test_a_codec_name_that_does_not_fit_is_a_bug(name: str):
    with pytest.raises(ValueError, match="codec name"):
        frame.pack(NAMESPACE, KEY, ROOT, ROOT, PAYLOAD, 16, 1, 2, name)


@pytest.mark.parametrize("seed", range(100))
def test_any_flipped_header_bit_is_noticed(seed: int):
    rng = random.Random(seed)
    raw = bytearray(header())
    raw[rng.randrange(128)] ^= 1 << rng.randrange(8)
    with pytest.raises(BadFrame):
        parse(bytes(raw))


@pytest.mark.parametrize("seed", range(100))
def test_any_flipped_payload_bit_is_noticed(seed: int):
    rng = random.Random(seed)
    spoiled = bytearray(PAYLOAD)
    spoiled[rng.randrange(len(spoiled))] ^= 1 << rng.randrange(8)
    with pytest.raises(BadFrame, match="payload checksum"):
        frame.verify(parse(header()), bytes(spoiled))


@pytest.mark.parametrize("size", [0, 1, 127, 129])
def test_a_header_of_another_size_is_refused(size: int):
    with pytest.raises(BadFrame, match=f"header of {size} bytes"):
        parse((header() * 2)[:size])


def test_a_payload_of_another_size_is_refused():
    with pytest.raises(BadFrame, match="payload of 511 bytes"):
        frame.verify(parse(header()), PAYLOAD[:-1])


def test_an_id_that_is_not_16_bytes_is_a_bug_not_a_frame():
    with pytest.raises(ValueError, match="an id of 3 bytes"):
        frame.pack(NAMESPACE, KEY, b"abc", ROOT, PAYLOAD, 16, 1, 2)
