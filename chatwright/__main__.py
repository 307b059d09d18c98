"""`python -m chatwright` is `chatwright`."""

from __future__ import annotations

import sys

from chatwright.cli import main

if __name__ == "__main__":
    sys.exit(main())
