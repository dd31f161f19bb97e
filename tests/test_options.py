"""The command line: what is accepted, what it becomes, and what is said about the rest."""

import json
import os
import re
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control import options, wanted
from control.hostnet import Host, HostNetError, build_net
from control.options import COMMANDS, OPTIONS, VERSION, Metrics, parse
from shm import schema

ROOT = Path(__file__).parent.parent
RUN = ("run", "--socket", "/run/s")


def refused(capsys, *argv):
    """The one line that a wrong command line is answered with."""
    with pytest.raises(SystemExit) as caught:
        parse(argv)
    assert caught.value.code == 2
    out, error = capsys.readouterr()
    assert out == "" and error.endswith("\n") and error.count("\n") == 1
    return error.rstrip("\n")


def shown(capsys, *argv):
    """What is printed on request."""
    with pytest.raises(SystemExit) as caught:
        parse(argv)
    assert caught.value.code == 0
    out, error = capsys.readouterr()
    assert error == ""
    return out


# ---- what it becomes -----------------------------------------------------------------------------


def test_defaults():
    found = vars(parse(RUN))
    lists = {
        "tcp_ports",
        "udp_ports",
        "map_host_loopback",
        "map_guest_addr",
        "address",
        "gateway",
        "dns",
        "dns_forward",
        "dns_host",
        "search",
    }
    assert {name for name, value in found.items() if value == []} == lists
    assert {name for name, value in found.items() if value not in ([], None, False, "")} == {
        "verb",
        "socket",
        "queues",
        "workers",
    }
    assert found["verb"] == "run" and found["socket"] == "/run/s"
    assert found["queues"] == schema.PAIRS_MAX == options.QUEUES_MAX <= schema.WORKERS_MAX
    assert found["workers"] == min(schema.PAIRS_MAX, len(os.sched_getaffinity(0)))


def test_defaults_are_not_shared():
    parse(RUN).dns.append("x")
    assert parse(RUN).dns == []


def test_workers_follow_processors_and_queues(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert parse(RUN).workers == 8
    assert parse([*RUN, "--queues", "3"]).workers == 3
    assert parse([*RUN, "--workers", "20"]).workers == 20
    assert parse([*RUN, "--cpus", "1,7,3-4"]).workers == 4
    assert parse([*RUN, "--cpus", "1,7,3-4", "--workers", "8"]).workers == 8


RUN_OPTIONS = [option for option in OPTIONS if option.command == "run"]
EXAMPLES = {
    "--queues": "4",
    "--workers": "1",
    "--cpus": "0-2,5",
    "--poll-us": "50",
    "--metrics": "9100",
    "--fd": "3",
}
ALONE = {"--socket", "--fd"}


def value_of(option):
    return EXAMPLES.get(option.names[0], "text")


@pytest.mark.parametrize("option", RUN_OPTIONS, ids=lambda option: option.names[0])
def test_every_option_of_run(option):
    """Each name sets just its own attribute, in each way to write it."""
    head = ["run"] if option.names[0] in ALONE else list(RUN)
    attribute = option.names[0].removeprefix("--").replace("-", "_")
    if not option.metavar:
        assert getattr(parse(head), attribute) is False
    for name in option.names:
        if not option.metavar:
            assert getattr(parse([*head, name]), attribute) is True
            continue
        value = value_of(option)
        joined = f"{name}={value}" if name.startswith("--") else f"{name}{value}"
        for words in ([name, value], [joined]):
            found = getattr(parse([*head, *words]), attribute)
            read = {"--metrics": Metrics("127.0.0.1", 9100), "--cpus": (0, 1, 2, 5)}
            expected = read.get(option.names[0], value)
            assert found == [value] if option.repeat else str(found) == str(expected)


def test_short_names():
    """Those of passt, and no others."""
    assert {name for option in RUN_OPTIONS for name in option.names[1:]} == {
        *("-s", "-F", "-1", "-P", "-t", "-u", "-D", "-S", "-a", "-n", "-g", "-i", "-m", "-M", "-H"),
        *("-4", "-6", "-q", "-d", "-f"),
    }


def test_repeated_options():
    found = parse([*RUN, "-t", "22", "-t", "~5", "-D", "192.0.2.1", "--dns", "none", "-m1", "-m2"])
    assert found.tcp_ports == ["22", "~5"] and found.dns == ["192.0.2.1", "none"]
    assert found.mtu == "2"


def test_combined_and_shortened():
    found = parse(["run", "-1q4f", "--sock=x", "--no-map"])
    assert found.one_off and found.quiet and found.ipv4_only and found.no_map_gw
    assert found.socket == "x"


def test_descriptor_means_one_off():
    found = parse(["run", "-F", "3"])
    assert found.fd == 3 and found.one_off and found.socket is None


def net_of(*argv):
    return build_net(wanted.read(parse([*RUN, *argv])), Host())


def test_wanted_reads_the_attributes():
    """The names agree: an option that wanted.py does not find would be ignored."""
    argv = [
        *("--address", "192.0.2.7/25", "--gateway", "192.0.2.1", "--address", "2001:db8::7"),
        *("--mtu", "1400", "--mac-addr", "02:00:00:00:00:07", "--dns", "192.0.2.53"),
        *("--dns-forward", "192.0.2.54", "--dns-host", "192.0.2.55", "--search", "a.example b"),
        *("--hostname", "guest", "--fqdn", "guest.a.example", "--map-host-loopback", "192.0.2.8"),
        *("--map-guest-addr", "192.0.2.9", "--no-dhcp", "--no-dhcpv6", "--no-ra", "--no-ndp"),
        *("--no-dhcp-dns", "--no-dhcp-search"),
    ]
    net = net_of(*argv)
    assert (str(net.addr4), net.prefix4, str(net.addr6)) == ("192.0.2.7", 25, "2001:db8::7")
    assert net.gateway4 == net.our_addr4 == ip_address("192.0.2.1")
    assert net.mtu == 1400 and net.our_mac == bytes.fromhex("020000000007")
    assert net.dns4 == (ip_address("192.0.2.53"),)
    assert net.dns_forward4 == ip_address("192.0.2.54")
    assert net.dns_host4 == ip_address("192.0.2.55")
    assert net.search == ("a.example", "b") and net.hostname == "guest"
    assert net.fqdn == "guest.a.example" and net.map_host_loopback4 == ip_address("192.0.2.8")
    assert net.map_guest_addr4 == ip_address("192.0.2.9")
    assert net.no_dhcp and net.no_dhcpv6 and net.no_ra and net.no_ndp
    assert net.no_dhcp_dns and net.no_dhcp_search
    net = net_of("--no-map-gw", "-4", "-n", "24", "--no-icmp")
    assert net.map_host_loopback4 is None and not net.ipv6 and net.prefix4 == 24 and net.no_ndp
    assert not net_of("-6").ipv4
    with pytest.raises(HostNetError, match="nosuch0"):
        net_of("-i", "nosuch0")


@pytest.mark.parametrize(
    "text, address, port",
    [
        ("9100", "127.0.0.1", 9100),
        ("1", "127.0.0.1", 1),
        ("65535", "127.0.0.1", 65535),
        ("0.0.0.0:9100", "0.0.0.0", 9100),
        ("[::1]:9100", "::1", 9100),
        ("[::]:9100", "::", 9100),
    ],
)
def test_metrics(text, address, port):
    assert parse([*RUN, "--metrics", text]).metrics == Metrics(address, port)


def test_warm():
    assert vars(parse(["warm"])) == {"verb": "warm", "quiet": False}
    assert parse(["warm", "-q"]).quiet


@pytest.mark.parametrize(
    "words, command",
    [
        ([], []),
        (["--"], []),
        (["--", "ping", "-c", "1", "--socket", "x"], ["ping", "-c", "1", "--socket", "x"]),
        (["--", "sh", "-c", "a -- b", "--", "c"], ["sh", "-c", "a -- b", "--", "c"]),
    ],
)
def test_guest(words, command):
    found = parse(["guest", "-s", "s", "--queues", "4", *words])
    expected = {"verb": "guest", "socket": "s", "queues": 4, "mtu": None, "command": command}
    assert vars(found) == {**expected, "features": ""}
    assert parse(["guest", "--mtu", "1280", "--socket", "s", *words]).mtu == 1280
    assert parse(["guest", "--features=-csum", "--socket", "s", *words]).features == "-csum"


# ---- what is said about the rest -----------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, text",
    [
        ([], "vhostmq: no command: give one of run, warm, guest"),
        (["serve"], "vhostmq: 'serve' is not a command: give one of run, warm, guest"),
        (["--socket", "x"], "vhostmq: unrecognized arguments: --socket"),
        (["run"], "vhostmq run: give either --socket PATH or --fd N"),
        ([*RUN, "--fd", "3"], "give either --socket PATH or --fd N"),
        (["run", "--socket"], "expected one argument"),
        ([*RUN, "--nosuch"], "unrecognized arguments: --nosuch"),
        ([*RUN, "extra"], "unrecognized arguments: extra"),
        ([*RUN, "a\nb\n\nc"], "unrecognized arguments: a b c"),
        ([*RUN, "--no-d"], "ambiguous option: --no-d could match --no-dhcp, "),
        ([*RUN, "--queues", "0"], "--queues: 0 is not within 1 to 32"),
        ([*RUN, "--queues", "33"], "--queues: 33 is not within 1 to 32"),
        ([*RUN, "--queues", "-1"], "--queues: expected one argument"),
        ([*RUN, "--queues", "two"], "--queues: 'two' is not a number"),
        ([*RUN, "--queues", "٣"], "is not a number"),
        ([*RUN, "--queues", "1" * 5000], "is not a number"),
        ([*RUN, "--workers", "3", "--queues", "2"], "there are only 2 queue pairs"),
        ([*RUN, "-q", "-d"], "--quiet and --debug exclude each other"),
        ([*RUN, "-4", "-6"], "--ipv4-only and --ipv6-only exclude each other"),
        ([*RUN, "--no-tcp", "-t", "22"], "--no-tcp and --tcp-ports exclude each other"),
        ([*RUN, "--no-udp", "-u", "all"], "--no-udp and --udp-ports exclude each other"),
        ([*RUN, "--metrics", "0"], "--metrics: 0 is not within 1 to 65535"),
        ([*RUN, "--metrics", "65536"], "65536 is not within 1 to 65535"),
        ([*RUN, "--metrics", "localhost:9100"], "'localhost' is not an IP address"),
        ([*RUN, "--metrics", "::1:9100"], "'::1:9100' is neither ADDR:PORT nor [ADDR]:PORT"),
        ([*RUN, "--metrics", "[127.0.0.1]:9"], "is neither ADDR:PORT nor [ADDR]:PORT"),
        ([*RUN, "--metrics", ":9100"], "'' is not an IP address"),
        ([*RUN, "--metrics", "127.0.0.1:"], "'' is not a number"),
        (["guest"], "vhostmq guest: give --socket PATH"),
        (["guest", "-s", "x", "ping"], "unrecognized arguments: ping"),
        (["guest", "-s", "x", "--mtu", "67"], "67 is not within 68 to 65520"),
        (["warm", "--socket", "x"], "vhostmq warm: unrecognized arguments: --socket x"),
    ],
)
def test_one_line_for_an_error(capsys, argv, text):
    line = refused(capsys, *argv)
    assert text in line
    verb = argv[0] if argv and argv[0] in COMMANDS else ""
    program = f"vhostmq {verb}".rstrip()
    assert line.startswith(f"{program}: ") and line.endswith(f" (see {program} --help)")


def test_no_ports_of_a_protocol_that_is_off():
    assert parse([*RUN, "--no-tcp", "-t", "none"]).tcp_ports == ["none"]


WORDS = st.lists(
    st.one_of(
        st.sampled_from([name for option in OPTIONS for name in option.names]),
        st.sampled_from(
            ["--", "-", "", "1", "none", "run", "-x", "--no", "=", "--fd=1", "-s=", "@f"]
        ),
        st.text(max_size=8).filter(lambda text: "\0" not in text),
    ),
    max_size=8,
)


@given(st.sampled_from(["run", "warm", "guest", "", "-"]), WORDS)
def test_any_command_line(verb, words):
    """Options or an orderly end, whatever is given."""
    try:
        found = parse([verb, *words])
    except SystemExit as end:
        assert end.code in (0, 2)
    else:
        assert found.verb == verb
        if verb == "run":
            assert 1 <= found.workers <= found.queues <= 32
            assert (found.socket is None) != (found.fd is None)


def test_process_status():
    """As a shell sees it."""
    code = "import sys; from control.options import parse; parse(sys.argv[1:])"
    run = [sys.executable, "-S", "-c", code]
    wrong = subprocess.run([*run, "run"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and wrong.stdout == ""
    right = subprocess.run([*run, "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (right.returncode, right.stdout, right.stderr) == (0, f"vhostmq {VERSION}\n", "")


# ---- help ----------------------------------------------------------------------------------------


def test_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    page = shown(capsys, "--help")
    assert all(f"  {verb}" in page and text in page for verb, text in COMMANDS.items())
    for verb in COMMANDS:
        page = shown(capsys, verb, "--help")
        lines = page.splitlines()
        assert lines[0].startswith(f"usage: vhostmq {verb}")
        assert max(map(len, lines)) <= 100
        for option in OPTIONS:
            if option.command == verb:
                assert page.count(f"  {option.usage} ") + page.count(f"  {option.usage}\n") == 1
                assert f"\n{option.group}:\n" in page
                assert option.help in " ".join(page.split())


@pytest.mark.parametrize(
    "option", OPTIONS, ids=lambda option: f"{option.command} {option.names[0]}"
)
def test_the_table_of_options(option):
    long, *short = option.names
    assert option.command in COMMANDS and re.fullmatch("--[a-z0-9]+(-[a-z0-9]+)*", long)
    assert len(short) <= 1 and all(re.fullmatch("-[A-Za-z0-9]", name) for name in short)
    assert option.help and not option.help.endswith(".")
    assert "|" not in option.usage + option.help  # they stand in a table of README
    names = [name for other in OPTIONS if other.command == option.command for name in other.names]
    assert all(names.count(name) == 1 for name in option.names)
    assert not option.repeat or option.metavar


ROW = re.compile(r"^\| `(\w+)` \| `(-[^`]+)` \| (.+) \|$", re.MULTILINE)
GOOD = "".join(f"| `{o.command}` | `{o.usage}` | {o.help} |\n" for o in OPTIONS)


def wrong_rows(readme):
    """What README's table lacks of what `--help` says, what it has too much, and what twice."""
    rows = ROW.findall(readme)
    known = {(option.command, option.usage, option.help) for option in OPTIONS}
    return known - set(rows), set(rows) - known, {row for row in rows if rows.count(row) > 1}


def test_a_table_is_checked():
    assert wrong_rows(f"# Options\n\n| a | b | c |\n|---|---|---|\n{GOOD}") == (set(),) * 3
    for option in OPTIONS:
        row = (option.command, option.usage, option.help)
        for changed in (option.usage + "s", option.help + "?"):
            before = "| `{}` | `{}` | {} |\n".format(*row)
            after = before.replace(changed[:-1], changed)
            missing, surplus, twice = wrong_rows(GOOD.replace(before, after))
            assert missing == {row} and len(surplus) == 1 and not twice
        assert wrong_rows(GOOD.replace(before, "")) == ({row}, set(), set())
        assert wrong_rows(GOOD + before) == (set(), set(), {row})


def test_readme_has_every_option():
    """Of every command, in the words of its help, in one table."""
    readme = (ROOT / "README.md").read_text()
    assert wrong_rows(readme) == (set(), set(), set())
    rows = [line for line in readme.splitlines() if ROW.match(line)]
    assert "\n".join(rows) in readme, "the table has gaps"


# ---- cost ----------------------------------------------------------------------------------------


def test_nothing_heavy_is_imported():
    code = (
        "import json, sys; from control.options import parse; parse(['run', '-s', 'x']); "
        "print(json.dumps(sorted(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, check=True
    )
    loaded = set(json.loads(run.stdout))
    heavy = {"numba", "numpy", "pyroute2", "rich", "prometheus_client", "asyncio", "ssl"}
    assert not loaded & {*heavy, "dataclasses", "inspect", "socket", "ipaddress", "shm.schema"}
