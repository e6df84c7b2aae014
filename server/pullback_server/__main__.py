"""`pullback-server`, where the server's dependencies are installed; a sentence where they are not."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line. Returns its exit status."""
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


if __name__ == "__main__":
    sys.exit(main())
