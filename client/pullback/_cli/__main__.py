"""`python -m pullback._cli`."""

import sys

from pullback._cli.entry import main

sys.exit(main())
