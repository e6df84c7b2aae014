"""What peers send that do not speak gRPC as they should: raw TCP, HTTP/1 and HTTP/2 made by hand."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _PRIORITY, _RESET, _SETTINGS, _PUSH, _PING, _GOAWAY, _WINDOW, _CONTINUATION = range(10)
_END_STREAM, _ACK, _END_HEADERS, _PADDED = 0x1, 0x1, 0x4, 0x8


def frame(kind: int, flags: int, stream: int, body: bytes = b"", length: int | None = None) -> bytes:
    """One HTTP/2 frame. length: what it claims, where that is not its body's."""
    size = len(body) if length is None else length
    return struct.pack(">I", size)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body


def hpack(headers: Sequence[tuple[str, str]]) -> bytes:
    """Headers as literals that are not indexed."""
    found = b""
    for name, value in headers:
        found += b"\x00" + _text(name) + _text(value)
    return found


def _text(text: str) -> bytes:
    raw = text.encode()
    size = len(raw)
    if size < 127:
        return bytes([size]) + raw
    out, size = b"\x7f", size - 127
    while size > 127:
        out += bytes([size & 127 | 128])
        size >>= 7
    return out + bytes([size]) + raw


def request(path: str, *more: tuple[str, str], content: str = "application/grpc") -> bytes:
    """The headers of a call."""
    return hpack(
        [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x"), ("content-type", content),
         ("te", "trailers"), *more]
    )  # fmt: skip


_VJP = "/pullback.v1.GradientService/ComputeVjp"
_SESSION = "/pullback.v1.SessionService/Session"
_CALL = frame(_HEADERS, _END_HEADERS, 1, request(_VJP))
_BIG = request(_VJP) + hpack([("big", "y" * 2**20)])
_MESSAGE = b"\x01\x00\x00\x00\x02xy"
_TIMES = ("-1S", "9" * 30 + "H", "x", "")
_OPENING = b"\x00\x00\x00\x00\x04\x08\x01\x1a\x00"
_ENTRIES = (b"\x40" + _text("k") + _text("v" * 50)) * 200
_HELLO = _PREFACE + frame(_SETTINGS, 0, 0)


def _streams(count: int) -> range:
    return range(1, 2 * count, 2)


def _rapid_reset(rng: random.Random) -> bytes:
    headers = request(_VJP)
    return b"".join(
        frame(_HEADERS, _END_HEADERS, one, headers) + frame(_RESET, 0, one, struct.pack(">I", 8))
        for one in _streams(500)
    )


def _random_frames(rng: random.Random) -> bytes:
    return b"".join(
        frame(
            rng.randrange(12), rng.randrange(256), rng.choice((0, 1, 1, 3, 2**31 - 1)), rng.randbytes(rng.randrange(60))
        )
        for _ in range(30)
    )


def _bomb(rng: random.Random) -> bytes:
    squeezed = zlib.compress(bytes(64 << 20), 9, 31)
    body = b"\x01" + struct.pack(">I", len(squeezed)) + squeezed
    parts = [body[at : at + 16384] for at in range(0, len(body), 16384)]
    return frame(_HEADERS, _END_HEADERS, 1, request(_VJP, ("grpc-encoding", "gzip"))) + b"".join(
        frame(_DATA, _END_STREAM * (part is parts[-1]), 1, part) for part in parts
    )


#: After the preface and SETTINGS, what comes on the connection.
HTTP2: Mapping[str, Callable[[random.Random], bytes]] = {
    "nothing": lambda rng: b"",
    "random frames": _random_frames,
    "random bytes": lambda rng: rng.randbytes(500),
    "headers cut short": lambda rng: _CALL[: rng.randrange(len(_CALL))],
    "headers that never end": lambda rng: frame(_HEADERS, 0, 1, request(_VJP)) + frame(_CONTINUATION, 0, 1, b"") * 2000,
    "continuations of headers": lambda rng: frame(_HEADERS, 0, 1, request(_VJP))
    + frame(_CONTINUATION, 0, 1, hpack([("filler", "x" * 8000)])) * 500,
    "a header of a mebibyte": lambda rng: b"".join(
        frame(_HEADERS if at == 0 else _CONTINUATION, 0, 1, _BIG[at : at + 16384])
        for at in range(0, 2**20, 16384)
    )
    + frame(_CONTINUATION, _END_HEADERS, 1, b""),
    "a header table without end": lambda rng: frame(
        _HEADERS, _END_HEADERS, 1, b"\x3f\xff\xff\xff\xff\x07" + request(_VJP) + _ENTRIES
    ),
    "headers of an index that is none": lambda rng: frame(_HEADERS, _END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff\x7f"),
    "settings": lambda rng: frame(_SETTINGS, 0, 0, struct.pack(">HI", 4, rng.randrange(2**31))) * 2000,
    "settings that cannot be": lambda rng: frame(_SETTINGS, 0, 0, struct.pack(">HI", 4, 2**32 - 1)),
    "pings": lambda rng: frame(_PING, 0, 0, bytes(8)) * 2000,
    "window updates of nothing": lambda rng: frame(_WINDOW, 0, 0, bytes(4)) * 500,
    "window updates of everything": lambda rng: frame(_WINDOW, 0, 0, struct.pack(">I", 2**31 - 1)) * 10,
    "priorities": lambda rng: b"".join(frame(_PRIORITY, 0, one, struct.pack(">IB", one, 1)) for one in _streams(2000)),
    "rapid reset": _rapid_reset,
    "a push": lambda rng: frame(_PUSH, _END_HEADERS, 1, bytes(4)),
    "data for no stream": lambda rng: frame(_DATA, 0, 7, b"x" * 100) * 50,
    "a frame that claims 16 MiB": lambda rng: frame(_DATA, 0, 1, b"x" * 100, 2**24 - 1),
    "padding longer than its frame": lambda rng: _CALL + frame(_DATA, _PADDED, 1, b"\xff1234"),
    "a message that claims 4 GiB": lambda rng: _CALL + frame(_DATA, 0, 1, b"\x00\xff\xff\xff\xff" + b"x" * 1000),
    "a message cut short": lambda rng: _CALL + frame(_DATA, _END_STREAM, 1, b"\x00\x00\x00\x01\x00" + b"x" * 10),
    "a message that claims to be compressed": lambda rng: _CALL + frame(_DATA, _END_STREAM, 1, _MESSAGE),
    "a flag that is none": lambda rng: _CALL + frame(_DATA, _END_STREAM, 1, b"\x77\x00\x00\x00\x02xy"),
    "an encoding that is none": lambda rng: frame(_HEADERS, _END_HEADERS, 1, request(_VJP, ("grpc-encoding", "zip")))
    + frame(_DATA, _END_STREAM, 1, b"\x01\x00\x00\x00\x02xy"),
    "a gzip bomb": _bomb,
    "two messages in a unary call": lambda rng: _CALL + frame(_DATA, _END_STREAM, 1, b"\x00\x00\x00\x00\x00" * 2),
    "no message at all": lambda rng: frame(_HEADERS, _END_HEADERS | _END_STREAM, 1, request(_VJP)),
    "another content": lambda rng: frame(_HEADERS, _END_HEADERS, 1, request(_VJP, content="text/html")),
    "no method": lambda rng: frame(_HEADERS, _END_HEADERS, 1, hpack([(":path", _VJP)])),
    "GET": lambda rng: frame(_HEADERS, _END_HEADERS | _END_STREAM, 1, hpack(
        [(":method", "GET"), (":scheme", "http"), (":path", _VJP), (":authority", "x")])),
    "a deadline that is none": lambda rng: frame(
        _HEADERS, _END_HEADERS | _END_STREAM, 1, request(_VJP, ("grpc-timeout", rng.choice(_TIMES))),
    ),
    "binary metadata that is none": lambda rng: frame(_HEADERS, _END_HEADERS, 1, request(_VJP, ("x-bin", "%%%%"))),
    "sessions that are reset": lambda rng: b"".join(
        frame(_HEADERS, _END_HEADERS, one, request(_SESSION)) + frame(_DATA, 0, one, _OPENING)
        + frame(_RESET, 0, one, struct.pack(">I", rng.randrange(14))) for one in _streams(20)
    ),
    "goodbye": lambda rng: frame(_GOAWAY, 0, 0, struct.pack(">II", 2**31 - 1, 0)) + _CALL,
}  # fmt: skip

#: What comes on a connection instead of HTTP/2.
RAW: Mapping[str, Callable[[random.Random], bytes]] = {
    "random": lambda rng: rng.randbytes(rng.randrange(1, 5000)),
    "HTTP/1.1": lambda rng: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "an upgrade": lambda rng: (
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n\r\n"
    ),
    "a preface cut short": lambda rng: _PREFACE[: rng.randrange(len(_PREFACE))],
    "TLS": lambda rng: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(400),
    "a preface without settings": lambda rng: _PREFACE + _CALL,
    "zeros": lambda rng: bytes(100_000),
}

#: What comes on the HTTP port.
HTTP: Mapping[str, Callable[[random.Random], bytes]] = {
    "random": lambda rng: rng.randbytes(rng.randrange(1, 5000)),
    "a line without end": lambda rng: b"GET /" + b"x" * 100_000,
    "headers without end": lambda rng: b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 5000,
    "a method that is none": lambda rng: b"BREW /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
    "POST": lambda rng: b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999999999\r\n\r\nxyz",
    "a length that is none": lambda rng: b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    "chunks": lambda rng: b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffff\r\n",
    "a path out of it": lambda rng: b"GET /../../../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    "an escape": lambda rng: b"GET /%00%ff%zz?\xff\xfe HTTP/1.1\r\nHost: \xff\r\n\r\n",
    "names to choose": lambda rng: b"GET /metrics?" + b"name[]=x&" * 4000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "an accept that is none": lambda rng: (
        b"GET /metrics HTTP/1.1\r\nAccept: \xff;q=x,application/openmetrics-text;version=9;\r\n\r\n"
    ),
    "HTTP/0.9": lambda rng: b"GET /metrics\r\n",
    "nothing": lambda rng: b"\r\n\r\n\r\n",
}


def throw(port: int, data: bytes, rng: random.Random, longest: int = 64 << 10) -> bytes:
    """Sends bytes on a connection, in one or several pieces, and goes: at once, after a while, with FIN or RST.

    Returns what was answered within a moment.
    """
    answered = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as peer, contextlib.suppress(OSError):
        if rng.random() < 0.5:
            cut = rng.randrange(len(data) + 1)
            peer.sendall(data[:cut])
            data = data[cut:]
        peer.sendall(data)
        if rng.random() < 0.3:
            # So that closing sends RST.
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif rng.random() < 0.5:
            peer.shutdown(socket.SHUT_WR)
        peer.settimeout(0.05)
        while len(answered) < longest and (part := peer.recv(1 << 16)):
            answered += part
    return answered


def volley(grpc_port: int, http_port: int, rng: random.Random) -> int:
    """Everything once. Returns how many connections that were."""
    for make in HTTP2.values():
        throw(grpc_port, _HELLO + make(rng), rng)
    for make in RAW.values():
        throw(grpc_port, make(rng), rng)
    for make in HTTP.values():
        throw(http_port, make(rng), rng)
    return len(HTTP2) + len(RAW) + len(HTTP)
