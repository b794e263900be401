"""``python -m rankwise``: the command line where the program ``rankwise`` is not on the path."""

from __future__ import annotations

import sys

from rankwise.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
