"""A multipart body on its way through: as much of it as tells the model is read, the rest is streamed.

The worker's framework parses with the same library, so both see the same parts.  Memory is flat: beyond what
is held until the `model` field is found, one read of the client at a time; and AHEAD_BYTES while it waits,
because a client that is not listened to cannot be heard leaving.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from gateway.errors import BadRequest, BodyTooLarge, GatewayError

AHEAD_BYTES = 256 << 10  # read before the worker asks for them
MAX_BYTES = 256 << 20  # of an upload; vLLM has its own limit, 25 MB of audio by default
_LONGEST_NAME = 1024  # bytes of a model's name; more is no name
_MOST_PARTS = 2000  # a worker's Starlette takes 1,000 fields and 1,000 files; each costs the loop some 40 µs

Part = tuple[bytes, bool]  # bytes of the body, and whether more will come


class Upload:
    """REQUIRES: one reader, and one that listens.  `receive` raises what ends the request when the client
    leaves."""

    def __init__(
        self,
        content_type: bytes,
        length: int | None,
        receive: Callable[[], Awaitable[Part]],
        limit: int = MAX_BYTES,
    ) -> None:
        """`limit` in bytes.  Raises BadRequest, BodyTooLarge."""
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise BadRequest("Send the body of this path as multipart/form-data with a boundary.")
        if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
            raise BadRequest("Send the names and values of the form in UTF-8.")
        if length is not None and length > limit:
            raise BodyTooLarge(limit)
        self.length = length  # of the body for the worker; None: not announced
        self.model: str | None = None  # as the client wrote it
        self.over = asyncio.Event()  # nobody reads the client's body any more
        self._receive, self._limit = receive, limit
        self._held, self._more, self._size = b"", True, 0
        self._ahead: deque[bytes] = deque()
        self._wrong: GatewayError | None = None  # what listen() met, for the reader
        self._turn = asyncio.Lock()  # to receive
        self._read = False  # the reader has begun
        self._expected: str | None = None
        self._delimiter = b"\r\n--" + options[b"boundary"]
        self._fields = _Fields(options[b"boundary"])

    async def look(self, hold: int) -> None:
        """Read until the model is known, the body ends, or `hold` bytes are here.  Raises BadRequest,
        BodyTooLarge."""
        held = []
        while self._more and not self._fields.models and self._size < hold:
            held.append(await self._part())
        self._held = b"".join(held)
        if self._fields.models:
            self.model = self._fields.models[0]

    def decide(self, served: str) -> None:
        """The worker will get `served` as the model; a later field that says otherwise ends the upload."""
        if self.model is not None and self.model != served:
            # before the field's part there are as many delimiters as parts
            pieces = (b"\r\n" + self._held).split(self._delimiter)
            head, gap, _ = pieces[self._fields.place].partition(b"\r\n\r\n")
            pieces[self._fields.place] = head + gap + served.encode()
            renamed = self._delimiter.join(pieces)[2:]
            if self.length is not None:
                self.length += len(renamed) - len(self._held)
            self._held = renamed
        self._expected = served

    async def listen(self) -> None:
        """Until nobody reads the client's body any more; reads on itself before the reader begins, as far as
        AHEAD_BYTES.  Raises what `receive` raises."""
        ahead = 0
        while self._more and not self._read and ahead < AHEAD_BYTES:
            async with self._turn:
                try:
                    part = await self._part()
                except GatewayError as exc:
                    self._wrong = exc
                    break
                self._ahead.append(part)
                ahead += len(part)
        if self._more or self._wrong:
            await self.over.wait()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The body for the worker, once.  Raises as look() does."""
        self._read = True
        try:
            held, self._held = self._held, b""
            yield held
            while part := await self._next():
                yield part
        finally:
            self.over.set()

    async def _next(self) -> bytes:
        """b"" at the end."""
        async with self._turn:
            while True:
                if self._ahead:
                    part = self._ahead.popleft()
                elif self._wrong is not None:
                    raise self._wrong
                elif self._more:
                    part = await self._part()
                else:
                    return b""
                if part:
                    return part

    async def _part(self) -> bytes:
        part, self._more = await self._receive()
        self._size += len(part)
        if self._size > self._limit:
            raise BodyTooLarge(self._limit)
        try:
            self._fields.write(part)
        except FormParserError as exc:
            raise BadRequest(f"The request body is not valid multipart/form-data: {exc}.") from exc
        if self._expected is not None and {*self._fields.models[self.model is not None :]} - {self._expected}:
            raise BadRequest("Send the `model` field once, and before the file.", "model")
        return part


class _Fields:
    """Listens to the parser for parts called `model`."""

    def __init__(self, boundary: bytes) -> None:
        self.models: list[str] = []  # whole ones
        self.place = 0  # of the first, among the parts, from 1
        self._parts = 0
        self._header, self._value, self._disposition = b"", b"", b""
        self._said: bytes | None = None  # of a model field that is being read
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begins,
                "on_header_begin": self._header_begins,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_ends,
                "on_headers_finished": self._data_begins,
                "on_part_data": self._data,
                "on_part_end": self._part_ends,
            },
        )

    def write(self, data: bytes) -> None:
        """Raises FormParserError, BadRequest."""
        self._parser.write(data)

    def _part_begins(self) -> None:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise BadRequest(f"A form has at most {_MOST_PARTS} parts.")
        self._disposition = b""

    def _header_begins(self) -> None:
        self._header = self._value = b""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_ends(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value

    def _data_begins(self) -> None:
        name = parse_options_header(self._disposition)[1].get(b"name")
        self._said = b"" if name == b"model" else None

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._said is not None:
            self._said += data[start:end]
            if len(self._said) > _LONGEST_NAME:
                raise BadRequest(f"A model's name has at most {_LONGEST_NAME} bytes.", "model")

    def _part_ends(self) -> None:
        if self._said is not None:
            self.place = self.place or self._parts
            self.models.append(self._said.decode("utf-8", "replace"))
            self._said = None
