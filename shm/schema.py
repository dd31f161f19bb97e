"""schema.py - the one page of bytes: every struct two processes share, every counter, drop reason
and limit.

Theory      One shared segment per instance. It holds, in this order: `instance` (what control
            decided), `net` (addresses), `seen` (what the guest uses), `worker` blocks, `queue`
            blocks (one per ring), the flow table (locks, tags, entries) and the hand-off rings (two
            per ordered pair of workers: tx frames, rx frames).
Why so      A struct is declared here once, in C-like text (layout.py reads it). Accessors for
            compiled code, the Prometheus names and the operator's views come from this page;
            nothing is written down twice.
Ownership   Every group names its single writer; of a flow that moves, the former home until it
            names an heir, then the heir (dataplane/rehome.py). Two exceptions, both "last writer
            wins":
              flow.tx_queue   every worker that gets a packet of the flow from the guest writes its
                              queue; a stale value costs one hand-off and is corrected by the next
                              packet;
              seen.*          every worker (flows/sighting.py): a word is one aligned store, IPv6
                              addresses are guarded by seen.lock.
Words       tx = guest -> host, rx = host -> guest, home = the worker that owns a flow's socket.
"""

from __future__ import annotations

import zlib

from shm.layout import Struct, parse
from shm.record import Record

PAIRS_MAX = 32
RINGS_MAX = 2 * PAIRS_MAX
WORKERS_MAX = 32
FLOWS_MAX = 1 << 17
BUCKET_SLOTS = 16
BUCKETS = FLOWS_MAX // BUCKET_SLOTS
HANDOFF_BYTES = 1 << 20
MEMORY_SLOTS_MAX = 509
QUEUE_SIZE_MAX = 1 << 15
MTU_MAX = 65520
PAGE = 4096

# Why a packet was not carried. The order is the order of the words in queue.drops; the text is the
# help of vhostmq_drops_total. Guest and network input end here; our own bugs never do.
DROPS = (
    ("chain_loop", "descriptor chain longer than the queue (virtio 2.7.5.2)"),
    ("bad_index", "descriptor index outside the queue"),
    ("bad_address", "buffer outside the guest's memory"),
    ("bad_indirect", "indirect table of wrong length, nested, or chained on"),
    ("bad_direction", "device-writable buffer in a tx chain or device-readable in an rx chain"),
    ("no_header", "chain without room for the virtio-net header and an Ethernet header"),
    ("oversize", "frame longer than 65535 bytes plus headers"),
    ("bad_avail", "index beyond the queue, or a packed chain without end: the ring is stopped"),
    ("disabled", "frame taken from a disabled tx ring and discarded"),
    ("rx_full", "no receive buffer for a frame that cannot wait in a socket"),
    ("rx_small", "receive buffer too small for the frame, or all that a ring has"),
    ("handoff_full", "hand-off ring to the other worker is full"),
    ("ethertype", "neither IPv4, IPv6 nor ARP"),
    ("bad_ip", "IP header that contradicts itself, bad header checksum, or bad source address"),
    ("fragment", "IP fragment (not reassembled)"),
    ("ip_protocol", "IP protocol that is not carried"),
    ("bad_l4", "TCP, UDP or ICMP header that contradicts itself"),
    ("bad_offload", "virtio-net header with an offload that was not negotiated or makes no sense"),
    ("not_unicast", "destination that is not a unicast address"),
    ("policy", "protocol or address switched off by the operator"),
    ("no_flow", "TCP segment for no known connection: answered with RST"),
    ("table_full", "no room in the flow table"),
    ("table_busy", "another worker was adding a flow to the same bucket"),
    ("no_socket", "the host gave no socket (descriptors, memory, permissions)"),
    ("socket_full", "datagram the host's socket buffer did not take"),
    ("send_failed", "datagram the host refused"),
    ("tcp_gap", "TCP segment beyond the next expected byte that could not be held"),
    ("tcp_window", "TCP payload the host's socket did not take and that could not be held"),
    ("tcp_stale", "TCP segment outside any window"),
    ("slow_full", "more ARP, DHCP, DHCPv6 or NDP frames in one breath than are served"),
    ("slow_ignored", "slow-path frame with no answer"),
    ("icmp_type", "ICMP message that is not an echo request"),
    ("no_guest", "datagram from the host that has no address in the guest's network, or no guest"),
    ("no_queue", "no receive queue is enabled"),
)
DROP = {name: index for index, (name, _) in enumerate(DROPS)}
DROP_WORDS = 64
assert len(DROPS) <= DROP_WORDS

PROTOCOLS = ("tcp", "udp", "icmp")
STATES = ("free", "connecting", "syn_sent", "open", "closing", "oneway", "stream")

INSTANCE = parse("""
struct instance: what control decided, read by every worker
  writer control:
    u64 magic                identifies a segment of this schema
    u64[2] secret            key of the flow hash, random per instance
    u32 pairs                queue pairs offered
    u32 workers              worker processes
    u64 rx_enabled           bit p: rx ring of pair p is started and enabled; frames may go there
    u8[32] pair_worker       the worker that serves pair p
    u32 rests                times control has stopped looking after idle workers (control/watch.py)
    u32 poll_us              how long a worker that has run out of work looks before it sleeps
    u64 epoch_ns             CLOCK_MONOTONIC when the instance started
    u32 restarts             times control died and another took its place (control/guard.py)
""")

NET = parse("""
struct net: addresses as packets carry them; IPv4 as ::ffff:a.b.c.d; all zero means none
  writer control:
    u8[8] our_mac            link-layer address of everything the guest sees (6 bytes, 2 unused)
    u8[16] guest4            address the guest is given
    u8[16] guest6            global address the guest is given
    u8[16] our4              source of traffic from host addresses the guest must not see
    u8[16] our6              the same for global IPv6
    u8[16] our6_local        the same for link-local IPv6
    u8[16] loopback4         guest -> this address means the host's 127.0.0.1
    u8[16] loopback6         guest -> this address means the host's ::1
    u8[16] map_guest4        guest -> this address means the host's own guest4
    u8[16] map_guest6        guest -> this address means the host's own guest6
    u8[16] dns_forward4      guest -> this address, port 53 or 853, means dns_host4
    u8[16] dns_forward6      the same for IPv6
    u8[16] dns_host4         the resolver dns_forward4 stands for
    u8[16] dns_host6         the resolver dns_forward6 stands for
    u32 scope_id             interface index for link-local destinations on the host
    u32 no_tcp               1: TCP from the guest is dropped
    u32 no_udp               1: UDP likewise
    u32 no_icmp              1: ICMP likewise
    u32 no_ipv4              1: IPv4 likewise
    u32 no_ipv6              1: IPv6 likewise
    u32 mtu                  MTU the guest is told, bytes
    u32 udp_oneway_s         a UDP flow without an answer is forgotten after this
    u32 udp_stream_s         a UDP flow with traffic both ways is forgotten after this
    u32 peek_offset          1: SO_PEEK_OFF works for TCP here
""")

SEEN = parse("""
struct seen: what the guest was last seen using
  writer last:
    u64 mac                  6 bytes, most significant first; 0 none
    u64 addr4                IPv4 address; 0 none
    u32 lock                 of the IPv6 addresses: low byte who writes one + 1, then the version
    u8[16] addr6             global IPv6 address
    u8[16] addr6_local       link-local IPv6 address
""")

WORKER = parse("""
struct worker: one worker process
  writer worker:
    u64 breaths              steps taken
    u64[3] opened            flows opened, by protocol
    u64[24] flows            flows now, by protocol * 8 + state
    u64 handoff_frames       frames given to another worker
    u64 handoff_bytes        bytes copied to do so
    u64 slow_frames          frames handled in plain Python
    u64 retransmits          times TCP data was sent to the guest again
    u64 held_bytes           TCP payload copied because it came too soon for its socket
    u64 resets               connections ended by RST from our side
    u64 accept_failed        connections from the host that could not be taken
    u64 rehomed_flows        flows taken over from another worker
    u64 moves_damped         times a flow stayed: it had moved only just and carried little since
    u64 inherited_flows      flows taken over from a worker that died
    u32 keeper               process that holds the descriptors of its flows (dataplane/keeper.py)
    u32 parting              flow whose socket is being sent to another worker + 1, 0 none
    i32 parting_fd           that socket, -1: it is gone
  writer worker (waiting):
    u32 sleeping             1 while the worker waits: a producer must wake it
    u32 stalled              1 while it waits for room in a hand-off ring: a consumer must wake it
  writer control:
    u32 pid                  process id, 0 while none runs
    u32 restarts             times this worker was started again
""")

QUEUE = parse("""
struct queue: counters of one ring (index 2p: rx of pair p, 2p+1: tx)
  writer worker:
    u64 packets              frames carried
    u64 bytes                their bytes, Ethernet header included
    u64 kicks                notifications from the guest
    u64 calls                notifications to the guest
    u64 calls_suppressed     notifications the guest did not want
    u64 errors               times the ring was found broken and stopped
    u32 used_cursor          packed: up to where chains have been returned (virtq_packed.py)
    u32 used_next            packed: the same, while some are being returned
    u64[64] drops            frames dropped, by reason (DROPS)
""")

FLOW = parse("""
struct flow: one TCP connection, UDP conversation or ICMP echo series
  writer home:
    u32 version              odd while the entry is being claimed
    u32 tag                  the word in the tag table, part of the hash
    u8[16] guest_addr        the guest's address
    u8[16] far_addr          the other end as the guest sees it
    u16 guest_port           the guest's port; ICMP: the echo identifier
    u16 far_port             the other end's port; ICMP: 0
    u8 protocol              index in PROTOCOLS
    u8 state                 index in STATES
    u8 home                  the worker that owns the socket
    u8 line                  which line it stands in (dataplane/lifecycle.py), 0 none
    u16 tx_queue             queue pair the guest last sent on (last writer wins)
    u16 rx_queue             TCP: queue pair of the payload in flight
    u32 strayed_ms           TCP: since when that is another than tx_queue, 0 it is not
    u32 isn_from_guest       TCP: initial sequence number of the guest
    u32 isn_to_guest         TCP: ours
    u16 generation           grows each time the entry is used again
    u16 stay_ms              how long it stays at its home before it moves again
    u32 flags                dataplane/lifecycle.py
    i32 fd                   socket in the home worker, -1 none
    u32 born_ms              when it was opened
    u64 deadline_ms          next time the flow must be looked at, 0 none
    u32 last_guest_ms        last packet from the guest
    u32 last_far_ms          last data from the other end
    u64 tx_bytes             payload from the guest
    u64 rx_bytes             payload to the guest
    u32 seq_to_guest         next sequence number to send
    u32 seq_acked            first byte the guest has not acknowledged
    u32 seq_from_guest       next byte expected from the guest
    u32 window_edge          right edge last advertised to the guest
    u32 window               window the guest advertises, bytes
    u32 seq_max              highest seq_to_guest ever reached
    u16 mss                  largest segment the guest takes
    u8 guest_scale           window scale of the guest
    u8 our_scale             window scale we use
    u8 retries               retransmissions without progress
    u8 dup_acks              duplicate acknowledgements in a row
    u8 hops                  TTL or hop limit last set on the socket
    u32 line_next            next flow in that line, all bits set: none
    u32 line_before          flow before it, the same
    u32 undiscarded          acknowledged by the guest but still in the host's socket
    u32 sndbuf               size of the host's send buffer when last asked
    u32 sndbuf_free          room in it then
    u8 held                  the home worker's buffer of payload that waits + 1, 0 none
    u8 gather                the home worker's gather it was in last (dataplane/tcp_gather.py)
    u8 heir                  worker its socket is on the way to + 1, 0 none
    u8 former                worker whose frames for the guest come first + 1, 0 none
    u32 away_ms              since when the guest sends on a pair of another worker, 0 it does not
    u32 moved_ms             when it came to its home, 0 it began there
    u32 former_head          the former's hand-off cursor then
    u32 moves                how often it has moved
    u32 moved_bytes          payload it had carried when it came, both ways, modulo 2^32
""")

HANDOFF = parse("""
struct handoff: cursors of one single-producer ring of frames; HANDOFF_BYTES of data follow
  writer producer:
    u64 head                 bytes ever written
  writer consumer:
    u64 tail                 bytes ever consumed
""")

STRUCTS: tuple[Struct, ...] = (INSTANCE, NET, SEEN, WORKER, QUEUE, FLOW, HANDOFF)

_PAGE_TEXT = repr((STRUCTS, DROPS, FLOWS_MAX, HANDOFF_BYTES)).encode()
MAGIC = zlib.crc32(_PAGE_TEXT) << 24 | zlib.adler32(_PAGE_TEXT) & 0xFFFFFF | 1 << 60
"""Digest of this page: a reader with another schema must not touch the segment."""


class Offsets(Record):
    """Where each part of a segment for `workers` workers begins, in bytes."""

    workers: int
    instance: int
    net: int
    seen: int
    worker: int
    queue: int
    locks: int
    tags: int
    flow: int
    handoff: int
    size: int


HANDOFF_STRIDE = HANDOFF.size + HANDOFF_BYTES


def offsets(workers: int) -> Offsets:
    """The map of a segment. Each part starts on a page, so that parts are cheap to leave
    untouched."""
    at = 0
    starts = []
    for size in (
        INSTANCE.size,
        NET.size,
        SEEN.size,
        WORKER.size * WORKERS_MAX,
        QUEUE.size * RINGS_MAX,
        4 * BUCKETS,
        4 * FLOWS_MAX,
        FLOW.size * FLOWS_MAX,
        2 * HANDOFF_STRIDE * workers * workers,
    ):
        starts.append(at)
        at += (size + PAGE - 1) // PAGE * PAGE
    return Offsets(workers, *starts, at)  # type: ignore[call-arg]
