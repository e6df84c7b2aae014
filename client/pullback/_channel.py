"""Where a client connects to and how: target, TLS, channel options, and a channel for each process."""

from __future__ import annotations

import os
import re
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pullback._fork import gate
from pullback._ticker import ticker

#: A file's path, or the PEM bytes themselves.
PemSource = str | os.PathLike[str] | bytes

#: What the server knows a client by, or a function that is asked for it before each call.
Token = str | Callable[[], str]

#: Loopback and Unix sockets, which no proxy can reach: "localhost:1", "127.0.0.1:1", "[::1]:1", "unix:/run/x",
#: also after "dns:///" or "ipv4:", and several after the latter.
_HOST = r"(localhost|127(\.\d+){3}|\[?::1\]?)(:\d+)?"
_LOCAL = re.compile(rf"(unix(-abstract)?:.*|(dns:/*)?{_HOST}|ipv[46]:{_HOST}(,{_HOST})*)", re.IGNORECASE)
#: Targets of which each address is used: all that a name has, or those that are listed.
_SPREAD = re.compile(r"dns:///.*|ipv[46]:.*,.*")
_METADATA_KEY = re.compile(r"[0-9a-z_.-]+")
_ROUND_ROBIN = '{"loadBalancingConfig": [{"round_robin": {}}]}'


@dataclass(frozen=True)
class TLS:
    """An encrypted connection. Each of ca, cert and key is a path (str or Path) or the PEM text itself (bytes).

    ca: certificates that vouch for the server; None: the public ones that gRPC carries.
    cert, key: this client's own certificate chain and private key (mutual TLS); both or neither.
    server_name: the name the server's certificate must carry, where it is not the host of the target.

    Files are read when a connection is opened, so that a renewed certificate is picked up.

    Raises ValueError for a cert without its key, or the other way round.
    """

    ca: PemSource | None = None
    cert: PemSource | None = None
    key: PemSource | None = field(default=None, repr=False)
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key belong together: give both or neither")

    def read(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """The PEM bytes of ca, key and cert. Raises OSError where a file cannot be read."""
        return _pem(self.ca), _pem(self.key), _pem(self.cert)


def _pem(source: PemSource | None) -> bytes | None:
    return source if source is None or isinstance(source, bytes) else Path(source).read_bytes()


@dataclass(frozen=True)
class Address:
    """All that is needed to open a channel; carries no connection, so it can be pickled.

    metadata is sent with each call, and so is what `token` says at the time.
    """

    target: str
    tls: TLS | None
    connect_timeout: float
    max_message_bytes: int
    metadata: tuple[tuple[str, str | bytes], ...] = field(repr=False)
    name: str
    token: Token | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.target, str) or not self.target.strip():
            raise ValueError(f"target is {self.target!r}, expected an address such as 'localhost:8470'")
        if self.tls is not None:
            # What cannot be read is better said now than at the first call.
            self.tls.read()
        if not (self.name.isascii() and self.name.isprintable()):
            raise ValueError(f"name is {self.name!r}, expected printable ASCII")
        if not 0 < self.connect_timeout < 1e6:
            raise ValueError(f"connect_timeout is {self.connect_timeout}, expected seconds")
        if not 0 < self.max_message_bytes < 2**31:
            raise ValueError(f"max_message_bytes is {self.max_message_bytes}, expected 1 to {2**31 - 1}")

    @property
    def is_private(self) -> bool:
        """Whether nobody on the way can read what is sent: encrypted, or within this machine."""
        return self.tls is not None or _LOCAL.fullmatch(self.target) is not None

    def authorization(self) -> tuple[tuple[str, str | bytes], ...]:
        """The metadata that say who is calling, for a call that is about to be made.

        Raises ValueError for a token that none can be, and whatever the user's function that gives one raises.
        """
        token = self.token
        if token is None:
            return ()
        return bearer(token if isinstance(token, str) else token())

    def options(self) -> list[tuple[str, Any]]:
        """gRPC's channel options."""
        options: list[tuple[str, Any]] = [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            # Retries are the client's own: gRPC's do nothing for messages above 256 KiB.
            ("grpc.enable_retries", 0),
            # How long one attempt to connect takes at most, and how soon a server that comes back is found.
            ("grpc.min_reconnect_backoff_ms", int(self.connect_timeout * 1000)),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 5000),
            # Notices a server that vanished under a long call; idle connections are left in peace.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.max_pings_without_data", 0),
            # A connection of this channel's own: the shared ones would be the parent's in a forked child.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.primary_user_agent", f"{self.name} pullback-python".strip()),
        ]
        if _SPREAD.fullmatch(self.target):
            options.append(("grpc.service_config", _ROUND_ROBIN))
        if _LOCAL.fullmatch(self.target):
            options.append(("grpc.enable_http_proxy", 0))
        if self.tls is not None and self.tls.server_name:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
            options.append(("grpc.default_authority", self.tls.server_name))
        return options

    def open(self) -> Any:
        """A new grpc.Channel. It connects at its first call."""
        import grpc

        if self.tls is None:
            return grpc.insecure_channel(self.target, self.options())
        ca, key, cert = self.tls.read()
        return grpc.secure_channel(self.target, grpc.ssl_channel_credentials(ca, key, cert), self.options())


def bearer(token: Any) -> tuple[tuple[str, str | bytes], ...]:
    """The metadata for what a token, or a function that gives one, gave. Raises ValueError for what is none."""
    if not isinstance(token, str) or not token.strip():
        raise ValueError(f"token gave {type(token).__name__ if not isinstance(token, str) else 'nothing'}")
    return clean_metadata((("authorization", f"Bearer {token.strip()}"),))


def clean_metadata(
    metadata: Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]],
) -> tuple[tuple[str, str | bytes], ...]:
    """Metadata as gRPC takes it: keys in lower case.

    Raises ValueError for what HTTP/2 cannot carry; gRPC itself would fail each call with INTERNAL. Values are not
    repeated in the message, as they may be secrets.
    """
    pairs = metadata.items() if isinstance(metadata, Mapping) else metadata
    cleaned: list[tuple[str, str | bytes]] = []
    for key, value in pairs:
        low = key.lower()
        if not _METADATA_KEY.fullmatch(low) or low.startswith("grpc-"):
            raise ValueError(f"metadata key {key!r}: expected letters, digits, '-', '_', '.', not beginning with grpc-")
        if low.endswith("-bin") != isinstance(value, bytes):
            raise ValueError(f"metadata {key!r}: bytes go with keys that end in -bin, str with all others")
        if isinstance(value, str) and not all(" " <= letter <= "~" for letter in value):
            raise ValueError(f"metadata {key!r}: the value has characters other than printable ASCII")
        cleaned.append((low, value))
    return tuple(cleaned)


#: Channels whose client was dropped without close(), with the generation they belong to. gRPC itself holds on to a
#: channel until it is closed (so that it can see to it in a fork), and closing one is no work for a finalizer.
_orphans: deque[tuple[int, Any]] = deque()
#: Those of a parent process.
_inherited: list[Any] = []


def _abandon(channels: dict[int, Any]) -> None:
    _orphans.extend(channels.items())
    ticker().later(close_orphans)


def close_orphans() -> None:
    """Closes the connections of clients that were dropped; done by whoever next uses a channel, or by the ticker."""
    while _orphans:
        try:
            generation, channel = _orphans.popleft()
        except IndexError:
            return
        if generation == gate.generation:
            channel.close()
        else:
            _inherited.append(channel)


class ForkAwareChannel:
    """The channel of the present process, and its callables, made when first used. Safe to use from many threads.

    A forked child gets a new channel. The parent's is kept, never used and never closed there: closing it would
    shut the connection of the parent.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        # By generation. dict.setdefault is atomic, so there is no lock that a fork could leave locked.
        self._channels: dict[int, Any] = {}
        self._callables: dict[tuple[int, str], Any] = {}
        self.closed = False
        weakref.finalize(self, _abandon, self._channels).atexit = False

    def unary(self, path: str) -> Any:
        """gRPC's callable for a unary method, from bytes to bytes."""
        if _orphans:
            close_orphans()
        key = (gate.generation, path)
        found = self._callables.get(key)
        if found is None:
            made = self.channel().unary_unary(path, request_serializer=None, response_deserializer=None)
            found = self._callables.setdefault(key, made)
        return found

    def channel(self) -> Any:
        """The grpc.Channel of this process."""
        if _orphans:
            close_orphans()
        generation = gate.generation
        found = self._channels.get(generation)
        if found is None:
            made = self._address.open()
            found = self._channels.setdefault(generation, made)
            if found is not made:
                made.close()
        return found

    def close(self) -> None:
        """Ends this process's channel and the calls that run on it."""
        self.closed = True
        channel = self._channels.get(gate.generation)
        if channel is not None:
            channel.close()
