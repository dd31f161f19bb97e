"""metrics.py - the instance's counters, as Prometheus metrics.

Theory      Workers and control count in the shared segment all the time; a scrape reads it (plain
            loads: the data plane does not notice) and makes samples of what it finds. Names, labels
            and help come from shm/schema.py where it has them.
Labels      queue: the pair's number; direction: rx to the guest, tx from it; worker: its number.
Drops       vhostmq_drops_total has a sample for a reason once that has happened on that ring: all
            of them would be 2000 samples, nearly all 0 for ever. The first is not seen as an
            increase, so an alert compares with 0. The help text explains every reason.
CPU time    The kernel adds what a worker that has died had used to its keeper's account: all
            restarts are there, also for a control that is new. A keeper's account ends with it: its
            last reading is kept, by this control, and the next one's added.
Server      prometheus_client's page on a server of our own: the one it comes with wakes up twice a
            second, asks the resolver for the name of the host before it serves, gives every client
            a thread for as long as that likes, and prints a traceback when one hangs up.
Limits      SCRAPES_MAX clients at a time; one that is silent for CLIENT_TIMEOUT_S is left.
Ownership   Reads the segment until `Server.close`; it may be unmapped after that. Importing this
            takes 50 ms, for prometheus_client: do so only to serve metrics.
Errors      MetricsError with one line when the port cannot be had. What a client does is ignored.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)

from control.options import VERSION
from control.processes import process_cpu
from shm import schema
from shm.layout import Struct, View

PREFIX = "vhostmq_"
DIRECTIONS = ("rx", "tx")
SCRAPES_MAX = 8
CLIENT_TIMEOUT_S = 10
FLOW_STATES = 8  # worker.flows has room for this many states of each protocol
WORD, SIGN = 1 << 64, 1 << 63


class Counter(NamedTuple):
    """A counter of every ring or worker: its field, its name, and its help where the schema's only
    makes sense beside the field before."""

    field: str
    name: str
    help: str = ""


RING_COUNTERS = (
    Counter("packets", "packets"),
    Counter("bytes", "bytes", "bytes of the frames carried, Ethernet header included"),
    Counter("kicks", "kicks"),
    Counter("calls", "calls"),
    Counter("calls_suppressed", "calls_suppressed"),
    Counter("errors", "queue_errors"),
)
WORKER_COUNTERS = (
    Counter("breaths", "breaths"),
    Counter("handoff_frames", "handoff_frames"),
    Counter("handoff_bytes", "handoff_bytes", "bytes copied to give frames to another worker"),
    Counter("rehomed_flows", "rehomed_flows"),
    Counter("moves_damped", "moves_damped"),
    Counter("inherited_flows", "inherited_flows"),
    Counter("slow_frames", "slow_frames"),
    Counter("retransmits", "retransmits"),
    Counter("held_bytes", "held_bytes"),
    Counter("resets", "resets"),
    Counter("accept_failed", "accept_failed"),
    Counter("restarts", "worker_restarts"),
)


class MetricsError(Exception):
    """Metrics cannot be served; the text is one line for the operator."""


class Collector:
    """What one scrape finds, for a registry of prometheus_client."""

    def __init__(self, segment_buffer: Any, offsets: schema.Offsets, pairs: int, workers: int):
        """`segment_buffer`: the mapped segment; `pairs` and `workers`: how many there are."""
        self.rings = [
            ((str(ring // 2), DIRECTIONS[ring % 2]), view)
            for ring, view in enumerate(
                _views(schema.QUEUE, segment_buffer, offsets.queue, 2 * pairs)
            )
        ]
        self.workers = [
            ((str(number),), view)
            for number, view in enumerate(
                _views(schema.WORKER, segment_buffer, offsets.worker, workers)
            )
        ]
        self.pairs = pairs
        self.instance = View(schema.INSTANCE, segment_buffer, offsets.instance)
        self._cpu = [CpuTime() for _ in range(workers)]
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        """Every metric, as of now."""
        yield InfoMetricFamily(f"{PREFIX}build", "What is running.", value={"version": VERSION})
        yield GaugeMetricFamily(f"{PREFIX}queue_pairs", "Queue pairs offered.", self.pairs)
        yield GaugeMetricFamily(f"{PREFIX}workers", "Worker processes.", len(self.workers))
        text = "Times another control took the place of one that died."
        yield CounterMetricFamily(f"{PREFIX}control_restarts", text, self.instance["restarts"])
        labels = ("queue", "direction")
        yield from _counters(RING_COUNTERS, schema.QUEUE, labels, self.rings)
        yield self._drops()
        yield from _counters(WORKER_COUNTERS, schema.WORKER, ("worker",), self.workers)
        yield self._worker_cpu()
        yield self._flows_opened()
        yield self._flows()

    def _drops(self) -> Metric:
        reasons = "; ".join(f"{name}: {text}" for name, text in schema.DROPS)
        family = CounterMetricFamily(
            f"{PREFIX}drops",
            f"Frames dropped, by reason. {reasons}.",
            labels=("queue", "direction", "reason"),
        )
        for labels, ring in self.rings:
            for index, (reason, _) in enumerate(schema.DROPS):
                if count := ring.element("drops", index):
                    family.add_metric((*labels, reason), count)
        return family

    def _worker_cpu(self) -> Metric:
        family = CounterMetricFamily(
            f"{PREFIX}worker_cpu_seconds",
            "Processor time used by the worker, over all its restarts.",
            labels=("worker",),
        )
        with self._lock:  # scrapes may meet
            for (labels, worker), cpu in zip(self.workers, self._cpu, strict=True):
                family.add_metric(labels, cpu.total_s(worker["keeper"], worker["pid"]))
        return family

    def _flows_opened(self) -> Metric:
        family = CounterMetricFamily(
            f"{PREFIX}flows_opened", "Flows opened, by protocol.", labels=("protocol",)
        )
        for index, protocol in enumerate(schema.PROTOCOLS):
            opened = sum(worker.element("opened", index) for _, worker in self.workers)
            family.add_metric((protocol,), opened)
        return family

    def _flows(self) -> Metric:
        family = GaugeMetricFamily(
            f"{PREFIX}flows", "Flows now, by protocol and state.", labels=("protocol", "state")
        )
        for number, protocol in enumerate(schema.PROTOCOLS):
            for state, name in enumerate(schema.STATES):
                if name != "free":
                    index = number * FLOW_STATES + state
                    family.add_metric((protocol, name), self._flows_in(index))
        return family

    def _flows_in(self, index: int) -> int:
        """A flow may be opened by one worker and closed by another, whose own count is below 0
        then: only the sum has a meaning, and not while a flow is on its way."""
        total = sum(worker.element("flows", index) for _, worker in self.workers) % WORD
        return 0 if total & SIGN else total


class CpuTime:
    """Processor time of the processes that are one worker after another, with one keeper after
    another."""

    def __init__(self) -> None:
        self._before_s = 0.0
        self._keeper = (0, 0)
        self._now_s = 0.0

    def total_s(self, keeper: int, worker: int) -> float:
        """Seconds until now, where these processes are keeper and worker, or none is (0)."""
        kept = process_cpu(keeper)
        if not kept.started:
            return self._before_s + self._now_s
        if (keeper, kept.started) != self._keeper:
            self._before_s += self._now_s
            self._keeper, self._now_s = (keeper, kept.started), 0.0
        # A worker may end between the two looks: what it had used is missed then, and never falls.
        self._now_s = max(self._now_s, kept.ended_s + process_cpu(worker).used_s)
        return self._before_s + self._now_s


class _Request(WSGIRequestHandler):
    """One client's request."""

    timeout = CLIENT_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not worth a line."""


class Server(ThreadingMixIn, WSGIServer):
    """Metrics on a port, bound from now on and served from `start`, until `close`."""

    daemon_threads = True
    allow_reuse_port = False  # newer Pythons default to sharing it with a second instance

    def __init__(self, collector: Collector, address: str, port: int) -> None:
        """Bind, at an IP address; raises MetricsError."""
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._slots = threading.BoundedSemaphore(SCRAPES_MAX)
        self._closing = False
        try:
            super().__init__((address, port), _Request)
        except OSError as error:
            where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
            raise MetricsError(f"cannot serve metrics on {where}: {error.strerror}") from error
        registry = CollectorRegistry()
        registry.register(collector)
        self.set_app(make_wsgi_app(registry))
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Serve, on a thread of this process."""
        self._thread = threading.Thread(target=self._serve, name="metrics", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._closing:
            self.handle_request()

    def close(self) -> None:
        """Stop serving."""
        self._closing = True
        if self._thread:
            self.socket.shutdown(socket.SHUT_RD)  # the thread's wait ends
            self._thread.join()
        self.server_close()

    def server_bind(self) -> None:
        """Bind, without a look at the resolver."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether to serve one more client now."""
        return self._slots.acquire(blocking=False)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve a client, on a thread of its own."""
        try:
            with contextlib.suppress(OSError):
                super().finish_request(request, client_address)
        finally:
            self._slots.release()


def _views(struct: Struct, buffer: Any, start: int, count: int) -> list[View]:
    """`count` structs, one behind the other."""
    return [View(struct, buffer, start + number * struct.size) for number in range(count)]


def _counters(
    counters: tuple[Counter, ...],
    struct: Struct,
    names: tuple[str, ...],
    blocks: list[tuple[Any, View]],
) -> Iterator[Metric]:
    """One family for each counter, one sample for each block."""
    for counter in counters:
        text = counter.help or struct.fields[counter.field].doc
        text = f"{text[0].upper()}{text[1:]}."
        family = CounterMetricFamily(PREFIX + counter.name, text, labels=names)
        for labels, view in blocks:
            family.add_metric(labels, view[counter.field])
        yield family
