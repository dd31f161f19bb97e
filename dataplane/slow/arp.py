"""arp.py - who-has for any IPv4 address: it is us.

Theory      The guest believes it is on the host's own network; every neighbour it may ask for is
            reached through us, so every request is answered with our MAC (RFC 826). Two kinds of
            request are not questions and get no answer: announcements (sender and target address
            are the same, RFC 5227 2.3; a gratuitous ARP looks alike), and requests for the address
            we gave to the guest: its own conflict probe (RFC 5227 2.1.1) must find nobody. A probe
            for another address is answered: that address is taken, by the network behind us.
Limits      Ethernet and IPv4 only (hardware type 1, protocol 0x0800).
Ownership   No state.
Drops       Replies, other operations and types, short frames, the two kinds above: None.
"""

import struct

from dataplane.slow.net import ETHERTYPE_ARP, ETHERTYPE_IPV4, Net, build_ethernet, payload_of

FORMAT = struct.Struct("!HHBBH6s4s6s4s")  # types, address sizes, operation, sender, target
REQUEST = 1
REPLY = 2


def reply(frame: bytes, net: Net, checksum_trusted: bool = False) -> bytes | None:
    """The ARP reply to an Ethernet frame with an ARP request, or None.

    `checksum_trusted` is there for the common signature; ARP has no checksum.
    """
    packet = payload_of(frame, ETHERTYPE_ARP)
    if not net.ipv4 or packet is None or len(packet) < FORMAT.size:
        return None
    *kind, sender_mac, sender, _, target = FORMAT.unpack_from(packet)
    if kind != [1, ETHERTYPE_IPV4, 6, 4, REQUEST]:
        return None
    if target in (sender, net.addr4.packed):
        return None
    answer = FORMAT.pack(1, ETHERTYPE_IPV4, 6, 4, REPLY, net.our_mac, target, sender_mac, sender)
    return build_ethernet(frame[6:12], net.our_mac, ETHERTYPE_ARP, answer)
