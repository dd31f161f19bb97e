"""ARP: what is answered and what must not be, with scapy as the other side."""

from ipaddress import IPv4Address

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.l2 import ARP, Dot1Q, Ether

from dataplane.slow import replies
from dataplane.slow.arp import reply
from dataplane.slow.net import Net

# a busy machine is no failure
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

GUEST_MAC = "52:54:00:12:34:56"
NET = Net(
    addr4=IPv4Address("192.0.2.2"),
    prefix4=24,
    gateway4=IPv4Address("192.0.2.1"),
    our_addr4=IPv4Address("192.0.2.1"),
)
OUR_MAC = ":".join(f"{byte:02x}" for byte in NET.our_mac)


def request(**fields):
    defaults = {"op": 1, "hwsrc": GUEST_MAC, "psrc": "192.0.2.2", "pdst": "192.0.2.1"}
    return Ether(src=GUEST_MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(**defaults | fields)


@pytest.mark.parametrize("target", ["192.0.2.1", "192.0.2.77", "8.8.8.8", "169.254.2.2"])
def test_any_neighbour_is_us(target):
    frame = reply(bytes(request(pdst=target)), NET)
    assert len(frame) == 60
    answer = Ether(frame)
    assert (answer.dst, answer.src, answer.type) == (GUEST_MAC, OUR_MAC, 0x0806)
    arp = answer[ARP]
    assert (arp.op, arp.hwtype, arp.ptype, arp.hwlen, arp.plen) == (2, 1, 0x0800, 6, 4)
    assert (arp.hwsrc, arp.psrc) == (OUR_MAC, target)
    assert (arp.hwdst, arp.pdst) == (GUEST_MAC, "192.0.2.2")
    assert replies(bytes(request(pdst=target)), NET) == [frame]


def test_a_probe_for_another_address_finds_it_taken():
    """RFC 5227 2.1.1: sender address 0. The network behind us has all but the guest's own."""
    answer = Ether(reply(bytes(request(psrc="0.0.0.0", pdst="192.0.2.77")), NET))
    assert (answer[ARP].psrc, answer[ARP].pdst) == ("192.0.2.77", "0.0.0.0")


@pytest.mark.parametrize(
    "fields",
    [
        {"psrc": "192.0.2.2", "pdst": "192.0.2.2"},  # announcement, gratuitous request
        {"psrc": "192.0.2.9", "pdst": "192.0.2.9"},
        {"psrc": "0.0.0.0", "pdst": "192.0.2.2"},  # its own conflict probe
        {"psrc": "192.0.2.7", "pdst": "192.0.2.2"},
        {"op": 2},
        {"op": 2, "psrc": "192.0.2.2", "pdst": "192.0.2.2"},  # gratuitous reply
        {"op": 3},
        {"hwtype": 6},
        {"ptype": 0x86DD},
        {"hwlen": 8},
        {"plen": 16},
    ],
)
def test_no_question_no_answer(fields):
    assert reply(bytes(request(**fields)), NET) is None


def test_frames_that_are_not_plain_arp():
    frame = bytes(request())
    tagged = Ether(src=GUEST_MAC, dst="ff:ff:ff:ff:ff:ff") / Dot1Q(vlan=3) / ARP(pdst="192.0.2.1")
    assert reply(bytes(tagged), NET) is None
    assert reply(frame[:6] + b"\x01" + frame[7:], NET) is None  # a group address as source
    assert reply(frame[:12] + b"\x08\x00" + frame[14:], NET) is None
    for length in range(42):
        assert reply(frame[:length], NET) is None
    assert reply(frame[:42], NET) is not None


def test_switches_and_own_mac():
    assert reply(bytes(request()), NET.replaced(ipv4=False)) is None
    answer = Ether(reply(bytes(request()), NET.replaced(our_mac=bytes.fromhex("020000000001"))))
    assert (answer.src, answer[ARP].hwsrc) == ("02:00:00:00:00:01", "02:00:00:00:00:01")


def test_longest_frame():
    """Beyond 2048 bytes nothing is parsed: no guest can make us work on more."""
    assert reply(bytes(request()).ljust(2048, b"\0"), NET) is not None
    assert reply(bytes(request()).ljust(2049, b"\0"), NET) is None


@unhurried
@given(st.binary(max_size=128))
def test_random_bytes_never_raise(frame):
    for data in (frame, frame[:12] + b"\x08\x06" + frame[12:]):
        answer = reply(data, NET)
        assert answer is None or len(answer) == 60
        assert replies(data, NET) in ([], [answer])


@unhurried
@given(st.lists(st.tuples(st.integers(0, 59), st.integers(0, 255)), max_size=6), st.integers(0, 60))
def test_mutated_requests_never_raise(changes, length):
    frame = bytearray(bytes(request()).ljust(60, b"\0"))
    for at, value in changes:
        frame[at] = value
    answer = reply(bytes(frame[:length]), NET)
    assert answer is None or (len(answer) == 60 and Ether(answer)[ARP].op == 2)
