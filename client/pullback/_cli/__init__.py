"""`pullback`: asks a server what it hosts and how it is, changes what it hosts, and has it compute derivatives.

Without the extra `cli` everything works but the live views (rich) and reading .safetensors files (safetensors).
"""

from pullback._cli.entry import main

__all__ = ["main"]
