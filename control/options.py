"""options.py - the command line: one table of options, and what is made of it.

Theory      `vhostmq COMMAND [OPTION...]`. OPTIONS lists every option of every command as data: the
            parser and the help are made from it, and a test holds README's table against it. What
            `run` has in common with passt has passt's name and meaning.
Attributes  An option's value is an attribute named like its long form, with underscores; one that
            may be repeated is a list. What addresses, names and ports mean is for wanted.py and
            flows/forward.py to judge: here they stay text.
Cost        Nothing but argparse is imported, and one command's parser made: a front-end expects its
            first answer 0.2 s after exec.
Limits      Options may be shortened while they stay unambiguous, as with passt.
Ownership   Pure, but for the end of the process.
Errors      A wrong command line ends the process with status 2 and one line on standard error.
            Help and version go to standard output, with status 0.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

VERSION = "0.1.0"
QUEUES_MAX = 32  # shm/schema.py PAIRS_MAX and WORKERS_MAX, not imported for speed
POLL_US, POLL_MAX_US = 0, 1000  # the default by measurement: benchmarks/cases.py, polling
MTU_MIN, MTU_MAX = 68, 65520  # wanted.py, not imported for speed
CPU_MAX = 8191  # CONFIG_NR_CPUS of the largest Linux

COMMANDS = {
    "run": "serve one guest",
    "warm": "compile the data plane now, so that the first run need not",
    "guest": "be a small guest, for trying things out",
    "flows": "list the flows of a running instance",
    "workers": "tell what each worker of a running instance does",
}
USAGE = {
    "run": "vhostmq run (--socket PATH | --fd N) [OPTION...]",
    "warm": "vhostmq warm [OPTION...]",
    "guest": "vhostmq guest --socket PATH [OPTION...] [-- COMMAND...]",
    "flows": "vhostmq flows [OPTION...]",
    "workers": "vhostmq workers [OPTION...]",
}


class Metrics(NamedTuple):
    """Where metrics are served."""

    address: str
    port: int


class Option(NamedTuple):
    """One option. `names`: long form first. Without a `metavar` it is a flag."""

    command: str
    group: str
    names: tuple[str, ...]
    metavar: str
    help: str
    repeat: bool = False
    convert: Callable[[str], Any] = str
    default: Any = None

    @property
    def usage(self) -> str:
        """Short form, long form, value: as help and README show it."""
        return ", ".join(reversed(self.names)) + (self.metavar and f" {self.metavar}")


def _number(first: int, last: int) -> Callable[[str], int]:
    """A converter for whole numbers from `first` to `last`."""

    def convert(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number")
        if not first <= int(text) <= last:
            raise argparse.ArgumentTypeError(f"{text} is not within {first} to {last}")
        return int(text)

    return convert


def _cpus(text: str) -> tuple[int, ...]:
    """A[-B],..., in that order."""
    number = _number(0, CPU_MAX)
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        begin, end = number(first), number(last if dash else first)
        if begin > end:
            raise argparse.ArgumentTypeError(f"{part!r} is no range")
        found += range(begin, end + 1)
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} names a CPU twice")
    return tuple(found)


def _metrics(text: str) -> Metrics:
    """[ADDR:]PORT, an IPv6 address in brackets."""
    from ipaddress import ip_address  # only --metrics needs it

    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ip_address(host[1:-1] if bracketed else host if colon else "127.0.0.1")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{host!r} is not an IP address") from None
    if bracketed != (address.version == 6):
        raise argparse.ArgumentTypeError(f"{text!r} is neither ADDR:PORT nor [ADDR]:PORT")
    return Metrics(str(address), _number(1, 65535)(port))


_FRONT, _WORK, _PORTS = "front-end", "queues and workers", "between host and guest"
_ADDRESS, _NAMES, _SWITCH, _OPERATE = "addresses", "names", "switches", "operation"
_SPEC = "none, all, or [ADDR][%IFACE/]A[-B][:C[-D]],~E[-F],... (default: none); may be repeated"

OPTIONS = (
    Option("run", _FRONT, ("--socket", "-s"), "PATH", "listen on this Unix socket"),
    Option(
        "run",
        _FRONT,
        ("--fd", "-F"),
        "N",
        "use this connected descriptor; implies --one-off",
        convert=_number(0, 1 << 20),
    ),
    Option("run", _FRONT, ("--one-off", "-1"), "", "exit when the first front-end has gone"),
    Option(
        "run",
        _WORK,
        ("--queues",),
        "N",
        f"queue pairs offered, 1 to {QUEUES_MAX} (default: {QUEUES_MAX})",
        convert=_number(1, QUEUES_MAX),
        default=QUEUES_MAX,
    ),
    Option(
        "run",
        _WORK,
        ("--workers",),
        "N",
        "worker processes (default: one per CPU or per one of --cpus, not more than queue pairs)",
        convert=_number(1, QUEUES_MAX),
    ),
    Option(
        "run",
        _WORK,
        ("--cpus",),
        "LIST",
        "pin workers to these CPUs in turn, as in 0-3,6 (default: not pinned)",
        convert=_cpus,
    ),
    Option(
        "run",
        _WORK,
        ("--poll-us",),
        "N",
        f"look up to N µs for more work before sleeping, 0 to {POLL_MAX_US} (default: {POLL_US})",
        convert=_number(0, POLL_MAX_US),
        default=POLL_US,
    ),
    Option(
        "run",
        _WORK,
        ("--features",),
        "LIST",
        "virtio features to leave out, as in --features=-host_tso4,-csum; or none (default: all)",
        default="",
    ),
    Option("run", _PORTS, ("--tcp-ports", "-t"), "SPEC", f"forward TCP: {_SPEC}", True),
    Option("run", _PORTS, ("--udp-ports", "-u"), "SPEC", "forward UDP: as --tcp-ports", True),
    Option(
        "run",
        _PORTS,
        ("--map-host-loopback",),
        "ADDR",
        "the host's loopback, for the guest, or none (default: the gateway); once per family",
        True,
    ),
    Option(
        "run",
        _PORTS,
        ("--map-guest-addr",),
        "ADDR",
        "the host at the address it shares with the guest, or none (default); once per family",
        True,
    ),
    Option("run", _PORTS, ("--no-map-gw",), "", "the gateway is not the host's loopback"),
    Option(
        "run",
        _ADDRESS,
        ("--address", "-a"),
        "ADDR",
        "the guest's address, ADDR or ADDR/LENGTH (default: the host's); once per family",
        True,
    ),
    Option(
        "run",
        _ADDRESS,
        ("--netmask", "-n"),
        "MASK",
        "IPv4 mask or its length (default: the host's)",
    ),
    Option(
        "run",
        _ADDRESS,
        ("--gateway", "-g"),
        "ADDR",
        "the guest's router (default: the host's); once per family",
        True,
    ),
    Option(
        "run",
        _ADDRESS,
        ("--interface", "-i"),
        "NAME",
        "take addresses and routes from here (default: where the default route is)",
    ),
    Option(
        "run",
        _ADDRESS,
        ("--mtu", "-m"),
        "N",
        f"MTU told to the guest in bytes, 0 for none (default: {MTU_MAX})",
    ),
    Option(
        "run", _ADDRESS, ("--mac-addr", "-M"), "MAC", "MAC address of everything the guest sees"
    ),
    Option("run", _ADDRESS, ("--ipv4-only", "-4"), "", "no IPv6"),
    Option("run", _ADDRESS, ("--ipv6-only", "-6"), "", "no IPv4"),
    Option(
        "run",
        _NAMES,
        ("--dns", "-D"),
        "ADDR",
        "name server told to the guest, or none (default: the host's); may be repeated",
        True,
    ),
    Option(
        "run",
        _NAMES,
        ("--dns-forward",),
        "ADDR",
        "pass queries to this address on to --dns-host; once per family",
        True,
    ),
    Option(
        "run",
        _NAMES,
        ("--dns-host",),
        "ADDR",
        "the resolver they are passed to (default: the host's first); once per family",
        True,
    ),
    Option(
        "run",
        _NAMES,
        ("--search", "-S"),
        "LIST",
        "search domains, separated by spaces, or none (default: the host's); may be repeated",
        True,
    ),
    Option("run", _NAMES, ("--hostname", "-H"), "NAME", "the guest's host name"),
    Option("run", _NAMES, ("--fqdn",), "NAME", "the guest's full name"),
    Option("run", _SWITCH, ("--no-tcp",), "", "no TCP"),
    Option("run", _SWITCH, ("--no-udp",), "", "no UDP"),
    Option("run", _SWITCH, ("--no-icmp",), "", "no ICMP, and so no NDP"),
    Option("run", _SWITCH, ("--no-dhcp",), "", "no answers to DHCP"),
    Option("run", _SWITCH, ("--no-dhcpv6",), "", "no answers to DHCPv6"),
    Option("run", _SWITCH, ("--no-ndp",), "", "no answers to NDP"),
    Option("run", _SWITCH, ("--no-ra",), "", "no router advertisements"),
    Option("run", _SWITCH, ("--no-dhcp-dns",), "", "no name servers in DHCP, DHCPv6 and NDP"),
    Option("run", _SWITCH, ("--no-dhcp-search",), "", "no search domains in them"),
    Option(
        "run",
        _OPERATE,
        ("--metrics",),
        "[ADDR:]PORT",
        "serve Prometheus metrics here (default ADDR: 127.0.0.1; IPv6 as [::1]:9100)",
        convert=_metrics,
    ),
    Option("run", _OPERATE, ("--pid", "-P"), "FILE", "write our process id to this file"),
    Option("run", _OPERATE, ("--quiet", "-q"), "", "errors only"),
    Option("run", _OPERATE, ("--debug", "-d"), "", "tell more"),
    Option(
        "run", _OPERATE, ("--foreground", "-f"), "", "no effect: run never leaves the foreground"
    ),
    Option("warm", _OPERATE, ("--quiet", "-q"), "", "errors only"),
    Option("guest", _FRONT, ("--socket", "-s"), "PATH", "where the back-end listens"),
    Option(
        "guest",
        _WORK,
        ("--queues",),
        "N",
        f"queue pairs, 1 to {QUEUES_MAX} (default: 1)",
        convert=_number(1, QUEUES_MAX),
        default=1,
    ),
    Option(
        "guest",
        _WORK,
        ("--features",),
        "LIST",
        "virtio features to do without, as for run (default: all the back-end offers)",
        default="",
    ),
    Option(
        "guest",
        _ADDRESS,
        ("--mtu",),
        "N",
        "MTU in bytes (default: what the back-end tells)",
        convert=_number(MTU_MIN, MTU_MAX),
    ),
    Option(
        "flows",
        _OPERATE,
        ("--pid", "-P"),
        "N",
        "of the instance with this process id (default: the only one there is)",
        convert=_number(1, 1 << 22),
    ),
    Option("flows", _OPERATE, ("--json",), "", "a JSON object a line, for programs"),
    Option(
        "workers",
        _OPERATE,
        ("--pid", "-P"),
        "N",
        "of the instance with this process id (default: the only one there is)",
        convert=_number(1, 1 << 22),
    ),
    Option(
        "workers",
        _OPERATE,
        ("--seconds",),
        "N",
        "measure for so long (default: 1)",
        convert=_number(1, 3600),
        default=1,
    ),
    Option("workers", _OPERATE, ("--json",), "", "a JSON object a line, for programs"),
)
"""Every option. `-h, --help` of every command, and `--version`, are argparse's own."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command line without its program name; `verb` is the command's name.

    run: `workers` is always a number, `metrics` a Metrics or None. guest: `command` is the list of
    words after `--`. Raises SystemExit as the module says.
    """
    verb, words = argv[0] if argv else "", list(argv[1:])
    if verb not in COMMANDS:
        _refuse_verb(verb)
    parser = _parser(verb)
    command: list[str] = []
    if verb == "guest" and "--" in words:
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
    options = parser.parse_args(words)
    options.verb = verb
    if verb == "guest":
        options.command = command
    check = _CHECKS.get(verb)
    if check is not None and (problem := check(options)):
        parser.error(problem)
    return options


def refuse(verb: str, problem: str) -> NoReturn:
    """End the process as `parse` does for a wrong command line of this command."""
    _parser(verb).error(problem)


class _Help(argparse.RawDescriptionHelpFormatter):
    """`-s, --socket PATH` instead of `--socket PATH, -s PATH`."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = ", ".join(sorted(action.option_strings, key=len))
        return f"{names} {action.metavar}" if action.metavar else names


class _Parser(argparse.ArgumentParser):
    """argparse, but what is wrong takes one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end with status 2."""
        text = " ".join(message.split())
        self.exit(2, f"{self.prog}: {text} (see {self.prog} --help)\n")


def _refuse_verb(verb: str) -> NoReturn:
    """No command: help or version was asked for, or it is an error."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    parser = _Parser(
        prog="vhostmq",
        usage="vhostmq COMMAND [OPTION...]",
        description="\n".join(["commands (each has --help):", *lines]),
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"vhostmq {VERSION}")
    if verb.startswith("-"):
        parser.parse_args([verb])
    given = f"{verb!r} is not a command" if verb else "no command"
    parser.error(f"{given}: give one of {', '.join(COMMANDS)}")


def _parser(verb: str) -> _Parser:
    """The parser of one command."""
    prog = f"vhostmq {verb}"
    usage, text = USAGE[verb], COMMANDS[verb]
    parser = _Parser(prog=prog, usage=usage, description=text, formatter_class=_Help)
    groups: dict[str, Any] = {}
    for option in OPTIONS:
        if option.command != verb:
            continue
        group = groups.get(option.group)
        if group is None:
            group = groups[option.group] = parser.add_argument_group(option.group)
        text = option.help.replace("%", "%%")
        if not option.metavar:
            group.add_argument(*option.names, action="store_true", help=text)
            continue
        group.add_argument(
            *option.names,
            metavar=option.metavar,
            action="append" if option.repeat else "store",
            type=option.convert,
            default=[] if option.repeat else option.default,
            help=text,
        )
    return parser


def _check_run(options: argparse.Namespace) -> str:
    """What is wrong with them together, or ""; fills in what follows from others."""
    if (options.socket is None) == (options.fd is None):
        return "give either --socket PATH or --fd N"
    if options.socket == "":
        return "--socket: the path is empty"
    if options.quiet and options.debug:
        return "--quiet and --debug exclude each other"
    if options.ipv4_only and options.ipv6_only:
        return "--ipv4-only and --ipv6-only exclude each other"
    options.one_off |= options.fd is not None  # nobody else can connect
    if options.workers is None:
        options.workers = min(options.queues, len(options.cpus or os.sched_getaffinity(0)))
    if options.workers > options.queues:
        return f"--workers {options.workers}: there are only {options.queues} queue pairs"
    for protocol in ("tcp", "udp"):
        specs = getattr(options, f"{protocol}_ports")
        if getattr(options, f"no_{protocol}") and set(specs) - {"none"}:
            return f"--no-{protocol} and --{protocol}-ports exclude each other"
    return ""


def _check_guest(options: argparse.Namespace) -> str:
    return "" if options.socket else "give --socket PATH"


_CHECKS = {"run": _check_run, "guest": _check_guest}
