"""The guest's network from the host's: every rule on made-up tables."""

import pickle
from argparse import Namespace
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from control.hostnet import (
    Host,
    HostAddress,
    HostNetError,
    Route,
    build_net,
)
from control.wanted import UsageError, read
from dataplane.slow.net import Net

# a busy machine is no failure
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def addresses(*texts):
    return tuple(ip_address(text) for text in texts)


def at(interface, text, scope=0, flags=0x80):
    address, _, prefix = text.partition("/")
    return HostAddress(interface, ip_address(address), int(prefix), scope, flags)


def default(interface, gateway=None, metric=0, source=None, version=4):
    gateway, source = (ip_address(text) if text else None for text in (gateway, source))
    return Route(version, interface, True, metric, gateway, source)


HOST = Host(
    routes=(
        default(2, "192.0.2.1"),
        Route(4, 2, False),
        Route(6, 2, False),
        default(2, "fe80::fc", version=6, metric=1024),
    ),
    addresses=(
        at(1, "127.0.0.1/8", scope=254),
        at(2, "192.0.2.2/24"),
        at(1, "::1/128", scope=254),
        at(2, "2001:db8::2/64"),
        at(2, "fe80::2/64", scope=253),
    ),
    name_servers=addresses("192.0.2.53", "2001:db8::53"),
    search=("corp.example",),
)
NOWHERE = Host(addresses=(at(1, "127.0.0.1/8", scope=254),))


def net_of(host=HOST, **options):
    return build_net(read(Namespace(**options)), host)


def changes(host=HOST, **options):
    """What the options change in the guest's network."""
    plain, changed = net_of(host), net_of(host, **options)
    return {
        name: getattr(changed, name)
        for name in Net.FIELDS
        if getattr(plain, name) != getattr(changed, name)
    }


def test_the_guest_takes_the_hosts_place():
    net = net_of()
    assert net == Net(
        addr4=IPv4Address("192.0.2.2"),
        prefix4=24,
        gateway4=IPv4Address("192.0.2.1"),
        our_addr4=IPv4Address("192.0.2.1"),
        addr6=IPv6Address("2001:db8::2"),
        gateway6=IPv6Address("fe80::fc"),
        link_local6=IPv6Address("fe80::fc"),
        dns4=addresses("192.0.2.53"),
        dns6=addresses("2001:db8::53"),
        search=("corp.example",),
        mtu=65520,
        map_host_loopback4=IPv4Address("192.0.2.1"),
        map_host_loopback6=IPv6Address("fe80::fc"),
        dns_host4=IPv4Address("192.0.2.53"),
        dns_host6=IPv6Address("2001:db8::53"),
        interface6=2,
    )
    assert pickle.loads(pickle.dumps(net)) == net


def test_missing_options_are_options_not_given():
    assert build_net(read(object()), HOST) == net_of(address=[], dns=None, mtu=None, no_ra=False)


def test_local_mode():
    net = net_of(NOWHERE)
    assert net == Net().replaced(
        mtu=65520,
        map_host_loopback4=IPv4Address("169.254.2.2"),
        map_host_loopback6=IPv6Address("fe80::1"),
    )
    assert (str(net.addr4), net.prefix4, str(net.gateway4)) == ("169.254.2.1", 16, "169.254.2.2")
    assert (net.addr6, str(net.gateway6), str(net.link_local6)) == (None, "fe80::1", "fe80::1")


def test_one_family_local():
    host = HOST._replace(routes=HOST.routes[:2])
    net = net_of(host)
    assert (str(net.addr4), net.addr6, str(net.link_local6)) == ("192.0.2.2", None, "fe80::1")


def test_router_outside_link_local_scope():
    """A router advertisement must come from a link-local address (RFC 4861 6.1.2)."""
    host = HOST._replace(routes=(default(2, "2001:db8::1", version=6),))
    net = net_of(host)
    assert (str(net.gateway6), str(net.link_local6)) == ("2001:db8::1", "fe80::1")
    assert str(net.map_host_loopback6) == "2001:db8::1"


@pytest.mark.parametrize(
    "routes, addr4, gateway4",
    [
        ([default(2, "192.0.2.1", 200), default(3, "10.0.0.1", 100)], "10.0.0.3", "10.0.0.1"),
        ([default(2, "192.0.2.1"), default(3, "10.0.0.1")], "192.0.2.2", "192.0.2.1"),
        ([Route(4, 3, False), default(2, "192.0.2.1", 500)], "192.0.2.2", "192.0.2.1"),
        ([Route(4, 3, False), Route(4, 2, False)], "10.0.0.3", "169.254.2.2"),
        ([default(3)], "10.0.0.3", "169.254.2.2"),  # VPN: a default route without a router
        ([default(3, "10.0.0.1", source="10.0.7.7")], "10.0.7.7", "10.0.0.1"),
        ([default(3, "10.0.7.1")], "10.0.7.7", "10.0.7.1"),
        ([default(9, "10.0.7.1", source="192.0.2.2")], "192.0.2.2", "10.0.7.1"),  # unnumbered
        ([default(9, "10.0.7.1")], "169.254.2.1", "169.254.2.2"),
    ],
)
def test_which_interface_and_address(routes, addr4, gateway4):
    host = Host(
        routes=tuple(routes),
        addresses=(
            at(2, "192.0.2.2/24"),
            at(3, "10.0.0.3/24"),
            at(3, "10.0.7.7/24"),
        ),
    )
    net = net_of(host)
    assert (str(net.addr4), str(net.gateway4), net.our_addr4) == (addr4, gateway4, net.gateway4)


@pytest.mark.parametrize(
    "candidates, addr6",
    [
        ([at(2, "fe80::2/64", scope=253)], None),
        ([at(2, "fd00::2/64"), at(2, "2001:db8::2/64")], "2001:db8::2"),
        ([at(2, "fd00::2/64")], "fd00::2"),
        ([at(2, "2001:db8::a/64", flags=0x01), at(2, "2001:db8::b/64")], "2001:db8::b"),
        ([at(2, "2001:db8::a/64", flags=0x01), at(2, "fd00::2/64")], "fd00::2"),
        ([at(2, "2001:db8::a/64", flags=0x01)], "2001:db8::a"),
        ([at(2, "2001:db8::a/64", flags=0x20), at(2, "2001:db8::b/128")], "2001:db8::b"),
        ([at(2, "2001:db8::a/64", flags=0x40)], None),
        ([at(2, "2001:db8::a/64", flags=0x08)], None),
        ([at(3, "2001:db8::a/64")], None),
    ],
)
def test_which_ipv6_address(candidates, addr6):
    """Stable before temporary, global before unique local; never deprecated or tentative."""
    net = net_of(Host((default(2, "fe80::fc", version=6),), tuple(candidates)))
    assert net.addr6 == (addr6 and ip_address(addr6))
    assert net.prefix6 == 64
    assert str(net.link_local6) == ("fe80::fc" if addr6 else "fe80::1")


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"address": "10.1.2.3"}, ("10.1.2.3", 8)),
        ({"address": "172.16.0.9"}, ("172.16.0.9", 16)),
        ({"address": ["192.168.5.5"]}, ("192.168.5.5", 24)),
        ({"address": ["10.1.2.3/20"]}, ("10.1.2.3", 20)),
        ({"address": ["10.1.2.3/32"]}, ("10.1.2.3", 32)),
        ({"address": ["10.1.2.3/0"]}, ("10.1.2.3", 0)),
        ({"address": "10.1.2.3", "netmask": "255.255.240.0"}, ("10.1.2.3", 20)),
        ({"address": "10.1.2.3", "netmask": "20"}, ("10.1.2.3", 20)),
        ({"netmask": "16"}, ("192.0.2.2", 16)),
        ({"netmask": "0.0.0.0"}, ("192.0.2.2", 0)),
        ({"netmask": 32}, ("192.0.2.2", 32)),
        ({"address": ["10.0.0.1", "10.0.0.2/30"]}, ("10.0.0.2", 30)),  # the last one counts
    ],
)
def test_ipv4_address_and_netmask(options, expected):
    net = net_of(**options)
    assert (str(net.addr4), net.prefix4) == expected
    assert str(net.gateway4) == "192.0.2.1"
    local = net_of(NOWHERE, **options)
    if "address" in options:
        assert (str(local.addr4), local.prefix4) == expected


def test_ipv6_address():
    assert changes(address=["2001:db8:5::5/48"]) == {"addr6": IPv6Address("2001:db8:5::5")}
    assert net_of(address="2001:db8:5::5/128").prefix6 == 64
    assert net_of(NOWHERE, address="2001:db8:5::5").addr6 == IPv6Address("2001:db8:5::5")
    both = net_of(address=["2001:db8:5::5", "10.0.0.5/24"])
    assert (str(both.addr6), str(both.addr4)) == ("2001:db8:5::5", "10.0.0.5")


def test_gateway():
    assert changes(gateway=["10.0.0.1"]) == {
        name: IPv4Address("10.0.0.1") for name in ("gateway4", "our_addr4", "map_host_loopback4")
    }
    assert changes(gateway=["fe80::5"]) == {
        name: IPv6Address("fe80::5") for name in ("gateway6", "link_local6", "map_host_loopback6")
    }
    assert set(changes(gateway=["10.0.0.1", "2001:db8::1"])) == {
        "gateway4",
        "our_addr4",
        "map_host_loopback4",
        "gateway6",
        "link_local6",
        "map_host_loopback6",
    }


@pytest.mark.parametrize(
    "options, host4, host6",
    [
        ({}, "192.0.2.1", "fe80::fc"),
        ({"no_map_gw": True}, None, None),
        ({"map_host_loopback": "none"}, None, None),
        ({"map_host_loopback": ["10.0.0.9"]}, "10.0.0.9", "fe80::fc"),
        ({"map_host_loopback": ["10.0.0.9", "2001:db8::9"]}, "10.0.0.9", "2001:db8::9"),
        ({"map_host_loopback": ["none", "10.0.0.9"]}, "10.0.0.9", None),
        ({"map_host_loopback": ["10.0.0.9", "none"]}, None, None),
        ({"map_host_loopback": ["10.0.0.9"], "no_map_gw": True}, "10.0.0.9", None),
    ],
)
def test_map_host_loopback(options, host4, host6):
    net = net_of(**options)
    assert net.map_host_loopback4 == (host4 and ip_address(host4))
    assert net.map_host_loopback6 == (host6 and ip_address(host6))


def test_map_guest_addr():
    assert changes(map_guest_addr=["169.254.1.2"]) == {
        "map_guest_addr4": IPv4Address("169.254.1.2")
    }
    assert changes(map_guest_addr=["2001:db8::7"]) == {
        "map_guest_addr6": IPv6Address("2001:db8::7")
    }
    assert changes(map_guest_addr=["169.254.1.2", "none"]) == {}


def test_families():
    only4 = net_of(ipv4_only=True)
    assert (only4.ipv4, only4.ipv6, only4.addr6, only4.dns6) == (True, False, None, ())
    assert only4.map_host_loopback6 is None and only4.dns_host6 is None
    only6 = net_of(ipv6_only=True)
    assert (only6.ipv4, only6.ipv6, only6.dns4) == (False, True, ())
    assert str(only6.addr6) == "2001:db8::2"


def test_switches():
    for name in ("no_dhcp", "no_dhcpv6", "no_ndp", "no_ra", "no_dhcp_dns", "no_dhcp_search"):
        assert changes(**{name: True}) == {name: True}
    assert changes(no_icmp=True) == {"no_ndp": True}


def test_plain_values():
    assert changes(mtu="1500") == {"mtu": 1500}
    assert changes(mtu=0) == {"mtu": 0}
    assert changes(hostname="vm-1", fqdn="vm-1.example.") == {
        "hostname": "vm-1",
        "fqdn": "vm-1.example.",
    }
    assert changes(mac_addr="02:00:00:00:00:Af") == {"our_mac": b"\x02\0\0\0\0\xaf"}


@pytest.mark.parametrize(
    "given_search, expected",
    [
        (["a.example"], ("a.example",)),
        ("a.example  b.example", ("a.example", "b.example")),
        (["a.example", "b.example c.example"], ("a.example", "b.example", "c.example")),
        (["none"], ()),
        (["a.example", "none"], ()),
        (["none", "a.example"], ("a.example",)),
        (["none."], ("none.",)),
        ([], ("corp.example",)),
    ],
)
def test_search(given_search, expected):
    assert net_of(search=given_search).search == expected


# ---- DNS: (what resolv.conf says, options) -> (dns4, dns_forward4, dns_host4) --------------------


@pytest.mark.parametrize(
    "servers, options, dns4, forward4, host4",
    [
        ("192.0.2.53", {}, "192.0.2.53", None, "192.0.2.53"),
        ("127.0.0.53", {}, "192.0.2.1", "192.0.2.1", "127.0.0.53"),
        ("192.0.2.1", {}, "192.0.2.1", "192.0.2.1", "192.0.2.1"),  # the gateway is the resolver
        ("127.0.0.53", {"no_map_gw": True}, "", None, "127.0.0.53"),
        ("192.0.2.1", {"no_map_gw": True}, "192.0.2.1", None, "192.0.2.1"),
        (
            "127.0.0.53",
            {"dns_forward": "169.254.1.1", "no_map_gw": True},
            "169.254.1.1",
            "169.254.1.1",
            "127.0.0.53",
        ),
        ("127.0.0.53 10.0.0.53", {}, "192.0.2.1 10.0.0.53", "192.0.2.1", "127.0.0.53"),
        ("10.0.0.53 127.0.0.53", {}, "10.0.0.53 192.0.2.1", "192.0.2.1", "10.0.0.53"),
        ("127.0.0.53 127.0.0.54", {}, "192.0.2.1", "192.0.2.1", "127.0.0.53"),
        ("1.1.1.1 2.2.2.2 3.3.3.3 4.4.4.4", {}, "1.1.1.1 2.2.2.2 3.3.3.3", None, "1.1.1.1"),
        ("169.254.169.254", {"no_map_gw": True}, "169.254.169.254", None, "169.254.169.254"),
        ("10.0.0.53", {"dns_forward": "10.9.9.9"}, "10.0.0.53", "10.9.9.9", "10.0.0.53"),
        (
            "10.0.0.53",
            {"dns_forward": "10.9.9.9", "dns_host": "127.0.0.1"},
            "10.0.0.53",
            "10.9.9.9",
            "127.0.0.1",
        ),
        ("10.0.0.53", {"dns": "1.1.1.1"}, "1.1.1.1", None, "10.0.0.53"),
        ("10.0.0.53", {"dns": ["1.1.1.1", "9.9.9.9"]}, "1.1.1.1 9.9.9.9", None, "10.0.0.53"),
        ("127.0.0.53", {"dns": "127.0.0.1"}, "127.0.0.1", None, "127.0.0.53"),  # as it is
        ("10.0.0.53", {"dns": "none"}, "", None, "10.0.0.53"),
        ("10.0.0.53", {"dns": ["1.1.1.1", "none"]}, "", None, "10.0.0.53"),
        ("10.0.0.53", {"dns": ["none", "1.1.1.1"]}, "1.1.1.1", None, "10.0.0.53"),
        ("10.0.0.53", {"dns": "2001:db8::1"}, "10.0.0.53", None, "10.0.0.53"),
        ("", {}, "", None, None),
    ],
)
def test_dns4(servers, options, dns4, forward4, host4):
    net = net_of(HOST._replace(name_servers=addresses(*servers.split())), **options)
    assert net.dns4 == addresses(*dns4.split())
    assert net.dns_forward4 == (forward4 and ip_address(forward4))
    assert net.dns_host4 == (host4 and ip_address(host4))


def test_dns_host_on_a_link():
    net = net_of(dns_forward="2001:db8::7", dns_host="fe80::53%lo")
    assert (str(net.dns_forward6), str(net.dns_host6)) == ("2001:db8::7", "fe80::53%lo")


@pytest.mark.parametrize(
    "servers, dns6, forward6, host6",
    [
        ("2001:db8::53", "2001:db8::53", None, "2001:db8::53"),
        ("::1", "fe80::fc", "fe80::fc", "::1"),
        ("fe80::fc%eth0", "fe80::fc", "fe80::fc", "fe80::fc%eth0"),
        ("fe80::99%eth0", "fe80::fc", "fe80::fc", "fe80::99%eth0"),
        ("127.0.0.53", "", None, None),
    ],
)
def test_dns6(servers, dns6, forward6, host6):
    """A zone is the host's: the guest gets an address without one, the forwarder keeps it."""
    net = net_of(HOST._replace(name_servers=addresses(*servers.split())))
    assert net.dns6 == addresses(*dns6.split())
    assert net.dns_forward6 == (forward6 and ip_address(forward6))
    assert net.dns_host6 == (host6 and ip_address(host6))
    # Early Pythons 3.11 lose a zone in a pickle. Workers, who get this pickle, have no use for it.
    assert pickle.loads(pickle.dumps(net)).dns6 == net.dns6


# ---- options that cannot be used -----------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"address": "10.0.0"},
        {"address": "10.0.0.1/33"},
        {"address": "10.0.0.1/"},
        {"address": "10.0.0.1/-1"},
        {"address": "10.0.0.1/2 "},
        {"address": "2001:db8::1/129"},
        {"address": "0.0.0.0"},
        {"address": "127.0.0.1"},
        {"address": "224.0.0.1"},
        {"address": "255.255.255.255"},
        {"address": "::ffff:10.0.0.1"},
        {"address": "fe80::5"},
        {"address": "2001:db8::1%eth0"},
        {"address": "10.0.0.1/8", "netmask": "8"},
        {"address": ""},
        {"address": ["10.0.0.7"], "gateway": ["10.0.0.7"]},
        {"address": ["2001:db8::7"], "gateway": ["2001:db8::7"]},
        {"gateway": "::1"},
        {"gateway": "::"},
        {"gateway": "gateway"},
        {"netmask": "33"},
        {"netmask": "255.0.255.0"},
        {"netmask": "0.0.0.255"},
        {"netmask": "x"},
        {"mtu": "65521"},
        {"mtu": "-1"},
        {"mtu": "many"},
        {"mac_addr": "02-00-00-00-00-01"},
        {"mac_addr": "02:00:00:00:00"},
        {"mac_addr": "01:00:00:00:00:01"},
        {"mac_addr": "00:00:00:00:00:00"},
        {"hostname": "a b"},
        {"hostname": "x" * 64},
        {"fqdn": "a..b"},
        {"fqdn": ("x" * 60 + ".") * 5},
        {"search": "exa/mple"},
        {"dns": "dns.example"},
        {"dns": ["1.1.1.1", "0.0.0.0"]},
        {"dns_forward": "127.0.0.1"},
        {"dns_forward": "none"},
        {"dns_host": "none"},
        {"map_host_loopback": "127.0.0.1"},
        {"map_guest_addr": "ff02::1"},
        {"gateway": ""},
        {"netmask": ""},
        {"netmask": "33", "ipv6_only": True},
        {"netmask": "9" * 5000},
        {"mtu": ""},
        {"mtu": "67"},
        {"mtu": "١٥٠٠"},
        {"mac_addr": ""},
        {"hostname": ""},
        {"fqdn": ""},
        {"search": ""},
        {"search": " "},
        {"dns": ""},
        {"dns_host": "fe80::53"},  # on which link?
        {"map_guest_addr": ""},
        {"interface": ""},
        {"ipv4_only": True, "ipv6_only": True},
    ],
)
def test_options_that_no_host_makes_usable(options):
    """Known before anything is read from a host or opened; the line names the option."""
    with pytest.raises(UsageError) as refusal:
        read(Namespace(**options))
    [line] = str(refusal.value).splitlines()
    assert 10 < len(line)
    names = {"--" + name.replace("_", "-") for name in options}
    assert names & set(line.replace(":", " ").split())


@pytest.mark.parametrize(
    "options",
    [
        {"address": "192.0.2.1"},  # the gateway's
        {"gateway": "192.0.2.2"},
        {"gateway": "2001:db8::2"},
        {"interface": "no-such-if0"},
        {"dns_host": "fe80::53%no-such-if0"},
        {"dns_host": f"fe80::53%{'9' * 5000}"},
    ],
)
def test_options_that_do_not_fit_this_host(options):
    with pytest.raises(HostNetError) as refusal:
        net_of(**options)
    assert len(str(refusal.value).splitlines()) == 1


OPTION_NAMES = [
    "address",
    "netmask",
    "gateway",
    "dns",
    "search",
    "mtu",
    "mac_addr",
    "hostname",
    "fqdn",
    "map_host_loopback",
    "map_guest_addr",
    "dns_forward",
    "dns_host",
]
VALUES = st.one_of(
    st.text("0123456789abcdef:./%-xno² \n", max_size=20),
    st.integers(-1, 70000).map(str),
    st.sampled_from(["none", "10.0.0.1", "10.0.0.1/8", "fe80::1", "2001:db8::1/64", "1::%2", "²"]),
    st.ip_addresses().map(str),
)


@unhurried
@given(st.dictionaries(st.sampled_from(OPTION_NAMES), VALUES | st.lists(VALUES, max_size=3)))
def test_any_option_is_taken_or_refused(options):
    for host in (HOST, NOWHERE):
        try:
            net = net_of(host, **options)
        except (HostNetError, UsageError) as refusal:
            assert str(refusal)
        else:
            assert net.addr4 != net.gateway4 and 0 <= net.prefix4 <= 32
