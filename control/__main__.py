"""__main__.py - where the vhostmq command, or `python -m control`, begins.

Theory      Until a command has said what Ctrl-C means to it, it ends the process at once: Python's
            own way is a traceback through whatever is being imported, or compiled (`warm`), and
            only when the compiler comes up for air.
Limits      Where Ctrl-C was ignored from the start (nohup), it stays so.
Ownership   The signal is the process's; `run` and `guest` take it over.
"""

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from control.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
