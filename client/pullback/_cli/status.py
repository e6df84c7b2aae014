"""/status.json of a server's metrics port: where it is, and how to get it. docs/page.md says what is in it."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pullback._channel import Address
from pullback._cli.connecting import tls_context, wants_tls
from pullback._cli.usage import UsageError

_PORT = 9470
#: Seconds that an answer may take; a server that is well answers within milliseconds.
_PATIENCE = 5.0
#: What a host may be called in a target: a name, an IPv4 address, or an IPv6 one in brackets.
_TARGET = re.compile(r"(?:dns:/*(?:[^/]+/)?|ipv[46]:)?(?P<host>\[[^\]]+\]|[^:,/\[\]]+)(?::\d+)?(?:,.*)?", re.IGNORECASE)
_REFUSED = {
    401: "wants to know who asks: give --token (or PULLBACK_TOKEN) of somebody with the right `metrics`",
    403: "says that this token, or certificate, has not the right `metrics`",
    404: "has no /status.json: no Pullback server's metrics port, or one with --page false",
}


@dataclass(frozen=True)
class Source:
    """Where a server tells how it is. url: without a path. token: None: none is sent."""

    url: str
    host: str
    port: int
    context: ssl.SSLContext | None = field(repr=False)
    token: str | None = field(repr=False)

    def fetch(self, since: float = 0.0) -> dict[str, Any]:
        """The document, its points after a time only.

        Raises OSError where nobody answers, ValueError where the answer is another one.
        """
        connection: http.client.HTTPConnection
        if self.context is None:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=_PATIENCE)
        else:
            connection = http.client.HTTPSConnection(self.host, self.port, timeout=_PATIENCE, context=self.context)
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        with contextlib.closing(connection):
            try:
                connection.request("GET", f"/status.json?since={since!r}", headers=headers)
                answer = connection.getresponse()
                body = answer.read()
            except http.client.HTTPException as error:
                # Not in its own words: they are what came, be it binary.
                raise ValueError(
                    f"{self.url} answers, but not in HTTP ({type(error).__name__}): is it the metrics port, usually "
                    f"{_PORT}?"
                ) from None
            except OSError as error:
                raise ConnectionError(f"{self.url} cannot be reached: {error or type(error).__name__}") from None
        if answer.status != 200:
            raise ValueError(f"{self.url} {_REFUSED.get(answer.status, f'answers {answer.status} {answer.reason}')}")
        try:
            found = json.loads(body)
            return {"now": dict(found["now"]), "points": list(found["points"])}
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{self.url} sent no status of a Pullback server") from None


def source_of(arguments: argparse.Namespace) -> Source:
    """--metrics, or the usual port on the host of --target. Raises UsageError, OSError, ValueError."""
    url: str | None = arguments.metrics
    if url is None:
        found = _TARGET.fullmatch(arguments.target)
        if found is None:
            raise UsageError(
                f"argument --metrics: say where the metrics of {arguments.target!r} are, as http://HOST:{_PORT}"
            )
        url = found["host"]
    if "://" not in url:
        url = f"{'https' if wants_tls(arguments) else 'http'}://{url}"
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port or _PORT
    except ValueError:
        host, port = None, 0
    if parts.scheme not in ("http", "https") or not host or parts.path.strip("/") or parts.query or parts.username:
        raise UsageError(f"argument --metrics: {url!r} is no address such as http://HOST:{_PORT}")
    shown = f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    token = arguments.token or os.environ.get("PULLBACK_TOKEN", "").strip() or None
    context = tls_context(arguments) if parts.scheme == "https" else None
    # What counts as this machine is said once, for gRPC's targets.
    local = Address(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", None, 1.0, 1, (), "").is_private
    if token and context is None and not local and not arguments.allow_plaintext_token:
        raise ValueError(
            f"a token is given (by --token or PULLBACK_TOKEN), and {shown} would get it in plain text; use https://, "
            "or, where nobody on the way can listen, --allow-plaintext-token"
        )
    if token and not all("!" <= letter <= "~" for letter in token):
        raise ValueError("--token has characters other than printable ASCII")
    return Source(shown, host, port, context, token)
