"""The grammar of forwarded ports, against a slow model of what it means."""

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from flows.forward import ANY4, ANY6, ForwardError, Port, parse

EPHEMERAL = range(32768, 61000)
ALL = [port for port in range(1, 65536) if port not in EPHEMERAL]


def ports(*specs, protocol="tcp", ephemeral=EPHEMERAL, **families):
    return parse(protocol, specs, ephemeral, **families)


def texts(*specs, **more):
    return [str(port) for port in ports(*specs, **more)]


def port(number, guest_port=None, address=None, interface=None, to=None, weak=False):
    address, to = (text and ip_address(text) for text in (address, to))
    return Port("tcp", address, interface, number, guest_port or number, to, weak)


# ---- passt's manual and what else is accepted ----------------------------------------------------


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("22", [port(22)]),
        ("22:23", [port(22, 23)]),
        ("22,25", [port(22), port(25)]),
        ("22-24", [port(22), port(23), port(24)]),
        ("22-24:32-34", [port(22, 32), port(23, 33), port(24, 34)]),
        ("192.0.2.1/22", [port(22, address="192.0.2.1")]),
        ("192.0.2.1%eth0/22", [port(22, address="192.0.2.1", interface="eth0")]),
        ("%eth0/22", [port(22, interface="eth0")]),
        ("*%eth0/22", [port(22, interface="eth0")]),
        ("*/22", [port(22)]),
        ("/22", [port(22)]),
        ("::1/22", [port(22, address="::1")]),
        ("[::1]/22", [port(22, address="::1")]),
        ("[fe80::1]%eth0/22", [port(22, address="fe80::1", interface="eth0")]),
        ("fe80::1%eth0/22", [port(22, address="fe80::1", interface="eth0")]),
        ("::ffff:192.0.2.1/22", [port(22, address="192.0.2.1")]),
        ("0.0.0.0/22", [port(22, address="0.0.0.0")]),
        ("::/22", [port(22, address="::")]),
        ("0.0.0.0/5000:192.0.2.5/6000", [port(5000, 6000, "0.0.0.0", to="192.0.2.5")]),
        ("0.0.0.0/5000:192.0.2.5", [port(5000, address="0.0.0.0", to="192.0.2.5")]),
        ("::/22:2001:db8::1/23", [port(22, 23, "::", to="2001:db8::1")]),
        ("::/22:[2001:db8::1]/23", [port(22, 23, "::", to="2001:db8::1")]),
        ("::/22:2001:db8::1", [port(22, address="::", to="2001:db8::1")]),
        ("22-25,~23-24", [port(22), port(25)]),
        ("~24,22-24:42-44", [port(22, 42), port(23, 43)]),
        ("192.0.2.1/20-22,~21", [port(20, address="192.0.2.1"), port(22, address="192.0.2.1")]),
        ("1,65535", [port(1), port(65535)]),
        ("1:65535", [port(1, 65535)]),
        ("022", [port(22)]),
        ("40000", [port(40000)]),
        ("none", []),
        ("22:fe80::1/23", [port(23, address="22:fe80::1")]),  # as passt reads it
    ],
)
def test_accepted(spec, expected):
    assert ports(spec) == expected


@pytest.mark.parametrize(
    "spec, expected, more",
    [
        ("all", ALL, {}),
        ("::1/all", ALL, {"address": "::1"}),
        ("%eth0/all", ALL, {"interface": "eth0"}),
        ("127.0.0.6/all:192.0.2.6", ALL, {"address": "127.0.0.6", "to": "192.0.2.6"}),
        ("~25", [number for number in ALL if number != 25], {}),
        ("~20000-20010", [number for number in ALL if not 20000 <= number <= 20010], {}),
        ("all,~22-23,~25", [number for number in ALL if number not in (22, 23, 25)], {}),
        ("~1-65000", range(65001, 65536), {}),
    ],
)
def test_all(spec, expected, more):
    assert ports(spec) == [port(number, weak=True, **more) for number in expected]


def test_all_knows_the_ephemeral_ports():
    assert texts("all", ephemeral=range(2, 65534)) == ["1", "65534", "65535"]
    assert len(ports("all", ephemeral=range(0))) == 65535


@pytest.mark.parametrize("specs", [["22:2222,all"], ["all,22:2222"], ["all", "22:2222"]])
def test_named_ports_win_over_all(specs):
    found = ports(*specs)
    assert found[0] == port(22, 2222)
    assert found[1:] == [port(number, weak=True) for number in ALL if number != 22]


def test_named_ports_win_where_they_overlap_only():
    found = ports("127.0.0.1/all,~1-20,~25-65535", "127.0.0.2/22", "0.0.0.0/23", "%eth0/24")
    assert [str(one) for one in found if one.weak] == ["127.0.0.1/21", "127.0.0.1/22"]


def test_none_may_be_replaced():
    assert texts("none", "22") == ["22"] and texts("none", "none") == [] and texts() == []
    for ports_before in ("22", "all"):
        with pytest.raises(ForwardError, match="--tcp-ports 'none': ports were given before it"):
            ports(ports_before, "none")


def test_protocols():
    assert ports("53", protocol="udp") == [Port("udp", None, None, 53, 53)]
    with pytest.raises(ForwardError, match="^--udp-ports 'x': "):
        ports("x", protocol="udp")


def test_families():
    assert ports("22", ipv6=False) == [port(22, address="0.0.0.0")]
    assert ports("%eth0/22", ipv4=False) == [port(22, address="::", interface="eth0")]
    assert ports("22:192.0.2.5", ipv6=False) == [port(22, address="0.0.0.0", to="192.0.2.5")]
    with pytest.raises(ForwardError, match="IPv6 is switched off"):
        ports("::1/22", ipv6=False)
    with pytest.raises(ForwardError, match="IPv4 is switched off"):
        ports("127.0.0.1/22", ipv4=False)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, reason",
    [
        ("", "'' is neither a port, a range nor 'all'"),
        ("127.0.0.1/", "'' is neither a port"),
        ("22,,23", "'' is neither a port"),
        ("22,", "'' is neither a port"),
        ("ssh", "'ssh' is neither a port"),
        ("none,22", "'none' is neither a port"),
        ("auto", "'auto' is neither a port"),
        (" 22", "' 22' is neither a port"),
        ("22-", "'22-' is neither a port"),
        ("22--23", "'22--23' is neither a port"),
        ("+22", "is neither a port"),
        ("٢٢", "is neither a port"),
        ("22\n", "is neither a port"),
        ("123456", "is neither a port"),
        ("~", "'' is neither a port"),
        ("~all", "'all' is neither a port"),
        ("~22:23", "'~22' is neither a port"),
        ("all:22", "'all' is neither a port"),
        ("0", "'0' is not within 1 to 65535"),
        ("65536", "'65536' is not within"),
        ("22-20", "'22-20' is not within"),
        ("1-2:65535-65536", "'65535-65536' is not within"),
        ("22:0", "'0' is not within"),
        ("22:23-24", "'22:23-24' maps 1 ports to 2"),
        ("10-20:30", "'10-20:30' maps 11 ports to 1"),
        ("0.0.0.0/1-2:192.0.2.5/3", "maps 2 ports to 1"),
        ("22:", "'' is neither a port, a range nor an IP address"),
        ("22:23:24", "'23:24' is neither a port, a range nor an IP address"),
        ("22:x/23", "'x' is neither"),
        ("0.0.0.0/22:192.0.2.5/", "'' is neither a port"),
        ("localhost/22", "'localhost' is not an IP address"),
        ("eth0/22", "'eth0' is not an IP address"),
        ("192.0.2/22", "'192.0.2' is not an IP address"),
        ("[192.0.2.1]/22", "'[192.0.2.1]' is not an IP address"),
        ("127.0.0.1%/22", "'' is not the name of an interface"),
        ("%a b/22", "'a b' is not the name of an interface"),
        ("%../22", "'..' is not the name of an interface"),
        ("%abcdefghijklmnop/22", "is not the name of an interface"),
        ("%eth0%eth1/22", "'eth0%eth1' is not the name of an interface"),
        ("fe80::1/22", "fe80::1 needs an interface: fe80::1%IFACE/..."),
        ("224.0.0.1/22", "224.0.0.1 is not a unicast address"),
        ("ff02::1%eth0/22", "ff02::1 is not a unicast address"),
        ("255.255.255.255/22", "255.255.255.255 is not a unicast address"),
        ("22:192.0.2.5", "192.0.2.5 needs a family to listen on: 0.0.0.0/..."),
        ("all:[2001:db8::5]", "2001:db8::5 needs a family to listen on: [::]/..."),
        ("::/22:192.0.2.5", ":: and 192.0.2.5 are of different families"),
        ("0.0.0.0/22:127.0.0.1", "127.0.0.1 is not an address of a guest"),
        ("0.0.0.0/22:0.0.0.0", "0.0.0.0 is not an address of a guest"),
        ("0.0.0.0/22:224.0.0.5", "224.0.0.5 is not a unicast address"),
        ("22,~20-30", "every port is excluded"),
        ("~1-65535", "every port is excluded"),
    ],
)
def test_refused(spec, reason):
    with pytest.raises(ForwardError) as caught:
        ports(spec)
    text = str(caught.value)
    assert text.startswith(f"--tcp-ports {spec!r}: ") and reason in text and "\n" not in text


@pytest.mark.parametrize(
    "specs, one, other",
    [
        (["22,22"], "22", "22"),
        (["22", "20-25"], "22", "22"),
        (["22", "22:23"], "22", "22:23"),
        (["22", "127.0.0.1/22"], "22", "127.0.0.1/22"),
        (["[::1]/22", "*/22"], "[::1]/22", "22"),
        (["22", "%eth0/22"], "22", "%eth0/22"),
        (["0.0.0.0/22", "127.0.0.1%lo/22:23"], "0.0.0.0/22", "127.0.0.1%lo/22:23"),
        (["all", "all"], "1", "1"),
        (["::/all", "::1/all:[fe80::1]"], "[::]/1", "[::1]/1:[fe80::1]"),
        (["all,all"], "1", "1"),
    ],
)
def test_overlaps(specs, one, other):
    with pytest.raises(ForwardError) as caught:
        ports(*specs)
    assert str(caught.value) == f"--tcp-ports: {one!r} and {other!r} overlap"


def test_what_does_not_overlap():
    specs = ("127.0.0.1/22", "127.0.0.2/22", "::1/22", "::2%lo/22", "23", "0.0.0.0/24", "::/24")
    assert len(ports(*specs, "%eth0/25", "%eth1/25")) == 9


# ---- properties ----------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(1, 40), st.integers(65500, 65535), st.integers(32760, 32775))
HOSTS4 = [IPv4Address("127.0.0.1"), IPv4Address("192.0.2.1"), ANY4]
HOSTS6 = [IPv6Address("::1"), IPv6Address("2001:db8::1"), IPv6Address("fe80::1"), ANY6]
GUESTS = [None, IPv4Address("198.51.100.7"), IPv6Address("2001:db8::7"), IPv6Address("fe80::7")]


@st.composite
def any_port(draw):
    host = draw(st.sampled_from([None, *HOSTS4, *HOSTS6]))
    interface = draw(st.sampled_from([None, "lo", "eth0.1", "@~-[]*"]))
    if host is not None and host.is_link_local:
        assume(interface is not None)
    guest = draw(st.sampled_from(GUESTS))
    if guest is not None:
        assume(host is not None and host.version == guest.version)
    return Port("tcp", host, interface, draw(NUMBERS), draw(NUMBERS), guest, draw(st.booleans()))


@given(any_port())
def test_a_port_is_its_text(one):
    assert ports(str(one)) == [one._replace(weak=False)]


@given(any_port(), any_port())
def test_overlap_is_symmetric_and_found(one, other):
    assert one.overlaps(one) and one.overlaps(other) == other.overlaps(one)
    if one.overlaps(other):
        with pytest.raises(ForwardError, match="overlap"):
            ports(str(one), str(other))
    else:
        assert len(ports(str(one), str(other))) == 2


@st.composite
def entry(draw):
    """(text, kind, first, last, guest_first) of one entry of a specification."""
    kind = draw(st.sampled_from(["port", "range", "map", "map_range", "not", "not_range", "all"]))
    first, length = draw(NUMBERS), draw(st.integers(0, 12))
    last, to = min(first + length, 65535), draw(NUMBERS)
    to = min(to, 65535 - (last - first))
    return {
        "port": (f"{first}", "in", first, first, first),
        "range": (f"{first}-{last}", "in", first, last, first),
        "map": (f"{first}:{to}", "in", first, first, to),
        "map_range": (f"{first}-{last}:{to}-{to + last - first}", "in", first, last, to),
        "not": (f"~{first}", "out", first, first, 0),
        "not_range": (f"~{first}-{last}", "out", first, last, 0),
        "all": ("all", "all", 0, 0, 0),
    }[kind]


SOME = [*range(1, 64), *range(32750, 32800), *range(65490, 65536)]  # all that entries name
NOT_SOME = range(64, 65490)


def model(entries):
    """{port: (guest port, weak)}, or None where it must be refused, port by port."""
    kinds = [kind for _, kind, *_ in entries]
    result = {}
    ins = [entry[2:] for entry in entries if entry[1] == "in"]
    outs = [entry[2:4] for entry in entries if entry[1] == "out"]
    for number in SOME:
        if any(first <= number <= last for first, last in outs):
            continue
        named = [to + number - first for first, last, to in ins if first <= number <= last]
        if len(named) > 1:
            return None
        if named:
            result[number] = (named[0], False)
        elif ("all" in kinds or not ins) and number not in NOT_SOME:
            result[number] = (number, True)
    return result if result and kinds.count("all") <= 1 else None


@given(st.lists(entry(), min_size=1, max_size=6), st.sampled_from(["", "*/", "%lo/", "::1/"]))
@example([("~1-65535", "out", 1, 65535, 0)], "")
@example([("1-2:65534-65535", "in", 1, 2, 65534), ("all", "all", 0, 0, 0)], "")
def test_any_entries(entries, prefix):
    spec = prefix + ",".join(text for text, *_ in entries)
    expected = model(entries)
    if expected is None:
        with pytest.raises(ForwardError):
            ports(spec, ephemeral=NOT_SOME)
        return
    found = ports(spec, ephemeral=NOT_SOME)
    assert {one.port: (one.guest_port, one.weak) for one in found} == expected
    assert len(found) == len(expected)
    assert [one.weak for one in found] == sorted(one.weak for one in found)
    place = {(one.protocol, one.address, one.interface, one.guest_address) for one in found}
    address = IPv6Address("::1") if prefix == "::1/" else None
    assert place == {("tcp", address, "lo" if prefix == "%lo/" else None, None)}


@given(st.lists(st.text(alphabet="0123456789-:,~/%*[].alnoe fx\n", max_size=20), max_size=3))
def test_any_text(specs):
    """Ports that stand for themselves, or one line."""
    try:
        found = ports(*specs)
    except ForwardError as error:
        assert str(error) and "\n" not in str(error)
        return
    for one in found:
        assert 1 <= one.port <= 65535 and 1 <= one.guest_port <= 65535
    named = [one for one in found if not one.weak]
    assert ports(*map(str, named)) == named
