"""The frame: 128 bytes in front of every chunk stored outside the host arena.  docs/format.md is normative.

A frame says whose bytes follow (namespace, key, rank of world), what they are (codec, tokens, length) and
what they hash to.  Readers trust nothing else: any difference is a BadFrame, which a tier counts and drops as
a miss.  There is nothing here to execute: one fixed little-endian struct, two XXH3 checksums, no pickle.
"""

import struct
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from cacheengine.errors import BadFrame
from cacheengine.keys import KEY_BYTES, ChunkKey, Namespace

MAGIC = b"CRNF"
VERSION = 1
HEADER_BYTES = 128
RAW = "raw"

# magic version header_bytes | namespace key parent root | codec tokens rank world | length checksum | zeros
_BODY = struct.Struct("<4sHH 16s16s16s16s 8sIHH QQ 16x")
_SUM = struct.Struct("<Q")
_NO_KEY = bytes(KEY_BYTES)
_CODEC_BYTES = 8

assert _BODY.size + _SUM.size == HEADER_BYTES


class OtherCodec(BadFrame):
    """A whole frame of this chunk, written by a worker of another codec: a miss, and not ours to delete."""


class FrameInfo(NamedTuple):
    """A header whose own checksum and geometry held.  `parent` and `root` are b"" where none was given."""

    namespace: Namespace
    key: ChunkKey
    parent: bytes
    root: bytes
    codec: str
    tokens: int
    rank: int
    world: int
    length: int  # bytes of payload
    checksum: int  # XXH3-64 of the payload


def pack(
    namespace: Namespace,
    key: ChunkKey,
    parent: bytes,
    root: bytes,
    payload: memoryview | bytes,
    tokens: int,
    rank: int,
    world: int,
    codec: str = RAW,
) -> bytes:
    """The header for `payload`, the bytes as `codec` made them, which it reads once (XXH3, about 25 GB/s,
    without the GIL).  Raises ValueError for a codec's name that does not fit."""
    body = _BODY.pack(
        MAGIC, VERSION, HEADER_BYTES,
        _id(namespace), _id(key), _id(parent), _id(root),
        _name(codec), tokens, rank, world,
        len(payload), xxh3_64_intdigest(payload),
    )  # fmt: skip
    return body + _SUM.pack(xxh3_64_intdigest(body))


def parse(
    header: bytes | memoryview,
    namespace: Namespace,
    key: ChunkKey | None,
    length: int | None,
    rank: int,
    world: int,
    codec: str | None = RAW,
) -> FrameInfo:
    """Check a header against what the reader expects; `key=None` takes any chunk of this namespace,
    `length=None` any length, `codec=None` any codec.

    Raises BadFrame with the first thing that is wrong, OtherCodec when that is the codec.  Says nothing about
    the payload: see verify().
    """
    if len(header) != HEADER_BYTES:
        raise BadFrame(f"header of {len(header)} bytes")
    if bytes(header[:4]) != MAGIC:
        raise BadFrame("no magic")
    body = header[: _BODY.size]
    if xxh3_64_intdigest(body) != _SUM.unpack_from(header, _BODY.size)[0]:
        raise BadFrame("header checksum")
    _, version, header_bytes, stored_namespace, stored_key, parent, root, stored, *rest = _BODY.unpack(body)
    if (version, header_bytes) != (VERSION, HEADER_BYTES):
        raise BadFrame(f"version {version} with a header of {header_bytes} bytes")
    info = FrameInfo(
        Namespace(stored_namespace), ChunkKey(stored_key), _given(parent), _given(root),
        stored.rstrip(b"\0").decode("ascii", "replace"), *rest,
    )  # fmt: skip
    if info.namespace != namespace:
        raise BadFrame("another namespace")
    if key is not None and info.key != key:
        raise BadFrame("another key")
    if codec is not None and info.codec != codec:
        raise OtherCodec(f"codec {info.codec!r}, expected {codec!r}")
    if length is not None and info.length != length:
        raise BadFrame(f"length {info.length}, expected {length}")
    if (info.rank, info.world) != (rank, world):
        raise BadFrame(f"rank {info.rank} of {info.world}, expected {rank} of {world}")
    return info


def payload_checksum(header: bytes) -> int:
    """The checksum pack() computed, without computing it again."""
    return int(_BODY.unpack_from(header)[-1])


def verify(info: FrameInfo, payload: memoryview | bytes) -> None:
    """Raises BadFrame unless `payload` is exactly what was framed."""
    if len(payload) != info.length:
        raise BadFrame(f"payload of {len(payload)} bytes, expected {info.length}")
    if xxh3_64_intdigest(payload) != info.checksum:
        raise BadFrame("payload checksum")


def _id(value: bytes) -> bytes:
    """16 bytes as they are, b"" as zeros.  Raises ValueError for any other length."""
    if len(value) not in (0, KEY_BYTES):
        raise ValueError(f"an id of {len(value)} bytes")
    return value or _NO_KEY


def _name(codec: str) -> bytes:
    name = codec.encode("ascii")
    if not 0 < len(name) <= _CODEC_BYTES:
        raise ValueError(f"a codec name of {len(name)} bytes")
    return name


def _given(value: bytes) -> bytes:
    return b"" if value == _NO_KEY else value
