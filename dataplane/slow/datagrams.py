"""datagrams.py - datagram flows that outlive their guest.

Theory      A flow whose guest takes large datagrams (GUEST_USO4/6) has a socket that puts trains
            together (UDP_GRO). The same flow may be used by the next guest, or by the same after a
            reboot, which takes other features: its socket follows.
Why so      With UDP_GRO off the kernel says no longer where one datagram of a train ends. What
            waited was meant for the guest before: it is thrown away.
Sources     udp(7), Linux 5.0.
Limits      WAITING_MAX datagrams, so that a flood holds nobody up; ICMP has no trains.
Ownership   The socket is its home worker's; between two breaths.
Drops       What waited for the former guest, not counted: nobody asked for it.
"""

import socket

from shm.layout import View

SOL_UDP, UDP_GRO = 17, 104
WAITING_MAX = 4096
IP4_MAPPED = bytes(10) + b"\xff\xff"


def suit_guest(entry: View, uso4: bool, uso6: bool) -> None:
    """Have the socket of a UDP flow put datagrams together just where the guest takes them so."""
    wanted = uso4 if entry.bytes("far_addr").startswith(IP4_MAPPED) else uso6
    if entry["fd"] < 0:
        return
    sock = socket.socket(fileno=entry["fd"])
    try:
        if bool(sock.getsockopt(SOL_UDP, UDP_GRO)) == wanted:
            return
        sock.setsockopt(SOL_UDP, UDP_GRO, int(wanted))
        for _ in range(WAITING_MAX if not wanted else 0):
            sock.recv(1, socket.MSG_DONTWAIT)  # the rest of the datagram goes with it
    except OSError:
        pass  # nothing waits any more, or an error that concerns the next one who sends
    finally:
        sock.detach()
