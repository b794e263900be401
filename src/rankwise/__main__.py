"""``python -m rankwise``: the command line, for when the program ``rankwise`` is not on the PATH."""

from __future__ import annotations

import sys

from rankwise.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
