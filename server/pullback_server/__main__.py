"""`pullback-server`, where the server's dependencies are installed; a sentence where they are not."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Runs the command line. Returns its exit status."""
    if sys.argv[1:2] == ["serve"]:
        # The first process of a container ignores what it has no handler for, and importing takes a second or more.
        signal.signal(signal.SIGTERM, _leave)
    try:
        from pullback_server import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("pullback_server", "pullback_wire", "pullback"):
            raise
        print(
            f"pullback-server: the server needs {error.name!r}, which is not installed: pip install 'pullback[server]'",
            file=sys.stderr,
        )
        return 1
    return cli.main()


def _leave(number: int, frame: FrameType | None) -> None:
    # There is nothing yet that would have to be ended.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
