"""balancing.py - `vhostmq run` whose balance (control/balance.py) moves pairs for little and often:
what a test can send does not make a worker busy."""

from __future__ import annotations

import sys

from control import balance

BUSY, GAIN, LOOKS_MAX, CALM_LOOKS = 0.02, 0.005, 1, 1

if __name__ == "__main__":
    from control.cli import main

    vars(balance).update(BUSY=BUSY, GAIN=GAIN, LOOKS_MAX=LOOKS_MAX, CALM_LOOKS=CALM_LOOKS)
    globals().update(__spec__=None, __file__=None)  # or every keeper would be made to run this
    sys.exit(main())
