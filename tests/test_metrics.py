"""Metrics over a real HTTP server, read back with prometheus_client's own parser."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families

from control import metrics
from control.metrics import Collector, CpuTime, MetricsError, Server
from control.options import VERSION
from control.processes import Cpu, process_cpu
from shm import schema

ROOT = Path(__file__).parent.parent
PAIRS, WORKERS = 3, 2
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Instance:
    """A segment, as far as metrics reads it, and what is served of it."""

    def __init__(self, pairs=PAIRS, workers=WORKERS):
        self.offsets = schema.offsets(workers)
        self.buffer = bytearray(self.offsets.locks)
        self.collector = Collector(self.buffer, self.offsets, pairs, workers)

    def ring(self, ring, field, value, index=0):
        base = self.offsets.queue + ring * schema.QUEUE.size
        schema.QUEUE.set(self.buffer, base, field, value, index)

    def worker(self, worker, field, value, index=0):
        base = self.offsets.worker + worker * schema.WORKER.size
        schema.WORKER.set(self.buffer, base, field, value, index)

    def samples(self):
        """{(name, labels): value} straight from the collector."""
        return {
            (sample.name, tuple(sample.labels.values())): sample.value
            for family in self.collector.collect()
            for sample in family.samples
        }


@pytest.fixture
def instance():
    return Instance()


def free_port(host="127.0.0.1"):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        return sock.getsockname()[1]


@pytest.fixture
def serve():
    """Serve a collector; the function returns the server."""
    servers = []

    def serve(instance, host="127.0.0.1", port=0):
        servers.append(Server(instance.collector, host, port or free_port(host)))
        servers[-1].start()
        return servers[-1]

    yield serve
    for server in servers:
        server.close()


def get(server, **headers):
    """(content type, text) of one scrape."""
    host = server.server_address[0]
    url = f"http://[{host}]" if ":" in host else f"http://{host}"
    request = urllib.request.Request(f"{url}:{server.server_port}/metrics", headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def scrape(server):
    """Metric families by name."""
    families = list(text_string_to_metric_families(get(server)[1]))
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


def values(families, name):
    """{labels: value} of one sample name."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in families.values()
        for sample in family.samples
        if sample.name == name
    }


# ---- what is there -------------------------------------------------------------------------------


def test_ring_counters(instance, serve):
    fields = {
        "packets": "packets",
        "bytes": "bytes",
        "kicks": "kicks",
        "calls": "calls",
        "calls_suppressed": "calls_suppressed",
        "errors": "queue_errors",
    }
    for place, field in enumerate(fields):
        for ring in range(2 * PAIRS + 2):  # the last pair is not offered
            instance.ring(ring, field, 1000 * place + ring)
    families = scrape(serve(instance))
    for place, name in enumerate(fields.values()):
        assert values(families, f"vhostmq_{name}_total") == {
            (direction, str(pair)): 1000 * place + 2 * pair + offset
            for pair in range(PAIRS)
            for offset, direction in enumerate(("rx", "tx"))
        }
        assert families[f"vhostmq_{name}"].type == "counter"


def test_every_counter_of_the_schema_is_served():
    """A field that is added to the page must come with a metric."""
    ring = {counter.field for counter in metrics.RING_COUNTERS} | {"drops"}
    ring |= {"used_cursor", "used_next"}  # no counters: for the worker's successor
    assert ring == set(schema.QUEUE.fields)
    worker = {counter.field for counter in metrics.WORKER_COUNTERS}
    worker |= {"opened", "flows", "pid", "sleeping", "stalled"}  # sums, CPU time; no counters
    worker |= {"keeper", "parting", "parting_fd"}  # for the worker's successor
    assert worker == set(schema.WORKER.fields)


def test_drops(instance, serve):
    server = serve(instance)
    assert values(scrape(server), "vhostmq_drops_total") == {}
    instance.ring(0, "drops", 7, schema.DROP["rx_full"])
    instance.ring(5, "drops", 1, schema.DROP["no_queue"])
    instance.ring(6, "drops", 9, schema.DROP["no_queue"])
    families = scrape(server)
    assert values(families, "vhostmq_drops_total") == {
        ("rx", "0", "rx_full"): 7,
        ("tx", "2", "no_queue"): 1,
    }
    for name, text in schema.DROPS:
        assert f"{name}: {text}" in families["vhostmq_drops"].documentation


def test_worker_counters(instance, serve):
    names = {"restarts": "worker_restarts"}
    fields = [
        "breaths",
        "handoff_frames",
        "handoff_bytes",
        "slow_frames",
        "retransmits",
        "held_bytes",
        "resets",
        "accept_failed",
        "restarts",
    ]
    for place, field in enumerate(fields):
        for worker in range(WORKERS + 1):
            instance.worker(worker, field, 10 * place + worker)
    families = scrape(serve(instance))
    for place, field in enumerate(fields):
        found = values(families, f"vhostmq_{names.get(field, field)}_total")
        assert found == {(str(worker),): 10 * place + worker for worker in range(WORKERS)}


def test_flows(instance, serve):
    tcp, icmp = schema.PROTOCOLS.index("tcp"), schema.PROTOCOLS.index("icmp")
    opened, closing = schema.STATES.index("open"), schema.STATES.index("closing")
    oneway = schema.STATES.index("oneway")
    instance.worker(0, "flows", 5, 8 * tcp + opened)
    instance.worker(1, "flows", 2**64 - 2, 8 * tcp + opened)  # two that worker 0 opened
    instance.worker(1, "flows", 2**64 - 1, 8 * tcp + closing)  # one that is on its way
    instance.worker(1, "flows", 3, 8 * icmp + oneway)
    for worker in range(WORKERS):
        instance.worker(worker, "opened", 10 + worker, icmp)
    families = scrape(serve(instance))
    flows = values(families, "vhostmq_flows")
    assert {labels: value for labels, value in flows.items() if value} == {
        ("tcp", "open"): 3,
        ("icmp", "oneway"): 3,
    }
    assert len(flows) == 3 * (len(schema.STATES) - 1)
    assert families["vhostmq_flows"].type == "gauge"
    assert values(families, "vhostmq_flows_opened_total") == {
        ("tcp",): 0,
        ("udp",): 0,
        ("icmp",): 21,
    }


def test_room_for_states():
    states, protocols = len(schema.STATES), len(schema.PROTOCOLS)
    assert states <= metrics.FLOW_STATES
    assert metrics.FLOW_STATES * protocols == schema.WORKER.fields["flows"].count
    assert schema.WORKER.fields["opened"].count == protocols


def test_constants(instance, serve):
    families = scrape(serve(instance))
    assert values(families, "vhostmq_queue_pairs") == {(): PAIRS}
    assert values(families, "vhostmq_workers") == {(): WORKERS}
    assert values(families, "vhostmq_build_info") == {(VERSION,): 1}


def test_only_our_metrics(instance, serve):
    assert all(name.startswith("vhostmq_") for name in scrape(serve(instance)))


def test_large_values(instance, serve):
    instance.ring(1, "bytes", 2**53)
    instance.ring(0, "bytes", 2**64 - 1)
    found = values(scrape(serve(instance)), "vhostmq_bytes_total")
    assert found["tx", "0"] == 2**53 and found["rx", "0"] == float(2**64 - 1)


def test_all_rings_of_the_largest_instance(serve):
    instance = Instance(schema.PAIRS_MAX, schema.WORKERS_MAX)
    for ring in range(schema.RINGS_MAX):
        instance.ring(ring, "packets", ring)
    families = scrape(serve(instance))
    assert sum(values(families, "vhostmq_packets_total").values()) == sum(range(schema.RINGS_MAX))
    assert len(values(families, "vhostmq_breaths_total")) == schema.WORKERS_MAX


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2 * PAIRS - 1),
            st.integers(0, len(schema.DROPS) - 1),
            st.integers(1, 2**64 - 1),
        ),
        max_size=20,
    )
)
def test_any_drops(drops):
    instance, expected = Instance(), {}
    for ring, reason, count in drops:
        instance.ring(ring, "drops", count, reason)
        labels = (str(ring // 2), "tx" if ring % 2 else "rx", schema.DROPS[reason][0])
        expected["vhostmq_drops_total", labels] = count
    found = instance.samples()
    assert {key: found[key] for key in found if key[0] == "vhostmq_drops_total"} == expected


# ---- what promtool would say ---------------------------------------------------------------------

ABBREVIATED = ("sec", "secs", "ms", "us", "ns", "kb", "mb", "milliseconds", "kilobytes", "bits")


def test_naming(instance, serve):
    """The rules of `promtool check metrics` and of Prometheus' page on naming."""
    instance.ring(0, "drops", 1, 0)
    families = scrape(serve(instance))
    assert len(families) >= 15
    for name, family in families.items():
        words = name.split("_")
        assert re.fullmatch("[a-z][a-z0-9_]*", name) and "__" not in name
        assert not set(words) & set(ABBREVIATED)
        assert not set(words) & {"counter", "gauge", "total", "count", "sum", "bucket"}
        assert family.documentation.endswith(".") and family.documentation[0].isupper()
        assert "\n" not in family.documentation
        assert family.samples or name == "vhostmq_drops"
        for sample in family.samples:
            assert sample.name == name + ("_total" if family.type == "counter" else "")
            assert all(re.fullmatch("[a-z]+", label) for label in sample.labels)
            labels = ("queue", "direction", "reason", "worker", "protocol", "state", "version")
            assert set(sample.labels) <= set(labels)
        series = [tuple(sample.labels.items()) for sample in family.samples]
        assert len(set(series)) == len(series)
        assert len({tuple(sample.labels) for sample in family.samples}) <= 1


def test_openmetrics(instance, serve):
    """The stricter format, which Prometheus asks for, parses too and has the same samples."""
    server = serve(instance)
    content_type, text = get(server, Accept="application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    strict = {family.name for family in parse_openmetrics(text)}
    plain = {name.removesuffix("_info") for name in scrape(server)}
    assert strict == plain


def test_content_type(instance, serve):
    assert get(serve(instance))[0].startswith("text/plain; version=")


# ---- processor time ------------------------------------------------------------------------------

BURN = """
import sys, time
for line in sys.stdin:
    end = time.process_time() + float(line)
    while time.process_time() < end:
        pass
    print(time.process_time(), flush=True)
"""


class Burner:
    """A process that uses processor time when told."""

    def __init__(self):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", BURN], stdin=pipe, stdout=pipe)
        self.pid = self.process.pid

    def burn(self, seconds):
        """Processor time of the process so far."""
        self.process.stdin.write(f"{seconds}\n".encode())
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def end(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def burners():
    made = [Burner(), Burner()]
    yield made
    for burner in made:
        burner.end()


def cpu(instance, worker=0):
    return instance.samples()["vhostmq_worker_cpu_seconds_total", (str(worker),)]


def test_cpu_time_over_restarts(instance, burners):
    """This process is the keeper: it has the accounts of children that it has waited for."""
    first, second = burners
    assert cpu(instance) == 0
    instance.worker(0, "keeper", os.getpid())
    start = cpu(instance)
    instance.worker(0, "pid", first.pid)
    used = first.burn(0.1)
    assert cpu(instance) - start == pytest.approx(used, abs=3 * TICK_S)
    used = first.burn(0.1)
    before = cpu(instance)
    assert before - start == pytest.approx(used, abs=3 * TICK_S)
    used = first.burn(0.1)  # nobody looks any more
    first.end()
    after = cpu(instance)
    assert after >= before and after - start == pytest.approx(used, abs=3 * TICK_S)
    instance.worker(0, "pid", 0)
    assert cpu(instance) == after
    instance.worker(0, "pid", second.pid)
    used += second.burn(0.1)
    assert cpu(instance) - start == pytest.approx(used, abs=6 * TICK_S)
    assert cpu(instance, 1) == 0
    another = CpuTime()  # of a control that has taken the place of this one
    assert another.total_s(os.getpid(), second.pid) == pytest.approx(cpu(instance), abs=TICK_S)


def looks(patch, processes):
    """What the kernel says of these processes: started, used, used by children that have ended."""
    none = Cpu(0, 0.0, 0.0)
    patch.setattr(metrics, "process_cpu", lambda pid: processes.get(pid, none))


def test_cpu_time_when_a_keeper_ends(monkeypatch):
    processes = {3: Cpu(90, 0.0, 1.0), 7: Cpu(100, 5.0, 0.0)}
    looks(monkeypatch, processes)
    worker = CpuTime()
    assert worker.total_s(3, 7) == 6
    del processes[7]
    assert worker.total_s(3, 7) == 6  # between its end and its keeper's look
    processes[3] = Cpu(90, 0.0, 6.5)
    assert worker.total_s(3, 0) == 6.5
    del processes[3]
    assert worker.total_s(3, 0) == 6.5
    processes |= {3: Cpu(200, 0.0, 0.0), 8: Cpu(201, 0.5, 0.0)}  # the numbers come again
    assert worker.total_s(3, 8) == 7
    assert worker.total_s(0, 0) == 7


LIVES = st.lists(st.lists(st.lists(st.integers(0, 9), min_size=1)))


@given(LIVES)
def test_cpu_time_is_the_sum_of_what_was_seen(keepers):
    """Keepers one after another, with workers one after another."""
    time, total = CpuTime(), 0
    with pytest.MonkeyPatch.context() as patch:
        for started, workers in enumerate(keepers, start=1):
            ended = 0
            for number, used in enumerate(workers, start=1):
                for so_far in sorted(used):
                    now = {1: Cpu(started, 0.0, float(ended)), 2: Cpu(number, float(so_far), 0.0)}
                    looks(patch, now)
                    assert time.total_s(1, 2) == total + ended + so_far
                ended += max(used)
            total += ended


def test_a_process_name_of_any_kind(tmp_path):
    """comm may hold spaces and parentheses."""
    program = tmp_path / "a) R 1 (b"
    program.symlink_to(sys.executable)
    process = subprocess.Popen([program, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process.stdin.write(b"0.05\n")
        process.stdin.flush()
        used = float(process.stdout.readline())
        assert process_cpu(process.pid).used_s == pytest.approx(used, abs=3 * TICK_S)
    finally:
        process.kill()
        process.communicate()


# ---- the server ----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_port_in_use(instance, serve, host):
    port = serve(instance, host).server_port
    with pytest.raises(MetricsError) as caught:
        Server(instance.collector, host, port)
    shown = f"[{host}]" if ":" in host else host
    assert str(caught.value) == f"cannot serve metrics on {shown}:{port}: Address already in use"


def test_address_of_nobody(instance):
    with pytest.raises(MetricsError, match="203.0.113.9:9100: Cannot assign"):
        Server(instance.collector, "203.0.113.9", 9100)


def test_ipv6(instance, serve):
    assert "vhostmq_workers" in scrape(serve(instance, "::1"))


def test_close_frees_the_port_and_the_segment(instance):
    server = Server(instance.collector, "127.0.0.1", free_port())
    server.start()
    scrape(server)
    server.close()
    with pytest.raises(OSError):
        get(server)
    again = Server(instance.collector, "127.0.0.1", server.server_port)
    again.start()
    scrape(again)
    again.close()
    instance.buffer.clear()  # BufferError while anybody holds a view


def test_no_resolver_is_asked(instance, serve, monkeypatch):
    def asked(*args):
        raise AssertionError("a name was looked up")

    monkeypatch.setattr(socket, "getfqdn", asked)
    monkeypatch.setattr(socket, "gethostbyaddr", asked)
    scrape(serve(instance))


def test_idle_costs_nothing(instance, serve):
    serve(instance)
    [thread] = [thread for thread in threading.enumerate() if thread.name == "metrics"]
    status = Path(f"/proc/self/task/{thread.native_id}/status")

    def switches():
        return re.findall(r"voluntary_ctxt_switches:\s+(\d+)", status.read_text())[0]

    time.sleep(0.2)
    before = switches()
    time.sleep(1.5)
    assert switches() == before


def connect(server):
    return socket.create_connection(server.server_address[:2], timeout=10)


def test_clients_that_hang_up(instance, serve, capfd):
    server = serve(instance)
    for sent in (b"", b"GET /metr", b"GET /metrics HTTP/1.0\r\n\r\n", b"\0" * 70000, b"\r\n"):
        with connect(server) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # RST
            try:
                client.sendall(sent)
            except OSError:
                continue
    scrape(server)
    assert capfd.readouterr() == ("", "")


def test_silent_clients(instance, serve, monkeypatch, capfd):
    """They hold a few threads for a while; the next scrape is served."""
    monkeypatch.setattr(metrics._Request, "timeout", 2)
    server = serve(instance)
    threads = threading.active_count()
    silent = [connect(server) for _ in range(3 * metrics.SCRAPES_MAX)]
    deadline = time.monotonic() + 10
    served = False
    while not served and time.monotonic() < deadline:
        try:
            served = bool(scrape(server))
        except OSError:
            time.sleep(0.05)
        # Clients are taken in turn: by now those that came before this scrape have been.
        assert threading.active_count() <= threads + metrics.SCRAPES_MAX
    assert served
    for client in silent:
        client.close()
    assert capfd.readouterr() == ("", "")


def test_scrapes_at_a_time(instance, serve):
    server = serve(instance)
    found, threads = [], []
    for _ in range(metrics.SCRAPES_MAX):
        threads.append(threading.Thread(target=lambda: found.append(len(scrape(server)))))
        threads[-1].start()
    for thread in threads:
        thread.join(10)
    assert len(found) == metrics.SCRAPES_MAX and len(set(found)) == 1


def test_nothing_of_the_data_plane_is_imported():
    code = "import json, sys; import control.metrics; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    loaded = json.loads(run.stdout)
    assert not {"numba", "numpy", "llvmlite", "shm.jit", "shm.access"} & set(loaded)


def test_readme_has_every_metric(instance):
    """Names and labels, in the order of the page."""
    found = []
    for family in instance.collector.collect():
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = sorted({name for sample in family.samples for name in sample.labels})
        found.append((family.name + suffix, labels or sorted(family._labelnames)))
    rows = re.findall(r"^\| `(vhostmq_\w+)` \| ([\w, ]*)\|", (ROOT / "README.md").read_text(), re.M)
    assert [(name, sorted(labels.replace(" ", "").split(",")) if labels.strip() else [])
            for name, labels in rows] == found  # fmt: skip
