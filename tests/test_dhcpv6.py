"""DHCPv6: messages built and answers dissected by scapy, checksums recomputed by it."""

from ipaddress import IPv6Address

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.dhcp6 import (
    DUID_LL,
    DHCP6_Advertise,
    DHCP6_Confirm,
    DHCP6_Decline,
    DHCP6_InfoRequest,
    DHCP6_Rebind,
    DHCP6_RelayForward,
    DHCP6_Release,
    DHCP6_Renew,
    DHCP6_Reply,
    DHCP6_Request,
    DHCP6_Solicit,
    DHCP6OptClientFQDN,
    DHCP6OptClientId,
    DHCP6OptDNSDomains,
    DHCP6OptDNSServers,
    DHCP6OptElapsedTime,
    DHCP6OptIA_NA,
    DHCP6OptIA_PD,
    DHCP6OptIA_TA,
    DHCP6OptIAAddress,
    DHCP6OptOptReq,
    DHCP6OptPref,
    DHCP6OptRapidCommit,
    DHCP6OptServerId,
    DHCP6OptStatusCode,
    DHCP6OptUnknown,
)
from scapy.layers.inet import UDP
from scapy.layers.inet6 import IPv6, in6_chksum
from scapy.layers.l2 import Ether

from dataplane.slow import replies
from dataplane.slow.dhcpv6 import reply
from dataplane.slow.net import Net

# a busy machine is no failure
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

GUEST_MAC = "52:54:00:12:34:56"
GUEST = "fe80::5054:ff:fe12:3456"
OUR_MAC = "56:48:4d:51:00:01"
SERVERS_AND_RELAYS = "ff02::1:2"
LEASE = "2001:db8:1:2::9"
NET = Net(
    addr6=IPv6Address(LEASE),
    gateway6=IPv6Address("fe80::fc"),
    link_local6=IPv6Address("fe80::fc"),
    dns6=(IPv6Address("2001:db8::53"), IPv6Address("fe80::fc")),
    search=("corp.example", "example.org"),
)
FULL = NET.replaced(fqdn="guest.example")
CLIENT_ID = DHCP6OptClientId(duid=DUID_LL(lladdr=GUEST_MAC))
SERVER_ID = DHCP6OptServerId(duid=DUID_LL(lladdr=OUR_MAC))
OTHER_SERVER_ID = DHCP6OptServerId(duid=DUID_LL(lladdr="02:00:00:00:00:09"))
ASSOCIATION = DHCP6OptIA_NA(iaid=0xCAFE)
SUCCESS, NO_ADDRS_AVAIL, NOT_ON_LINK, USE_MULTICAST, NO_PREFIX_AVAIL = 0, 2, 4, 5, 6


def holding(*addresses, kind=DHCP6OptIA_NA, iaid=0xCAFE):
    """An identity association that names addresses."""
    return kind(iaid=iaid, **{OPTIONS_FIELD[kind]: [DHCP6OptIAAddress(addr=a) for a in addresses]})


OPTIONS_FIELD = {DHCP6OptIA_NA: "ianaopts", DHCP6OptIA_TA: "iataopts", DHCP6OptIA_PD: "iapdopt"}


def client(message, *options, src=GUEST, dst=SERVERS_AND_RELAYS):
    packet = IPv6(src=src, dst=dst) / UDP(sport=546, dport=547) / message(trid=0xABCDEF)
    for option in options:
        packet = packet / option
    return Ether(src=GUEST_MAC, dst="33:33:00:01:00:02") / packet


def dissect(frame):
    """The reply as scapy sees it, after what holds for every reply."""
    packet = Ether(frame)
    ip = packet[IPv6]
    assert (packet.src, packet.dst, ip.hlim) == (OUR_MAC, GUEST_MAC, 64)
    assert ip.plen == packet[UDP].len == len(frame) - 54 <= 1240
    assert packet[UDP].chksum != 0 and in6_chksum(17, ip, bytes(ip.payload)) == 0
    assert (packet[UDP].sport, packet[UDP].dport) == (547, 546)
    assert packet[DHCP6OptServerId].duid == SERVER_ID.duid
    return packet


def ask(question, net=NET, **arguments):
    frame = reply(bytes(question), net, **arguments)
    assert frame is not None
    assert replies(bytes(question), net, **arguments) == [frame]
    packet = dissect(frame)
    assert (packet[IPv6].src, packet[IPv6].dst) == (str(net.link_local6), question[IPv6].src)
    assert packet[UDP].payload.trid == 0xABCDEF
    if DHCP6OptClientId in question:
        assert bytes(packet[DHCP6OptClientId].duid) == bytes(question[DHCP6OptClientId].duid)
    return packet


def associations(packet):
    """[(class, iaid, {address: (preferred, valid)}, [status])] of a reply."""
    found = []
    for kind, field in OPTIONS_FIELD.items():
        number = 1
        while association := packet.getlayer(kind, number):
            options = association.getfieldval(field)
            addresses = {
                option.addr: (option.preflft, option.validlft)
                for option in options
                if isinstance(option, DHCP6OptIAAddress)
            }
            statuses = [o.statuscode for o in options if isinstance(o, DHCP6OptStatusCode)]
            found.append((kind, association.iaid, addresses, statuses))
            number += 1
    return found


FOREVER = (0xFFFFFFFF, 0xFFFFFFFF)
LEASED: list[tuple] = [(DHCP6OptIA_NA, 0xCAFE, {LEASE: FOREVER}, [])]


def test_solicit():
    question = client(
        DHCP6_Solicit,
        CLIENT_ID,
        DHCP6OptElapsedTime(),
        DHCP6OptOptReq(reqopts=[23, 24, 39]),
        ASSOCIATION,
    )
    packet = ask(question)
    assert packet[UDP].payload.__class__ is DHCP6_Advertise
    assert packet[DHCP6OptPref].prefval == 255
    assert associations(packet) == LEASED
    assert (packet[DHCP6OptIA_NA].T1, packet[DHCP6OptIA_NA].T2) == FOREVER
    assert packet[DHCP6OptDNSServers].dnsservers == ["2001:db8::53", "fe80::fc"]
    assert packet[DHCP6OptDNSDomains].dnsdomains == ["corp.example.", "example.org."]
    assert DHCP6OptRapidCommit not in packet and DHCP6OptClientFQDN not in packet


def test_solicit_with_a_wish_gets_our_address_all_the_same():
    packet = ask(client(DHCP6_Solicit, CLIENT_ID, holding("2001:db8:9::9")))
    assert associations(packet) == LEASED


def test_rapid_commit():
    question = client(DHCP6_Solicit, CLIENT_ID, ASSOCIATION, DHCP6OptRapidCommit())
    packet = ask(question)
    assert packet[UDP].payload.__class__ is DHCP6_Reply
    assert DHCP6OptRapidCommit in packet and DHCP6OptPref not in packet
    assert associations(packet) == LEASED
    packet = ask(question, NET.replaced(addr6=None))
    assert packet[UDP].payload.__class__ is DHCP6_Advertise
    assert DHCP6OptRapidCommit not in packet


@pytest.mark.parametrize(
    "message, server",
    [(DHCP6_Request, [SERVER_ID]), (DHCP6_Renew, [SERVER_ID]), (DHCP6_Rebind, [])],
)
def test_lease(message, server):
    for association in (ASSOCIATION, holding(LEASE)):
        packet = ask(client(message, CLIENT_ID, *server, association))
        assert packet[UDP].payload.__class__ is DHCP6_Reply
        assert associations(packet) == LEASED
        assert packet[DHCP6OptDNSServers].dnsservers[0] == "2001:db8::53"


def test_request_for_another_address():
    """RFC 8415 18.3.2: the status is in the association, and it holds no address."""
    packet = ask(client(DHCP6_Request, CLIENT_ID, SERVER_ID, holding("2001:db8:1:2::8")))
    assert associations(packet) == [(DHCP6OptIA_NA, 0xCAFE, {}, [NOT_ON_LINK])]


@pytest.mark.parametrize("message, server", [(DHCP6_Renew, [SERVER_ID]), (DHCP6_Rebind, [])])
def test_renewal_of_another_address(message, server):
    """RFC 8415 18.3.4: the old one ends now, ours takes its place; the guest is renumbered."""
    question = client(message, CLIENT_ID, *server, holding("2001:db8:7::7", LEASE))
    assert associations(ask(question)) == [
        (DHCP6OptIA_NA, 0xCAFE, {LEASE: FOREVER, "2001:db8:7::7": (0, 0)}, [])
    ]
    assert associations(ask(question, NET.replaced(addr6=None))) == [
        (DHCP6OptIA_NA, 0xCAFE, {LEASE: (0, 0), "2001:db8:7::7": (0, 0)}, [NO_ADDRS_AVAIL])
    ]


@pytest.mark.parametrize(
    "held, status",
    [
        ([holding(LEASE)], SUCCESS),
        ([holding(LEASE, kind=DHCP6OptIA_TA)], SUCCESS),
        ([holding("2001:db8:1:2::8")], NOT_ON_LINK),
        ([holding(LEASE, "2001:db8:7::7")], NOT_ON_LINK),
        ([holding(LEASE), holding("2001:db8:7::7", kind=DHCP6OptIA_TA)], NOT_ON_LINK),
    ],
)
def test_confirm(held, status):
    packet = ask(client(DHCP6_Confirm, CLIENT_ID, *held))
    assert packet[UDP].payload.__class__ is DHCP6_Reply
    assert packet[DHCP6OptStatusCode].statuscode == status
    assert associations(packet) == []
    packet = ask(client(DHCP6_Confirm, CLIENT_ID, *held), NET.replaced(addr6=None))
    assert packet[DHCP6OptStatusCode].statuscode == NOT_ON_LINK


@pytest.mark.parametrize("held", [[], [ASSOCIATION], [DHCP6OptIA_PD(iaid=1)]])
def test_confirm_of_nothing(held):
    """RFC 8415 18.3.3: no answer."""
    assert reply(bytes(client(DHCP6_Confirm, CLIENT_ID, *held)), NET) is None


@pytest.mark.parametrize("message", [DHCP6_Release, DHCP6_Decline])
def test_giving_up(message):
    packet = ask(client(message, CLIENT_ID, SERVER_ID, holding(LEASE)))
    assert packet[UDP].payload.__class__ is DHCP6_Reply
    assert packet[DHCP6OptStatusCode].statuscode == SUCCESS
    assert associations(packet) == []


@pytest.mark.parametrize("options", [[], [CLIENT_ID], [SERVER_ID], [CLIENT_ID, SERVER_ID]])
def test_information_request(options):
    packet = ask(client(DHCP6_InfoRequest, *options))
    assert packet[UDP].payload.__class__ is DHCP6_Reply
    assert packet[DHCP6OptDNSServers].dnsservers == ["2001:db8::53", "fe80::fc"]
    assert associations(packet) == []
    assert (DHCP6OptClientId in packet) == (CLIENT_ID in options)


def test_one_address_for_many_associations():
    """The first IA_NA gets it; no temporary addresses, no prefixes."""
    question = client(
        DHCP6_Solicit,
        CLIENT_ID,
        DHCP6OptIA_TA(iaid=1),
        DHCP6OptIA_NA(iaid=2),
        DHCP6OptIA_PD(iaid=3),
        DHCP6OptIA_NA(iaid=4),
    )
    assert associations(ask(question)) == [
        (DHCP6OptIA_NA, 2, {LEASE: FOREVER}, []),
        (DHCP6OptIA_NA, 4, {}, [NO_ADDRS_AVAIL]),
        (DHCP6OptIA_TA, 1, {}, [NO_ADDRS_AVAIL]),
        (DHCP6OptIA_PD, 3, {}, [NO_PREFIX_AVAIL]),
    ]


def test_no_address_to_give():
    """Local mode: no lease, but name servers."""
    net = NET.replaced(addr6=None, dns6=(IPv6Address("fe80::1"),))
    refused = [(DHCP6OptIA_NA, 0xCAFE, {}, [NO_ADDRS_AVAIL])]
    assert associations(ask(client(DHCP6_Solicit, CLIENT_ID, ASSOCIATION), net)) == refused
    question = client(DHCP6_Request, CLIENT_ID, SERVER_ID, holding(LEASE))
    assert associations(ask(question, net)) == refused
    packet = ask(client(DHCP6_InfoRequest), net)
    assert packet[DHCP6OptDNSServers].dnsservers == ["fe80::1"]


@pytest.mark.parametrize(
    "message, options",
    [
        (DHCP6_Solicit, [ASSOCIATION]),
        (DHCP6_Solicit, [CLIENT_ID, SERVER_ID, ASSOCIATION]),
        (DHCP6_Request, [CLIENT_ID, ASSOCIATION]),
        (DHCP6_Request, [SERVER_ID, ASSOCIATION]),
        (DHCP6_Request, [CLIENT_ID, OTHER_SERVER_ID, ASSOCIATION]),
        (DHCP6_Renew, [CLIENT_ID, OTHER_SERVER_ID, ASSOCIATION]),
        (DHCP6_Renew, [CLIENT_ID, ASSOCIATION]),
        (DHCP6_Rebind, [CLIENT_ID, SERVER_ID, ASSOCIATION]),
        (DHCP6_Rebind, [ASSOCIATION]),
        (DHCP6_Confirm, [CLIENT_ID, SERVER_ID, holding(LEASE)]),
        (DHCP6_Confirm, [holding(LEASE)]),
        (DHCP6_Release, [CLIENT_ID, OTHER_SERVER_ID]),
        (DHCP6_Decline, [SERVER_ID]),
        (DHCP6_InfoRequest, [CLIENT_ID, OTHER_SERVER_ID]),
        (DHCP6_InfoRequest, [CLIENT_ID, ASSOCIATION]),
        (DHCP6_Advertise, [CLIENT_ID, SERVER_ID, ASSOCIATION]),
        (DHCP6_Reply, [CLIENT_ID, SERVER_ID, ASSOCIATION]),
        (DHCP6_Solicit, [DHCP6OptUnknown(optcode=1, data=b""), ASSOCIATION]),
        (DHCP6_Solicit, [DHCP6OptUnknown(optcode=1, data=b"x" * 131), ASSOCIATION]),
        (DHCP6_Solicit, [CLIENT_ID, DHCP6OptUnknown(optcode=3, data=b"x" * 11)]),
        (DHCP6_Solicit, [CLIENT_ID, DHCP6OptUnknown(optcode=4, data=b"x" * 3)]),
        (DHCP6_Solicit, [CLIENT_ID, DHCP6OptUnknown(optcode=3, data=bytes(12) + b"\0\5\0\x18")]),
        (
            DHCP6_Solicit,
            [CLIENT_ID, DHCP6OptUnknown(optcode=3, data=bytes(12) + b"\0\5\0\x10" + bytes(16))],
        ),
        (DHCP6_Confirm, [CLIENT_ID, DHCP6OptUnknown(optcode=3, data=b"x" * 3)]),
    ],
)
def test_refusals(message, options):
    """RFC 8415 16: identities that do not fit the message; malformed options."""
    assert reply(bytes(client(message, *options)), NET) is None


def test_longest_client_id():
    option = DHCP6OptUnknown(optcode=1, data=b"\0\4" + b"x" * 128)
    frame = reply(bytes(client(DHCP6_Solicit, option, ASSOCIATION)), NET)
    assert b"\0\1\0\x82\0\4" + b"x" * 128 in frame


@pytest.mark.parametrize(
    "message, options",
    [
        (DHCP6_Request, [SERVER_ID]),
        (DHCP6_Renew, [SERVER_ID]),
        (DHCP6_Release, [SERVER_ID]),
        (DHCP6_Decline, [SERVER_ID]),
        (DHCP6_Solicit, []),
        (DHCP6_Rebind, []),
        (DHCP6_Confirm, []),
        (DHCP6_InfoRequest, []),
    ],
)
def test_unicast(message, options):
    """RFC 8415 16 and 18.4: never agreed, so told to stop or discarded."""
    question = client(message, CLIENT_ID, *options, holding(LEASE), dst="fe80::fc")
    if options:
        packet = ask(question)
        assert packet[DHCP6OptStatusCode].statuscode == USE_MULTICAST
        assert associations(packet) == [] and DHCP6OptDNSServers not in packet
    else:
        assert reply(bytes(question), NET) is None


def test_relayed_messages_are_not_for_us():
    inner = DHCP6_RelayForward(linkaddr="::", peeraddr=GUEST)
    packet = IPv6(src=GUEST, dst=SERVERS_AND_RELAYS) / UDP(sport=547, dport=547) / inner
    assert reply(bytes(Ether(src=GUEST_MAC, dst=OUR_MAC) / packet), NET) is None


@pytest.mark.parametrize(
    "changes, servers, domains",
    [
        ({"no_dhcp_dns": True}, False, True),
        ({"no_dhcp_search": True}, True, False),
        ({"dns6": ()}, False, True),
        ({"search": ()}, True, False),
        ({"search": ("x" * 64, ".", "")}, True, False),
    ],
)
def test_what_is_not_sent(changes, servers, domains):
    packet = ask(client(DHCP6_InfoRequest), NET.replaced(**changes))
    assert (DHCP6OptDNSServers in packet, DHCP6OptDNSDomains in packet) == (servers, domains)


@pytest.mark.parametrize(
    "asked, flags",
    [([], 4), ([DHCP6OptClientFQDN(flags=0)], 4), ([DHCP6OptClientFQDN(flags=1)], 6)],
)
def test_fqdn(asked, flags):
    """RFC 4704 4.1: we update nothing (N); that overrides (O) a client that asks for it (S)."""
    net = NET.replaced(fqdn="guest.example")
    packet = ask(client(DHCP6_Solicit, CLIENT_ID, ASSOCIATION, *asked), net)
    option = packet[DHCP6OptClientFQDN]
    assert (option.flags, option.fqdn) == (flags, b"guest.example.")
    assert bytes(option)[5:20] == b"\x05guest\x07example\0"


def test_long_lists_are_cut_to_the_minimum_mtu():
    many = tuple(IPv6Address(f"2001:db8::{number:x}") for number in range(200))
    names = tuple(f"department-{number}.example" for number in range(200))
    long = NET.replaced(search=names, fqdn="g" * 63 + ".example")
    packet = ask(client(DHCP6_Solicit, CLIENT_ID, ASSOCIATION), long)
    domains = packet[DHCP6OptDNSDomains].dnsdomains
    assert domains == [name + "." for name in names[: len(domains)]] and len(domains) > 20
    packet = ask(client(DHCP6_Solicit, CLIENT_ID, ASSOCIATION), long.replaced(dns6=many))
    servers = packet[DHCP6OptDNSServers].dnsservers
    assert servers == [str(server) for server in many[: len(servers)]] and len(servers) > 60
    assert associations(packet) == LEASED
    sizes = set()
    for length in range(1, 131):  # one byte less room at a time
        client_id = DHCP6OptUnknown(optcode=1, data=b"x" * length)
        for net in (long, long.replaced(dns6=many), NET.replaced(dns6=many[:70], fqdn="g.example")):
            frame = reply(bytes(client(DHCP6_Solicit, client_id, ASSOCIATION)), net)
            assert walk(dissect(frame)) >= {1, 2, 3, 7, 23}
            sizes.add(len(frame))
    assert max(sizes) == 14 + 1280


def walk(packet):
    """The codes of the options in a reply; they end where the datagram does."""
    data = bytes(packet[UDP].payload)[4:]
    codes, at = set(), 0
    while at < len(data):
        codes.add(int.from_bytes(data[at : at + 2], "big"))
        at += 4 + int.from_bytes(data[at + 2 : at + 4], "big")
    assert at == len(data)
    return codes


def test_more_associations_than_fit():
    """Configuration gives way to associations; where even they do not fit there is no answer."""
    answered = [44]
    for count in range(45, 60):
        asked = [DHCP6OptIA_NA(iaid=number) for number in range(count)]
        frame = reply(bytes(client(DHCP6_Solicit, CLIENT_ID, *asked)), FULL)
        if frame is not None:
            assert len(associations(dissect(frame))) == count
            assert walk(dissect(frame)) <= {1, 2, 3, 7, 23, 24, 39}
            answered.append(count)
    assert answered == list(range(44, answered[-1] + 1))
    others = answered[-1] - 1  # the first association gets an address, the others a status
    assert others == (1280 - 40 - 8 - 4 - (4 + 10) * 2 - 5 - (4 + 12 + 4 + 24)) // (4 + 12 + 4 + 2)


def test_switched_off():
    question = bytes(client(DHCP6_Solicit, CLIENT_ID, ASSOCIATION))
    assert reply(question, NET.replaced(no_dhcpv6=True)) is None
    assert reply(question, NET.replaced(ipv6=False)) is None


def test_outer_layers():
    for layer, field, value in [
        (UDP, "dport", 546),
        (UDP, "chksum", 0),  # RFC 8200 8.1: never "none" in IPv6
        (UDP, "chksum", 0x1234),
        (UDP, "len", 7),
        (UDP, "len", 1400),
        (IPv6, "version", 4),
        (IPv6, "plen", 1400),
        (IPv6, "plen", 7),
        (IPv6, "nh", 6),
        (IPv6, "src", "::"),
        (IPv6, "src", "ff02::1"),
        (Ether, "src", "33:33:00:00:00:01"),
        (Ether, "type", 0x0800),
    ]:
        packet = client(DHCP6_Solicit, CLIENT_ID, ASSOCIATION)
        packet[layer].setfieldval(field, value)
        assert reply(bytes(packet), NET) is None, (layer, field, value)
    frame = bytes(client(DHCP6_Solicit, CLIENT_ID, ASSOCIATION))
    assert all(reply(frame[:length], NET) is None for length in range(len(frame)))
    assert reply(frame + b"\xff" * 9, NET) == reply(frame, NET)


def test_unfinished_checksum():
    packet = client(DHCP6_Solicit, CLIENT_ID, ASSOCIATION)
    right = reply(bytes(packet), NET)
    for value in (0, 0x1234):
        packet[UDP].chksum = value
        assert reply(bytes(packet), NET, checksum_trusted=True) == right


def with_body(body, kind=1):
    head = IPv6(src=GUEST, dst=SERVERS_AND_RELAYS) / UDP(sport=546, dport=547)
    return bytes(
        Ether(src=GUEST_MAC, dst=OUR_MAC) / head / (bytes([kind]) + b"\xab\xcd\xef" + body)
    )


@pytest.mark.parametrize("tail", [b"\0", b"\0\1\0", b"\0\1\0\1", b"\0\x17\xff\xff"])
def test_truncated_options(tail):
    valid = bytes(CLIENT_ID) + bytes(ASSOCIATION)
    assert reply(with_body(valid), NET) is not None
    assert reply(with_body(valid + tail), NET) is None


ANY_OPTION = st.one_of(
    st.sampled_from([CLIENT_ID, SERVER_ID, ASSOCIATION, holding(LEASE), holding("::1")]).map(bytes),
    st.tuples(st.integers(0, 45), st.binary(max_size=60)).map(
        lambda option: option[0].to_bytes(2, "big") + len(option[1]).to_bytes(2, "big") + option[1]
    ),
)


@unhurried
@given(st.integers(0, 14), st.lists(ANY_OPTION, max_size=8), st.binary(max_size=5))
def test_any_options_never_raise(kind, options, tail):
    for frame in (with_body(b"".join(options), kind), with_body(b"".join(options) + tail, kind)):
        for net in (FULL, Net()):
            answer = reply(frame, net)
            assert answer is None or dissect(answer)


def test_longest_frame():
    """Beyond 2048 bytes nothing is parsed: no guest can make us work on more."""
    assert reply(VALID.ljust(2048, b"\0"), NET) is not None
    assert reply(VALID.ljust(2049, b"\0"), NET) is None


@unhurried
@given(st.binary(max_size=200))
def test_random_bytes_never_raise(data):
    for frame in (data, with_body(b"")[:54] + data, with_body(data)):
        for trusted in (False, True):
            answer = reply(frame, FULL, trusted)
            assert answer is None or dissect(answer)
            assert replies(frame, FULL, trusted) == ([] if answer is None else [answer])


VALID = bytes(client(DHCP6_Renew, CLIENT_ID, SERVER_ID, holding(LEASE), DHCP6OptClientFQDN()))


@unhurried
@given(
    st.lists(st.tuples(st.integers(14, len(VALID) - 1), st.integers(0, 255)), max_size=8),
    st.integers(54, len(VALID)),
)
def test_mutated_messages_never_raise(changes, length):
    frame = bytearray(VALID)
    for at, value in changes:
        frame[at] = value
    for data in (bytes(frame), bytes(frame[:length])):
        answer = reply(data, FULL, checksum_trusted=True)
        assert answer is None or dissect(answer)
