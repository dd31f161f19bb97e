"""`python -m control`: the same as the vhostmq command."""

import sys

from control.cli import main

if __name__ == "__main__":
    sys.exit(main())
