"""slow - the protocols that happen a few times a minute: plain Python, bytes in, bytes out.

Theory      Which protocol a frame may belong to follows from its Ethernet type and, for IP, from
            the protocol byte; each module then judges the whole frame itself and is free to refuse
            it.
Limits      At most one answer per frame, so the slow path never amplifies.
Ownership   No state; `Net` belongs to control.
Drops       No answer: the frame was none of ours, malformed, or needs none.
"""

from collections.abc import Callable

from dataplane.slow import arp, dhcp, dhcpv6, ndp
from dataplane.slow.net import (
    ETHERTYPE_ARP,
    ETHERTYPE_IPV4,
    ETHERTYPE_IPV6,
    PROTOCOL_ICMPV6,
    PROTOCOL_UDP,
    Net,
)

Reply = Callable[[bytes, Net, bool], bytes | None]

NEXT_PROTOCOL_AT = {ETHERTYPE_IPV4: 23, ETHERTYPE_IPV6: 20}  # offset in the frame
REPLIES: dict[tuple[int, int], Reply] = {
    (ETHERTYPE_ARP, 0): arp.reply,
    (ETHERTYPE_IPV4, PROTOCOL_UDP): dhcp.reply,
    (ETHERTYPE_IPV6, PROTOCOL_ICMPV6): ndp.reply,
    (ETHERTYPE_IPV6, PROTOCOL_UDP): dhcpv6.reply,
}


def replies(frame: bytes, net: Net, checksum_trusted: bool = False) -> list[bytes]:
    """The Ethernet frames that answer `frame`, in the order to send them; never raises.

    `checksum_trusted`: the guest left the UDP checksum to us (VIRTIO_NET_HDR_F_NEEDS_CSUM).
    """
    ethertype = int.from_bytes(frame[12:14], "big")
    at = NEXT_PROTOCOL_AT.get(ethertype)
    protocol = 0 if at is None else int.from_bytes(frame[at : at + 1], "big")
    reply = REPLIES.get((ethertype, protocol))
    answer = reply(frame, net, checksum_trusted) if reply else None
    return [] if answer is None else [answer]
