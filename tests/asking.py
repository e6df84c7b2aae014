"""HTTP as a client of the metrics port speaks it."""

import contextlib
import http.client
from typing import Any


def ask(
    port: int, path: str, method: str = "GET", headers: dict[str, str] | None = None, context: Any = None
) -> tuple[int, dict[str, str], str]:
    """Code, headers and body."""
    connection = (
        http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        if context is None
        else http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=context)
    )
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
