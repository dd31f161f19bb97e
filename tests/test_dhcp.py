"""DHCPv4: requests built and answers dissected by scapy, checksums recomputed by it."""

from ipaddress import IPv4Address

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import IP, UDP, in4_chksum
from scapy.layers.l2 import Ether
from scapy.utils import checksum as scapy_checksum

from dataplane.slow import replies
from dataplane.slow.dhcp import reply
from dataplane.slow.net import Net

# a busy machine is no failure
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

GUEST_MAC = "52:54:00:12:34:56"
GUEST_MAC_BYTES = bytes.fromhex("525400123456")
OUR_MAC = "56:48:4d:51:00:01"
NET = Net(
    addr4=IPv4Address("192.0.2.2"),
    prefix4=24,
    gateway4=IPv4Address("192.0.2.1"),
    our_addr4=IPv4Address("192.0.2.1"),
    dns4=(IPv4Address("192.0.2.53"), IPv4Address("198.51.100.53")),
    search=("corp.example", "lab.corp.example", "example"),
    mtu=65520,
)
FULL = NET.replaced(hostname="guest", fqdn="guest.example")
ESSENTIAL = {"message-type", "server_id", "lease_time", "subnet_mask", "router"}


def client(options, src="0.0.0.0", dst="255.255.255.255", sport=68, **bootp):
    ether = Ether(src=GUEST_MAC, dst="ff:ff:ff:ff:ff:ff")
    fields = {"op": 1, "chaddr": GUEST_MAC_BYTES, "xid": 0xDEADBEEF} | bootp
    message = BOOTP(**fields) / DHCP(options=[*options, "end"])
    return ether / IP(src=src, dst=dst, id=0) / UDP(sport=sport, dport=67) / message


def discover(*options, **bootp):
    return client([("message-type", "discover"), *options], **bootp)


def request(*options, **fields):
    return client([("message-type", "request"), *options], **fields)


def dissect(frame):
    """(packet, its options in order) of a reply, after what holds for every reply."""
    packet = Ether(frame)
    ip = packet[IP]
    assert (packet.src, ip.src, ip.ttl, ip.ihl) == (OUR_MAC, "192.0.2.1", 64, 5)
    assert (ip.id, ip.flags, ip.frag) == (0, "DF", 0)  # RFC 6864 4.1
    assert ip.len == len(frame) - 14 and packet[UDP].len == ip.len - 20
    assert scapy_checksum(bytes(ip)[:20]) == 0
    assert in4_chksum(17, ip, bytes(ip.payload)) == 0 and packet[UDP].chksum != 0
    assert packet[UDP].sport == 67 and packet[UDP].len >= 8 + 300
    assert packet[BOOTP].op == 2 and packet[BOOTP].siaddr == "0.0.0.0"
    assert bytes(packet[BOOTP].options) == bytes([99, 130, 83, 99])
    return packet, [option for option in packet[DHCP].options if isinstance(option, tuple)]


def ask(question, net=NET, **arguments):
    """(packet, {option name: value}) that answers `question`."""
    frame = reply(bytes(question), net, **arguments)
    assert replies(bytes(question), net, **arguments) == [frame]
    packet, options = dissect(frame)
    return packet, {name: values[0] if len(values) == 1 else values for name, *values in options}


def raw_options(packet):
    """{code: data} walked by hand: scapy gives names and types to some."""
    data = bytes(packet[UDP].payload)[240:]
    options, at = {}, 0
    while data[at] != 255:
        options[data[at]] = data[at + 2 : at + 2 + data[at + 1]]
        at += 2 + data[at + 1]
    return options


def test_discover():
    packet, options = ask(discover(hops=3, secs=7))
    bootp = packet[BOOTP]
    assert (bootp.htype, bootp.hlen, bootp.xid) == (1, 6, 0xDEADBEEF)
    assert (bootp.hops, bootp.secs, bootp.flags) == (0, 0, 0)
    assert (bootp.yiaddr, bootp.ciaddr, bootp.giaddr) == ("192.0.2.2", "0.0.0.0", "0.0.0.0")
    assert bootp.chaddr == GUEST_MAC_BYTES + bytes(10)
    assert (packet.dst, packet[IP].dst, packet[UDP].dport) == (GUEST_MAC, "192.0.2.2", 68)
    assert options["message-type"] == 2
    assert (options["server_id"], options["lease_time"]) == ("192.0.2.1", 0xFFFFFFFF)
    assert (options["subnet_mask"], options["router"]) == ("255.255.255.0", "192.0.2.1")
    assert options["name_server"] == ["192.0.2.53", "198.51.100.53"]
    assert options["interface-mtu"] == 65520
    assert options["domain"] == b"corp.example"
    assert "hostname" not in options and 121 not in raw_options(packet)
    assert raw_options(packet)[119] == (
        b"\x04corp\x07example\0" + b"\x03lab\xc0\x00" + b"\xc0\x05"  # RFC 3397: pointers
    )


def test_rapid_commit():
    """RFC 4039: the answer to DISCOVER is the lease, and says so."""
    packet, options = ask(discover((80, b"")))
    assert (options["message-type"], packet[BOOTP].yiaddr) == (5, "192.0.2.2")
    assert raw_options(packet)[80] == b""
    packet, _ = ask(request((80, b"")))
    assert 80 not in raw_options(packet)


@pytest.mark.parametrize(
    "question",
    [
        request(("server_id", "192.0.2.1"), ("requested_addr", "192.0.2.2")),  # SELECTING
        request(("requested_addr", "192.0.2.2")),  # INIT-REBOOT
        request(ciaddr="192.0.2.2", src="192.0.2.2", dst="192.0.2.1"),  # RENEWING
        request(ciaddr="192.0.2.2", src="192.0.2.2"),  # REBINDING
        request(),  # names no address at all: it can only mean ours
    ],
)
def test_request(question):
    packet, options = ask(question)
    assert options["message-type"] == 5
    assert packet[BOOTP].yiaddr == "192.0.2.2"
    assert packet[BOOTP].ciaddr == question[BOOTP].ciaddr
    assert ESSENTIAL <= set(options)


@pytest.mark.parametrize(
    "question",
    [
        request(("server_id", "192.0.2.1"), ("requested_addr", "192.0.2.3")),
        request(("requested_addr", "10.0.2.15"), flags=0),
        request(("requested_addr", "10.0.2.15"), flags=0x8000),
        request(ciaddr="10.0.2.15", src="10.0.2.15", dst="10.0.2.2"),
    ],
)
def test_request_for_another_address(question):
    """RFC 2131 4.3.2 and table 3: NAK to everybody, with nothing in it but the reason."""
    packet, options = ask(question)
    assert set(options) == {"message-type", "server_id", "error_message"}
    assert options["message-type"] == 6
    assert (packet.dst, packet[IP].dst) == ("ff:ff:ff:ff:ff:ff", "255.255.255.255")
    assert packet[BOOTP].yiaddr == packet[BOOTP].ciaddr == "0.0.0.0"


def test_request_to_another_server():
    assert reply(bytes(request(("server_id", "192.0.2.9"))), NET) is None


def test_inform():
    """RFC 2131 3.4: configuration for an address from elsewhere, to that address, without lease."""
    question = client([("message-type", "inform")], ciaddr="192.0.2.200", src="192.0.2.200")
    packet, options = ask(question)
    assert (packet[BOOTP].yiaddr, packet[BOOTP].ciaddr) == ("0.0.0.0", "192.0.2.200")
    assert (packet[IP].dst, packet.dst) == ("192.0.2.200", GUEST_MAC)
    assert options["message-type"] == 5 and "name_server" in options
    assert "lease_time" not in options
    packet, _ = ask(client([("message-type", "inform")], src="192.0.2.200"))
    assert packet[IP].dst == "192.0.2.200"
    packet, _ = ask(client([("message-type", "inform")]))
    assert (packet[IP].dst, packet.dst) == ("255.255.255.255", "ff:ff:ff:ff:ff:ff")


@pytest.mark.parametrize("kind", ["decline", "release", "offer", "ack", "nak", 0, 9, 13, 255])
def test_nothing_to_answer(kind):
    assert reply(bytes(client([("message-type", kind)])), NET) is None


def test_bootp():
    """No option 53 in, none out: RFC 1534. The answer has the size every BOOTP client takes."""
    packet, options = ask(client([]), NET.replaced(hostname="guest", fqdn="guest.example"))
    assert packet[BOOTP].yiaddr == "192.0.2.2"
    assert set(options) == {
        "subnet_mask",
        "router",
        "name_server",
        "hostname",
        "interface-mtu",
        "domain",
    }
    assert packet[UDP].len == 8 + 300
    long = NET.replaced(dns4=NET.dns4 * 5, hostname="h" * 20)
    packet, options = ask(client([]), long)
    assert packet[UDP].len == 8 + 300 and "name_server" in options and "hostname" not in options
    without_magic = client([])
    without_magic[UDP].remove_payload()
    bootp = BOOTP(op=1, chaddr=GUEST_MAC_BYTES, options=b"")
    assert ask(without_magic / bootp)[0][BOOTP].yiaddr == "192.0.2.2"


@pytest.mark.parametrize(
    "fields, ip, port, mac",
    [
        ({}, "192.0.2.2", 68, GUEST_MAC),
        ({"flags": 0x8000}, "255.255.255.255", 68, "ff:ff:ff:ff:ff:ff"),
        ({"ciaddr": "192.0.2.2"}, "192.0.2.2", 68, GUEST_MAC),
        ({"ciaddr": "192.0.2.2", "flags": 0x8000}, "192.0.2.2", 68, GUEST_MAC),
        ({"giaddr": "198.51.100.1"}, "198.51.100.1", 67, GUEST_MAC),
        ({"giaddr": "198.51.100.1", "flags": 0x8000}, "198.51.100.1", 67, GUEST_MAC),
    ],
)
def test_where_the_answer_goes(fields, ip, port, mac):
    """RFC 2131 4.1."""
    packet, _ = ask(request(**fields))
    assert (packet[IP].dst, packet[UDP].dport, packet.dst) == (ip, port, mac)
    assert packet[BOOTP].flags == fields.get("flags", 0)
    assert packet[BOOTP].giaddr == fields.get("giaddr", "0.0.0.0")


def test_nak_through_a_relay():
    """RFC 2131 4.3.2: to the relay, which is told to broadcast it."""
    packet, options = ask(request(("requested_addr", "10.0.2.15"), giaddr="198.51.100.1"))
    assert options["message-type"] == 6
    assert (packet[IP].dst, packet[UDP].dport) == ("198.51.100.1", 67)
    assert packet[BOOTP].flags == 0x8000


@pytest.mark.parametrize("wishes", [[1, 3, 6], [119, 6, 3, 51, 1], [54, 53, 1], [6, 6, 6], [255]])
def test_order(wishes):
    """53 first, then as the client wishes, then the rest: nothing twice, nothing lost."""
    packet, _ = ask(discover(("param_req_list", wishes)))
    codes = list(raw_options(packet))
    assert codes[0] == 53
    wished = [code for code in dict.fromkeys(wishes) if code in codes and code != 53]
    assert codes[1 : 1 + len(wished)] == wished
    assert sorted(codes) == sorted(raw_options(ask(discover())[0]))


def test_router_on_another_subnet():
    """RFC 3442: first a route to the router itself, then everything through it."""
    net = NET.replaced(gateway4=IPv4Address("10.9.9.1"))
    packet, options = ask(discover(), net)
    assert options["router"] == "10.9.9.1"
    assert raw_options(packet)[121] == bytes([32, 10, 9, 9, 1, 0, 0, 0, 0, 0, 10, 9, 9, 1])
    packet, options = ask(discover(), NET.replaced(prefix4=32))
    assert options["subnet_mask"] == "255.255.255.255"
    assert raw_options(packet)[121][:5] == bytes([32, 192, 0, 2, 1])


@pytest.mark.parametrize(
    "changes, gone",
    [
        ({"no_dhcp_dns": True}, {6}),
        ({"no_dhcp_search": True}, {15, 119}),
        ({"dns4": ()}, {6}),
        ({"search": ()}, {15, 119}),
        ({"mtu": 0}, {26}),
        ({"mtu": 67}, {26}),
        ({"mtu": 68}, set()),
    ],
)
def test_what_is_not_sent(changes, gone):
    everything = set(raw_options(ask(discover())[0]))
    assert set(raw_options(ask(discover(), NET.replaced(**changes))[0])) == everything - gone


def test_names():
    net = NET.replaced(hostname="guest", fqdn="guest.dept.example")
    options = raw_options(ask(discover(), net)[0])
    assert options[12] == b"guest"
    assert options[15] == b"dept.example"
    assert options[81] == b"\x0c\xff\xff" + b"\x05guest\x04dept\x07example\0"  # N and E


@pytest.mark.parametrize(
    "asked, flags, name",
    [
        (b"\x04\0\0", 0x0C, b"\x05guest\x07example\0"),
        (b"\x05\0\0", 0x0E, b"\x05guest\x07example\0"),  # S is overridden: O
        (b"\x00\0\0old", 0x08, b"guest.example"),  # the deprecated ASCII form
        (b"\x01\0\0old", 0x0A, b"guest.example"),
    ],
)
def test_fqdn_follows_the_client(asked, flags, name):
    """RFC 4702 3 and 4."""
    packet, _ = ask(discover((81, asked)), NET.replaced(fqdn="guest.example."))
    assert raw_options(packet)[81] == bytes([flags, 255, 255]) + name


@pytest.mark.parametrize(
    "question", [discover, request, lambda option: request(option, ("requested_addr", "10.0.0.1"))]
)
def test_client_id_comes_back(question):
    """RFC 6842, in a NAK too."""
    packet, _ = ask(question(("client_id", b"\x01" + GUEST_MAC_BYTES)))
    assert raw_options(packet)[61] == b"\x01" + GUEST_MAC_BYTES
    assert 61 not in raw_options(ask(discover())[0])


def test_message_size():
    """576 bytes unless the client takes more (option 57), at most 1500; the lease always fits."""
    names = tuple(f"department-{number}.example-{number}.org" for number in range(40))
    servers = tuple(IPv4Address(f"10.0.0.{number}") for number in range(200))
    net = NET.replaced(search=names, dns4=servers, hostname="h" * 63, fqdn="f" * 63 + ".example")
    sizes = {}
    for said in (0, 100, 576, 700, 1400, 1500, 65535):
        option = [("max_dhcp_size", said)] if said else []
        packet, options = ask(discover(*option, ("client_id", b"\xff" * 255)), net)
        sizes[said] = packet[IP].len
        assert packet[IP].len <= max(576, min(said, 1500))
        assert {"message-type", "server_id", "lease_time", "subnet_mask", "router"} <= set(options)
    assert sizes[0] == sizes[100] == sizes[576] < sizes[700] < sizes[1400]
    assert len(raw_options(packet)[6]) == 252 and 200 < len(raw_options(packet)[119]) <= 255


def test_every_size_is_used_and_none_exceeded():
    """One byte more at a time, across every limit at which an option has to go."""
    names = tuple(f"d{number}.example-{number}.org" for number in range(40))
    for said in (576, 900):
        servers = tuple(IPv4Address(f"10.0.0.{number}") for number in range(said // 30))
        net = FULL.replaced(search=names, dns4=servers)
        sizes = []
        for length in range(100, 256):
            options = [("client_id", b"\xff" * length), ("max_dhcp_size", said)]
            packet, _ = ask(discover(*options), net)
            sizes.append(packet[IP].len)
            assert raw_options(packet).get(61, b"") == b"\xff" * length
        assert max(sizes) == said


def test_search_list_takes_the_room_that_is_left():
    names = tuple(f"d{number}.example-{number}.org" for number in range(40))
    for length in range(1, 150):
        packet, _ = ask(discover(("client_id", b"\xff" * length)), FULL.replaced(search=names))
        assert 10 < len(raw_options(packet)[119]) <= 255
        assert 576 - 20 < packet[IP].len <= 576 or len(raw_options(packet)[119]) > 235


def test_client_id_that_no_option_can_hold():
    """RFC 3396 lets a client send 256 bytes in two pieces; they are not sent back."""
    packet, _ = ask(discover(("client_id", b"x" * 255), ("client_id", b"x")))
    assert 61 not in raw_options(packet)


def test_options_in_pieces_and_elsewhere():
    """RFC 3396 (one option in two pieces), RFC 2131 4.1 (options in the file and name fields)."""
    packet, options = ask(request((50, b"\xc0\x00"), (50, b"\x02\x02")))
    assert options["message-type"] == 5
    packet, options = ask(request((50, b"\xc0\x00"), (50, b"\x02\x03")))
    assert options["message-type"] == 6
    for overload, field in ((1, "file"), (2, "sname")):
        packet, options = ask(
            request((52, bytes([overload])), **{field: b"\x32\x04\x0a\0\0\1\xff"})
        )
        assert options["message-type"] == 6
        broken = request((52, bytes([overload])), **{field: b"\x32\xff\x0a"})
        assert reply(bytes(broken), NET) is None
    for overload, field in ((b"", "file"), (b"\x01", "sname"), (b"\x02", "file")):
        packet, options = ask(request((52, overload), **{field: b"\x32\x04\x0a\0\0\1\xff"}))
        assert options["message-type"] == 5


def with_options(data):
    packet = client([])
    packet[UDP].remove_payload()
    return bytes(packet / BOOTP(op=1, chaddr=GUEST_MAC_BYTES, options=b"c\x82Sc" + data))


@pytest.mark.parametrize("data", [b"\x35", b"\x35\x01", b"\x35\x02\x01", b"\x35\x00", b"\x0c\xffx"])
def test_malformed_options(data):
    assert reply(with_options(data), NET) is None


def test_padding_and_missing_end():
    for data in (
        b"\0\0\x35\x01\x01",
        b"\x35\x01\x01\xff\x35",
        b"\x35\x01\x01" + b"\0" * 50,
        b"\x0c\x01x\0\0\0\x35\x01\x01",
        b"\x35\x01\x01\x50\x00",  # an empty option right at the end
    ):
        packet, _ = dissect(reply(with_options(data), NET))
        assert packet[BOOTP].yiaddr == "192.0.2.2"
        assert raw_options(packet)[53] == (b"\x05" if b"\x50" in data else b"\x02")


def test_switched_off():
    assert reply(bytes(discover()), NET.replaced(no_dhcp=True)) is None
    assert reply(bytes(discover()), NET.replaced(ipv4=False)) is None


def test_refusals():
    for layer, field, value in [
        (BOOTP, "op", 2),
        (BOOTP, "hlen", 17),
        (UDP, "dport", 68),
        (UDP, "len", 7),
        (UDP, "len", 1400),
        (UDP, "chksum", 0x1234),
        (IP, "chksum", 0x1234),
        (IP, "version", 6),
        (IP, "ihl", 4),
        (IP, "len", 27),
        (IP, "len", 1400),
        (IP, "frag", 1),
        (IP, "flags", "MF"),
        (IP, "proto", 6),
        (Ether, "src", "01:00:5e:00:00:01"),
        (Ether, "type", 0x86DD),
    ]:
        packet = discover()
        packet[layer].setfieldval(field, value)
        assert reply(bytes(packet), NET) is None, (layer, field, value)
    frame = bytes(discover())
    assert all(reply(frame[:length], NET) is None for length in range(len(frame)))


def test_longest_hardware_address():
    packet, _ = ask(discover(hlen=16, chaddr=bytes(range(16))))
    assert (packet[BOOTP].hlen, packet[BOOTP].chaddr) == (16, bytes(range(16)))


def test_checksums():
    """0 means "none" in IPv4 (RFC 768); an unfinished one is taken when the ring says so."""
    packet = discover()
    packet[UDP].chksum = 0
    assert reply(bytes(packet), NET) == reply(bytes(discover()), NET)
    packet[UDP].chksum = 0x1234
    assert reply(bytes(packet), NET) is None
    assert reply(bytes(packet), NET, checksum_trusted=True) == reply(bytes(discover()), NET)
    packet[IP].chksum = 0x1234
    assert reply(bytes(packet), NET, checksum_trusted=True) is None


def test_ip_options_and_trailing_bytes():
    packet = discover()
    packet[IP].options = b"\x01\x01\x01\x00"
    assert bytes(packet)[14] == 0x46
    assert reply(bytes(packet), NET) == reply(bytes(discover()), NET)
    assert reply(bytes(discover()) + b"\xff" * 9, NET) == reply(bytes(discover()), NET)


VALID = [
    bytes(discover((80, b""), ("param_req_list", [1, 3, 6, 119]), (81, b"\x05\0\0x"))),
    bytes(request(("requested_addr", "192.0.2.3"), (52, b"\x03"), ("max_dhcp_size", 1400))),
    bytes(client([("message-type", "inform")], ciaddr="192.0.2.9")),
    bytes(client([])),
]


def test_longest_frame():
    """Beyond 2048 bytes nothing is parsed: no guest can make us work on more."""
    assert reply(bytes(discover()).ljust(2048, b"\0"), NET) is not None
    assert reply(bytes(discover()).ljust(2049, b"\0"), NET) is None


@unhurried
@given(st.binary(max_size=400))
def test_random_bytes_never_raise(data):
    headed = with_options(b"")[:42] + data
    for frame in (data, headed, with_options(data)):
        for trusted in (False, True):
            answer = reply(frame, FULL, trusted)
            assert answer is None or dissect(answer)
            assert replies(frame, FULL, trusted) == ([] if answer is None else [answer])


@unhurried
@given(
    st.sampled_from(VALID),
    st.lists(st.tuples(st.integers(34, 330), st.integers(0, 255)), max_size=8),
    st.integers(34, 340),
)
def test_mutated_requests_never_raise(valid, changes, length):
    frame = bytearray(valid)
    for at, value in changes:
        frame[at % len(frame)] = value
    answer = reply(bytes(frame[:length]), FULL, checksum_trusted=True)
    assert answer is None or dissect(answer)
    if bytes(frame[:14]) == valid[:14]:  # repair the IPv4 header, so that the rest is looked at
        frame[14:24] = valid[14:24]
        frame[24:34] = valid[24:34]
        frame[38:40] = (len(frame) - 34).to_bytes(2, "big")
        answer = reply(bytes(frame), FULL, checksum_trusted=True)
        assert answer is None or dissect(answer)
