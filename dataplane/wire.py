"""wire.py - where the fields of Ethernet, IPv4, IPv6, TCP, UDP, ICMP and virtio-net headers lie.

Theory      Offsets and constants, and builders for the headers of frames to the guest. Parsing is
            done on a private copy of the first bytes (tx.py), so a guest that rewrites its buffer
            changes nothing under us.
Sources     IEEE 802.3, RFC 791, RFC 8200, RFC 9293, RFC 768, RFC 792, RFC 4443, virtio 1.3 section
            5.1.6.
Limits      No IP options and no IPv6 extension headers in frames we build.
Ownership   None: callers own the memory a frame is built in.
"""

from __future__ import annotations

from dataplane import checksum
from dataplane.context import VNET_BYTES, context
from flows import address
from shm import mem
from shm.access import instance, net, seen
from shm.jit import jit

ETHER_BYTES, IP4_BYTES, IP6_BYTES, TCP_BYTES, UDP_BYTES = 14, 20, 40, 20, 8
ETHERTYPE_IP4, ETHERTYPE_ARP, ETHERTYPE_IP6 = 0x0800, 0x0806, 0x86DD
IPPROTO_ICMP, IPPROTO_TCP, IPPROTO_UDP, IPPROTO_ICMP6 = 1, 6, 17, 58
FRAME_MIN = 60  # without the frame check sequence

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
M32 = 0xFFFFFFFF

VNET_NEEDS_CSUM, VNET_DATA_VALID = 1, 2
GSO_NONE, GSO_TCP4, GSO_UDP, GSO_TCP6, GSO_UDP_L4, GSO_ECN = 0, 1, 3, 4, 5, 0x80
HOPS = 64


@jit
def distance(left, right):
    """left - right of two TCP sequence numbers, signed (RFC 9293 3.4)."""
    return ((left - right + 0x80000000) & M32) - 0x80000000


@jit
def l3_bytes(v6):
    """Length of the IP header we build."""
    return IP6_BYTES if v6 else IP4_BYTES


@jit
def clear_vnet(out):
    """An empty virtio-net header: no checksum to finish, no segmentation, one buffer."""
    mem.put_le64(out, 0)
    mem.put_le16(out + 8, 0)
    mem.put_le16(out + 10, 1)


@jit
def put_ether(w, out, v6):
    """The Ethernet header of a frame to the guest."""
    mem.copy(out + 6, net.our_mac(context.net(w)), 6)
    guest_mac = seen.mac(context.seen(w))
    mem.put_be16(out, guest_mac >> 32)
    mem.put_be32(out + 2, guest_mac & 0xFFFFFFFF)
    mem.put_be16(out + 12, ETHERTYPE_IP6 if v6 else ETHERTYPE_IP4)


@jit
def put_ip(out, v6, protocol, source, target, l4_bytes, hops):
    """The IP header at `out`; addresses are 16 bytes; the IPv4 header checksum is set."""
    if v6:
        mem.put_be32(out, 0x60000000)
        mem.put_be16(out + 4, l4_bytes)
        mem.put_u8(out + 6, protocol)
        mem.put_u8(out + 7, hops)
        mem.copy(out + 8, source, 16)
        mem.copy(out + 24, target, 16)
        return
    mem.put_be32(out, 0x45000000 | (IP4_BYTES + l4_bytes))
    mem.put_be32(out + 4, 0x00004000)  # identification 0, don't fragment (RFC 6864)
    mem.put_be32(out + 8, (hops << 24) | (protocol << 16))
    mem.copy(out + 12, source + 12, 4)
    mem.copy(out + 16, target + 12, 4)
    put_sum(out + 10, checksum.partial(out, IP4_BYTES))


@jit
def put_sum(at, total):
    """Store the complement of a sum in memory order (RFC 1071)."""
    mem.put_le16(at, ~checksum.fold(total) & 0xFFFF)


@jit
def pseudo_sum(v6, protocol, source, target, l4_bytes):
    """Unfolded sum of the pseudo header (RFC 9293 3.1, RFC 8200 8.1) in memory order."""
    if v6:
        total = checksum.partial(source, 16) + checksum.partial(target, 16)
    else:
        total = checksum.partial(source + 12, 4) + checksum.partial(target + 12, 4)
    size = ((l4_bytes & 0xFF) << 8) | ((l4_bytes >> 8) & 0xFF)  # memory order
    return total + size + (protocol << 8)


@jit
def is_v6(far):
    """1 when a flow with this far address is an IPv6 one."""
    return 1 - address.is_v4(far)


@jit
def headers(w, out, v6, protocol, source, target, l4_bytes):
    """virtio-net, Ethernet and IP headers at `out`; returns the address of the L4 header."""
    clear_vnet(out)
    put_ether(w, out + VNET_BYTES, v6)
    ip = out + VNET_BYTES + ETHER_BYTES
    put_ip(ip, v6, protocol, source, target, l4_bytes, HOPS)
    return ip + l3_bytes(v6)


@jit
def leave_checksum(out, l4, field, v6, protocol, source, target, l4_bytes):
    """Leave the L4 checksum to the guest (VIRTIO_NET_F_GUEST_CSUM): the field, `field` bytes into
    the L4 header, gets the folded pseudo-header sum, not complemented (virtio 1.3 5.1.6.2)."""
    mem.put_u8(out, VNET_NEEDS_CSUM)
    mem.put_le16(out + 6, l4 - out - VNET_BYTES)
    mem.put_le16(out + 8, field)
    pseudo = pseudo_sum(v6, protocol, source, target, l4_bytes)
    mem.put_le16(l4 + field, checksum.fold(pseudo))


@jit
def now_ns(w):
    """Nanoseconds since the instance started, for initial sequence numbers."""
    return context.now_ms(w) * 1000000 - instance.epoch_ns(context.instance(w))
