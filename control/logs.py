"""logs.py - one line a message, on stderr, at a bounded rate.

Theory      What a guest, a front-end or the network can trigger must not fill a disk: at most BURST
            lines in WINDOW_S seconds; what was left out is said once, when the window ends. Nothing
            is buffered.
Ownership   The control process. Workers do not log; they count and report.
"""

from __future__ import annotations

import sys
import time

BURST = 50
WINDOW_S = 10.0


class Log:
    """Writes "vhostmq: text" lines."""

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet, self.verbose = quiet, verbose
        self._window_s = 0.0
        self._lines = 0
        self._left_out = 0

    def _line(self, text: str) -> None:
        now_s = time.monotonic()
        if now_s - self._window_s > WINDOW_S:
            if self._left_out:
                print(f"vhostmq: {self._left_out} more lines left out", file=sys.stderr)
            self._window_s, self._lines, self._left_out = now_s, 0, 0
        self._lines += 1
        if self._lines > BURST:
            self._left_out += 1
        else:
            print(f"vhostmq: {text}", file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        """Something does not work."""
        self._line(text)

    def warning(self, text: str) -> None:
        """Something does not work as well as it should; not with --quiet."""
        if not self.quiet:
            self._line(text)

    def info(self, text: str) -> None:
        """What an operator wants to know; not with --quiet."""
        if not self.quiet:
            self._line(text)

    def debug(self, text: str) -> None:
        """Only with --debug."""
        if self.verbose:
            self._line(text)
