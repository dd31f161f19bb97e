"""context.py - what one worker keeps to itself: its rings, its batches, its scratch memory.

Theory      A worker is one address, `w`: the start of a `context` struct in private memory.
            Everything else hangs off it: addresses of the shared parts, of its private ring
            structs, of fixed scratch areas. Compiled code passes `w` along and nothing else that
            lives longer than a call.
Why so      One int64 argument makes calls from Python plain C calls and needs no numba type of our
            own. The structs are declared in the text form of shm/layout.py, so tests can read them
            by name.
Limits      No allocation after the worker is made: every batch has its fixed room, named below.
Ownership   Private to the worker. Shared structs are declared in shm/schema.py.
"""

from __future__ import annotations

import ctypes
import mmap

from shm import mem, schema
from shm.access import accessors
from shm.layout import View, parse
from shm.segment import Segment

IOV_BYTES = 16
EVENTS_MAX = 64
EVENT_BYTES = 12
USED_LOG_BYTES = 8 * schema.QUEUE_SIZE_MAX  # a packed ring's chains, each returned once
CHAINS_MAX = 64  # chains taken from one tx ring in one breath
CHAIN_IOV_MAX = 1024  # pieces of one chain (a chain may cross memory regions)
GATHER_IOV_MAX = 1024  # UIO_MAXIOV: pieces of one sendmsg
GATHERS_MAX = CHAINS_MAX  # flows whose payload is gathered at a time (dataplane/tcp_gather.py)
RX_BUFS_MAX = 1024  # receive buffers of one batch
RX_FRAMES_MAX = 256  # frames of one batch
HEADERS_MAX = 256  # bytes of a tx frame copied once and parsed (virtio-net + Ethernet + IP + L4)
VNET_BYTES = 12  # struct virtio_net_hdr_v1 (virtio 5.1.6)
SLOW_SLOTS = 32  # slow-path frames of one breath
SLOW_BYTES = 2048
DIRTY_MAX = schema.FLOWS_MAX  # flows touched in one breath: each stands on the list once
LISTENERS_MAX = 4 * 65536  # every port, TCP and UDP, for both families
ERRORS_MAX = 64
HELD_MAX = 8  # flows whose payload waits (dataplane/tcp_held.py)
HELD_BYTES = 1 << 21  # a power of two: sequence numbers wrap
SPARES_MAX = 8  # sockets of each family kept ready (dataplane/spare.py)
TRAIN_MAX = 64  # datagrams of one train (dataplane/udp_train.py)
BATCH_MAX = 32  # datagrams of one recvmmsg
MMSG_BYTES = 64  # struct mmsghdr
CONTROL_BYTES = 32  # ancillary data of one datagram: its segment size
TAIL_BYTES = 1 << 16  # of a datagram that is larger than its receive buffer
RANGES = 32  # pieces of one flow that wait
NOBODY = 0xFFFFFFFF  # in a line of flows
LINE_BYTES = 8
LINES = 2 + schema.WORKERS_MAX + schema.PAIRS_MAX  # dataplane/lifecycle.py
LINE_WAITS, FRAME_WAITS = 1, 2  # ring.starved: flows in line, a frame that crosses

# Reasons for which a breath asks for attention in plain Python.
ATTEND_SLOW, ATTEND_ERRORS, ATTEND_MAILBOX, ATTEND_BROKEN, ATTEND_AWAKE = 1, 2, 4, 8, 16
# What an epoll event is about: the top byte of its data word; the rest is generation << 32 | index.
EVENT_KICK, EVENT_FLOW, EVENT_LISTENER, EVENT_WAKE, EVENT_MAILBOX, EVENT_INBOX = 1, 2, 3, 4, 5, 6

CONTEXT = parse("""
struct context: one worker's own state
  writer worker:
    u64 instance             shared: struct instance
    u64 net                  shared: struct net
    u64 seen                 shared: struct seen
    u64 me                   shared: this worker's struct worker
    u64 workers_at           shared: all struct worker
    u64 flows                shared: flow 0
    u64 handoffs             shared: struct handoff of (from 0, to 0)
    u64 table                private: struct table (flows/table.py)
    u64 wheel                private: struct wheel (flows/expiry.py)
    u64 id                   this worker's number
    u64 workers              how many there are
    i32 epfd                 epoll descriptor
    i32 wake_fd              eventfd others write to
    i32 inbox_fd             socket on which flows of others come (dataplane/rehome.py)
    u32 inbox                1: some may be waiting there
    u64 now_ms               CLOCK_MONOTONIC at the start of the breath
    u64 now_ns               the same
    u64 worked_ns            when there was something to do last
    u64 poll_ns              how long to look for more before sleeping, learnt
    u64 poll_until_ns        until then the worker looks for work instead of sleeping
    u32 polling              1: it does so now, and rings have not asked to be kicked
    u64 regions              private: memory regions, sorted by guest address
    u64 region_count         how many
    u64 region_hit           region of the last translation
    u64 rings                private: struct ring of ring 0
    u64 used_logs            private: USED_LOG_BYTES for each ring
    u64 wake_fds             private: u64 per worker, its eventfd
    u64 inboxes              private: u64 per worker, the other end of its inbox
    u64 features             virtio features acked by the driver
    u32 mergeable            1: MRG_RXBUF
    u32 guest_csum           1: GUEST_CSUM
    u32 guest_tso4           1: GUEST_TSO4
    u32 guest_tso6           1: GUEST_TSO6
    u32 host_tso4            1: HOST_TSO4
    u32 host_tso6            1: HOST_TSO6
    u32 host_ecn             1: HOST_ECN
    u32 csum                 1: CSUM
    u32 host_uso             1: HOST_USO
    u32 guest_uso4           1: GUEST_USO4
    u32 guest_uso6           1: GUEST_USO6
    u64 events               scratch: epoll_event[EVENTS_MAX]
    u64 chain_iov            scratch: iovec of the chain at hand
    u64 chains               scratch: u64[CHAINS_MAX] id | slots << 16 of this burst
    u64 hdr                  scratch: first HEADERS_MAX bytes of the frame at hand
    u64 key                  scratch: flow key (flows/table.py) of the frame at hand
    u64 address              scratch: 16-byte addresses for translation
    u64 sockaddr             scratch: sockaddr_in6 and a length
    u64 msghdr               scratch: struct msghdr
    u64 option               scratch: socket option values
    u64 gathers              batch: struct gather
    u64 gathers_count        batch: how many were opened
    u64 train_iov            batch: iovec of udp payload waiting for sendmsg
    u64 train_msgs           batch: mmsghdr[TRAIN_MAX] over train_iov
    u64 train_flow           batch: flow index + 1, 0 none
    u64 train_number         batch: datagrams
    u64 train_count          batch: pieces
    u64 train_bytes          batch: bytes
    u64 train_size           batch: bytes of the first datagram
    u64 rx_iov               batch: iovec of receive buffers (payload room only)
    u64 rx_raw               batch: iovec of receive buffers (whole)
    u64 rx_bufs              batch: struct rxbuf
    u64 rx_frames            batch: struct rxframe
    u64 rx_msgs              batch: mmsghdr[BATCH_MAX] over rx_iov
    u64 rx_control           batch: CONTROL_BYTES of ancillary data for each
    u64 tails                scratch: per datagram, room for its head and TAIL_BYTES beyond
    u64 rx_buf_count         batch: buffers taken
    u64 rx_slots             batch: slots of the ring they take
    u64 rx_raw_count         batch: pieces in rx_raw
    u64 rx_iov_count         batch: pieces in rx_iov
    u64 rx_frame_count       batch: frames laid out
    u64 out                  scratch: headers of the frame being built
    u64 fragmented           messages cut into fragments (dataplane/fragment.py)
    u64 slow                 slow-path frames: SLOW_SLOTS of SLOW_BYTES
    u64 slow_meta            u64 per slot: length | pair << 32 | checksum trusted << 48
    u64 slow_count           slots filled
    u64 dirty                u32 flow indexes touched in this breath
    u64 dirty_count          how many
    u64 errors               u32 flow indexes whose socket has an error queue to read
    u64 error_count          how many
    u64 listeners            private: struct listener
    u64 listener_count       how many
    u64 discard              scratch: 64 KiB nobody reads
    u32 busy                 1: work is left, do not sleep
    u32 slept                this breath began with a sleep: 1 a timer ended it, 2 an event
    u32 rests                instance.rests when control was told last that there is work
    u32 events_left          of the last epoll_wait, not looked at yet
    u32 worked               1: there was something to do in this breath
    u32 connecting           1: a connection to the host was begun in this breath
    u64 spares               private: struct spares, IPv4's and IPv6's
    u32 round_robin          next pair for connections from the host
    u64 frame_bytes          frame at hand: Ethernet bytes
    u64 chain_count          frame at hand: pieces in chain_iov
    u64 l3                   frame at hand: offset of the IP header in hdr
    u64 l4                   frame at hand: offset of the L4 header in hdr
    u64 l4_bytes             frame at hand: L4 header and payload
    u64 hops                 frame at hand: TTL or hop limit
    u64 pair                 frame at hand: queue pair it came on
    u64 v6                   frame at hand: 1 for IPv6
    u64 discard_iov          scratch: iovecs over `discard`, for kernels without SO_PEEK_OFF
    u64 control              scratch: ancillary data
    u64 held                 private: struct held
    u64 held_bytes           private: HELD_BYTES per struct held
    u64 pairs_end            all rings beyond this pair are stopped
    u64 lines                private: LINE_BYTES per line of flows: the first, the last (u32)
    u64 crossed              frame at hand: 1 when another worker handed it over
    u64 listen_waiting       1: connections wait for a guest that is not there yet
    u64 tx_first             the pair whose transmit ring is looked at first
    u64 retried              frame at hand: 1 when it has waited for room in a hand-off ring
    u64 handoff_held         1: a frame waits: for receive buffers, or for room in a hand-off ring
    u64 full_since_ms        private: u64 for each worker: since when a frame for it waits, 0 none
    u64 wakes                bit k: worker k was given frames and is to be woken if it sleeps
    u64 wake_bytes           how many bytes of them
    u64 attend               what Python must look at after this breath (ATTEND_*)
""")

RING = parse("""
struct ring: the device side of one virtqueue; cursors: virtq_split.py, virtq_packed.py
  writer worker:
    u32 running              1: started, addresses valid
    u32 enabled              1: SET_VRING_ENABLE
    u32 num                  entries
    u32 index                ring index: 2p rx, 2p+1 tx
    u64 desc                 host address of the descriptor table or ring
    u64 avail                host address of the available ring; packed: driver's event suppression
    u64 used                 host address of the used ring; packed: ours
    u32 packed               1: VIRTIO_F_RING_PACKED acked
    u32 in_order             1: VIRTIO_F_IN_ORDER acked
    u32 event_idx            1: VIRTIO_F_EVENT_IDX acked
    u32 last_avail           cursor of the next chain to take
    u32 seen_avail           split: the driver's index when last read
    u32 used_idx             cursor of the next chain to return
    u32 published            the same, of what the driver has been shown
    u32 chain_id             chain walked last: what the driver knows it by
    u32 chain_slots          chain walked last: slots
    u32 log_count            packed: chains returned but not shown
    u64 used_log             packed: they: u32 length, u16 id, u16 slots
    u32 pending              1: entries may be waiting (kicked, or the budget ended)
    u32 suppressed           1: the driver was told not to kick
    i32 kick_fd              eventfd, -1 none
    i32 call_fd              eventfd or socket, -1 none
    i32 err_fd               eventfd, -1 none
    u32 starved              who waits for buffers, or tx: for room in a hand-off ring (*_WAITS)
    u64 short_since_ms       since when a handed-over frame waits for buffers, 0 none
    u32 short_at             cursor at which buffers did not suffice + 1, 0 none
    u64 counters             shared: struct queue
""")

REGION = parse("""
struct region: one piece of guest memory
  writer worker:
    u64 gpa                  guest physical address
    u64 size                 bytes
    u64 host                 where it is mapped here
""")

RXBUF = parse("""
struct rxbuf: one receive buffer (descriptor chain) of a batch
  writer worker:
    u64 chain                chain_id | chain_slots << 16
    u64 first                its first piece in rx_raw
    u64 size                 bytes of room
""")

RXFRAME = parse("""
struct rxframe: one frame laid out over receive buffers
  writer worker:
    u64 first                first buffer
    u64 count                buffers
    u64 room                 bytes of payload it can take
""")

LISTENER = parse("""
struct listener: one forwarded port
  writer worker:
    i32 fd                   listening socket
    u32 protocol             index in schema.PROTOCOLS
    u32 port                 port bound on the host
    u32 guest_port           port of the guest
    u32 ready                1: connections may be waiting
    u8[16] guest_addr        address of the guest, all zero: the one last seen
""")

HELD = parse(f"""
struct held: payload of one flow that cannot go to its socket yet
  writer worker:
    u32 owner                flow index + 1, 0 none
    u32 count                ranges held
    u64 used_ms              when a segment was last added
    u32[{RANGES}] left       first sequence number of each range, in order, none touching
    u32[{RANGES}] right      the one after its last
    u32 latest               first sequence number of the segment added last
    u32 finished             1: the guest's FIN was seen
    u32 fin                  its sequence number
""")

SPARES = parse(f"""
struct spares: sockets of one family that wait for connections (dataplane/spare.py)
  writer worker:
    u32 count                how many there are
    u32 wanted               how many there should be
    i32[{SPARES_MAX}] fds               they
""")

GATHER = parse(f"""
struct gather: tcp payload of one flow waiting for sendmsg
  writer worker:
    u32 flow                 flow index + 1, 0 none
    u32 fin                  1: the guest's FIN follows
    u64 count                pieces
    u64 bytes                bytes
    u64[{2 * GATHER_IOV_MAX}] iov           iovec of the pieces
""")

context = accessors(CONTEXT)
gather = accessors(GATHER)
spares = accessors(SPARES)
held = accessors(HELD)
ring = accessors(RING)
region = accessors(REGION)
rxbuf = accessors(RXBUF)
rxframe = accessors(RXFRAME)
listener = accessors(LISTENER)


class Arena:
    """Private memory for compiled code, zeroed, never freed while the worker lives."""

    def __init__(self) -> None:
        self._areas: dict[int, mmap.mmap] = {}

    def take(self, size: int, name: str) -> int:
        """The address of `size` new zero bytes, page aligned."""
        area = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        self._areas[address] = area
        mem.watch(address, size, name)
        return address

    def buffer(self, address: int) -> mmap.mmap:
        """The memory `take` gave, for Python code."""
        return self._areas[address]

    def close(self) -> None:
        """Give everything back (tests make many workers in one process)."""
        for address, area in self._areas.items():
            mem.unwatch(address)
            area.close()
        self._areas = {}


SCRATCH = {
    "regions": REGION.size * schema.MEMORY_SLOTS_MAX,
    "rings": RING.size * schema.RINGS_MAX,
    "used_logs": USED_LOG_BYTES * schema.RINGS_MAX,
    "wake_fds": 8 * schema.WORKERS_MAX,
    "inboxes": 8 * schema.WORKERS_MAX,
    "full_since_ms": 8 * schema.WORKERS_MAX,
    "events": EVENT_BYTES * EVENTS_MAX,
    "chain_iov": IOV_BYTES * CHAIN_IOV_MAX,
    "chains": 8 * CHAINS_MAX,
    "hdr": 2 * HEADERS_MAX,
    "key": 64,
    "address": 128,
    "sockaddr": 64,
    "msghdr": 64,
    "option": 128,
    "spares": 2 * SPARES.size,
    "gathers": GATHER.size * GATHERS_MAX,
    "train_iov": IOV_BYTES * GATHER_IOV_MAX,
    "train_msgs": MMSG_BYTES * TRAIN_MAX,
    "rx_msgs": MMSG_BYTES * BATCH_MAX,
    "rx_control": CONTROL_BYTES * BATCH_MAX,
    "tails": 2 * TAIL_BYTES * BATCH_MAX,
    "rx_iov": IOV_BYTES * GATHER_IOV_MAX * 2,
    "rx_raw": IOV_BYTES * CHAIN_IOV_MAX * 4,
    "rx_bufs": RXBUF.size * RX_BUFS_MAX,
    "rx_frames": RXFRAME.size * RX_FRAMES_MAX,
    "out": 512,
    "slow": SLOW_SLOTS * SLOW_BYTES,
    "slow_meta": 8 * SLOW_SLOTS,
    "dirty": 4 * DIRTY_MAX,
    "lines": LINE_BYTES * LINES,
    "errors": 4 * ERRORS_MAX,
    "listeners": LISTENER.size * LISTENERS_MAX,
    "discard": 1 << 16,
    "discard_iov": IOV_BYTES * 512,
    "control": 512,
    "held": HELD.size * HELD_MAX,
    "held_bytes": HELD_BYTES * HELD_MAX,
}


class Context:
    """Makes and holds one worker's memory. `address` is what compiled code calls `w`."""

    def __init__(self, segment: Segment, worker_id: int, workers: int) -> None:
        self.arena = Arena()
        self.segment = segment
        self.address = self.arena.take(CONTEXT.size, "context")
        self.view = view = View(CONTEXT, self.arena.buffer(self.address), 0)
        base, at = segment.address, segment.offsets
        mem.watch(base, at.size, "segment")
        for name, offset in (
            ("instance", at.instance),
            ("net", at.net),
            ("seen", at.seen),
            ("me", at.worker + schema.WORKER.size * worker_id),
            ("workers_at", at.worker),
            ("flows", at.flow),
            ("handoffs", at.handoff),
        ):
            view[name] = base + offset
        for name, size in SCRATCH.items():
            view[name] = self.arena.take(size, name)
        view["id"] = worker_id
        view["workers"] = workers
        view["epfd"] = view["wake_fd"] = -1
        self.scratch("lines")[:] = bytes([0xFF]) * SCRATCH["lines"]
        for index in range(schema.RINGS_MAX):
            ring = self.ring(index)
            ring["index"] = index
            ring["used_log"] = view["used_logs"] + index * USED_LOG_BYTES
            ring["counters"] = base + at.queue + index * schema.QUEUE.size
            for name in ("kick_fd", "call_fd", "err_fd"):
                ring[name] = -1

    def scratch(self, name: str) -> mmap.mmap:
        """One of the SCRATCH areas, for Python code that runs between breaths."""
        return self.arena.buffer(self.view[name])

    def ring(self, index: int) -> View:
        """The private struct of ring `index`."""
        return View(RING, self.scratch("rings"), index * RING.size)

    def close(self) -> None:
        """Give all private memory back."""
        mem.unwatch(self.segment.address)
        self.arena.close()
