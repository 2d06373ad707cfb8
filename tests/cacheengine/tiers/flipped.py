"""A codec that loses nothing and is not the identity, so that what a tier holds cannot pass for raw."""

from collections.abc import Sequence

HEAD = b"flipped:" * 2


class Flipped:
    """Every bit turned over, behind sixteen bytes of its own.  Pages are four bytes."""

    name = "flip"
    exact = True
    page = 4

    def encoded_bytes(self, payload_bytes: int) -> int:
        if payload_bytes % self.page:
            raise ValueError(f"buffer of {payload_bytes} bytes is not whole pages")
        return payload_bytes + len(HEAD)

    def encode(self, data: Sequence[memoryview], into: Sequence[memoryview]) -> None:
        for view, out in zip(data, into, strict=True):
            out[:] = HEAD + bytes(255 - byte for byte in view)

    def decode(self, data: Sequence[memoryview], into: Sequence[memoryview]) -> None:
        for view, out in zip(data, into, strict=True):
            assert view[: len(HEAD)] == HEAD
            out[:] = bytes(255 - byte for byte in view[len(HEAD) :])
