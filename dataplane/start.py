"""start.py - the entry of a worker process, importable without compiled code.

Theory      Control names `main` as the target of a new process, the keeper of a worker (keeper.py);
            only inside that process, which the fork server made from a copy of itself with the data
            plane loaded, is the rest imported.
            The entry points that processes of the data plane call are named here: who asks for them
            by name can run without the compiler (shm/code.py).
"""

from __future__ import annotations

from shm.mailbox import Mailbox

PRELOAD = "dataplane.preload"
WORKER_ENTRIES = ("breathe", "inject", "revive", "succeed", "ring_stopped", "replace_page")
MOVER_ENTRIES = ("move",)


def main(mailbox: Mailbox) -> None:
    """Keep a worker; the first message says which."""
    from dataplane import keeper

    keeper.main(mailbox)
