"""`vhostmq` as on a kernel before Linux 6.9, where SO_PEEK_OFF does nothing for TCP sockets."""

from __future__ import annotations

import sys

from control import cli, netblock

netblock.has_peek_offset = lambda: False

if __name__ == "__main__":
    sys.exit(cli.main())
