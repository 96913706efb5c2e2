"""``python -m grath_utils``."""

import sys

from grath_utils.cli import main

if __name__ == "__main__":
    sys.exit(main())
