"""The driver side of virtqueues against the device side, over plain memory, frame by frame: see
guestring.py for what stands in for TAP and device.
"""

from __future__ import annotations

import ctypes
import os
import random
import select
import signal
import struct
from collections import deque
from typing import Any

import packets as pk
import pytest
from guestring import (
    FRAME_MAX,
    HEADER,
    NUM,
    TERMS,
    Device,
    PackedDevice,
    Rig,
    frame,
    rig_with,
    signalled,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dataplane import move
from dataplane.guest_memory import RX_BUFFER_BYTES, plan
from shm import mem
from shm.jit import COMPILED

SIZES = st.one_of(st.integers(14, 100), st.integers(1400, 1600), st.integers(14, FRAME_MAX))
BASES = st.one_of(st.just(0), st.integers(0xFFFF - 2 * NUM, 0xFFFF), st.integers(0, 0xFFFF))


class Frames(RuleBasedStateMachine):
    """Every frame arrives once, whole and in order, both ways, and no notification is lost."""

    packed = reference = False

    @initialize(
        base=BASES,
        mergeable=st.booleans(),
        indirect=st.booleans(),
        event_idx=st.booleans(),
        in_order=st.booleans(),
    )
    def start(self, base: int, **terms: bool) -> None:
        self.rig = Rig(base, reference=self.reference, packed=self.packed, **terms)
        self.sent: deque[bytes] = deque()
        self.received: deque[bytes] = deque()
        self.number = 0
        self.step()

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.close()

    def next_frame(self, size: int) -> bytes:
        self.number += 1
        return frame(self.number, size)

    @rule(sizes=st.lists(SIZES, max_size=2 * NUM))
    def guest_sends(self, sizes: list[int]) -> None:
        for size in sizes:
            data = self.next_frame(size)
            try:
                self.rig.tap.send(data)
            except BlockingIOError:
                break
            self.sent.append(data)

    @rule()
    def step(self) -> None:
        assert self.rig.mover.step(0) == 0

    @rule(count=st.integers(1, NUM))
    def device_takes(self, count: int) -> None:
        """In the order of the ring, each of them the next frame the guest sent."""
        tx = self.rig.tx
        for _ in range(count):
            if not tx.awake() or not tx.pop():
                break
            data = b"".join(
                ctypes.string_at(mem.check(*piece), piece[1]) for piece in tx.held[-1][1]
            )
            assert data == self.sent.popleft()

    @rule(data=st.data())
    def device_returns(self, data: st.DataObject) -> None:
        """In any order, or in order and in batches."""
        tx = self.rig.tx
        left = data.draw(st.integers(0, len(tx.held)))
        while left:
            count = 1
            if self.rig.in_order:
                count = data.draw(st.integers(1, left))
                tx.put_batch(count, 0)
            else:
                tx.put(data.draw(st.integers(0, len(tx.held) - 1)), 0)
            left -= count
        tx.publish()

    @rule(which=st.sampled_from(["rx", "tx"]))
    def device_sleeps(self, which: str) -> None:
        device = getattr(self.rig, which)
        if device.awake():
            device.sleep()

    @rule(sizes=st.lists(SIZES, min_size=1, max_size=4))
    def device_sends(self, sizes: list[int]) -> None:
        for size in sizes:
            data = self.next_frame(size)
            if not self.rig.rx.awake() or not self.rig.receive(data):
                break
            self.received.append(data)
        self.rig.rx.publish()

    @rule()
    def guest_reads(self) -> None:
        while (data := self.rig.read()) is not None:
            wanted = self.received.popleft()
            assert (data[:10], data[HEADER:]) == (wanted[:10], wanted[HEADER:])

    @precondition(lambda self: hasattr(self, "rig"))
    @invariant()
    def no_kick_is_lost(self) -> None:
        for device in (self.rig.rx, self.rig.tx):
            if device.asleep and device.waiting():
                assert signalled(device.kick), "buffers were offered to a sleeping device"

    @precondition(lambda self: hasattr(self, "rig"))
    @invariant()
    def buffers_are_somewhere(self) -> None:
        rx, tx = self.rig.mover.rx, self.rig.mover.tx
        assert rx["out"] == NUM
        assert tx["out"] + tx["free_count"] == NUM
        assert rx["dropped"] == tx["dropped"] == 0


class PackedFrames(Frames):
    """The same with packed rings."""

    packed = True


class ReferenceFrames(PackedFrames):
    """And without the product's device."""

    reference = True


for machine in (Frames, PackedFrames, ReferenceFrames):
    machine.TestCase.settings = settings(
        deadline=None, max_examples=60 if COMPILED else 25, stateful_step_count=40
    )
test_frames = Frames.TestCase
test_packed_frames = PackedFrames.TestCase
test_reference_frames = ReferenceFrames.TestCase


FORMATS = {
    "split": {},
    "split-in-order": {"in_order": True},
    "packed": {"packed": True},
    "packed-in-order": {"packed": True, "in_order": True},
    "reference": {"packed": True, "reference": True},
    "reference-in-order": {"packed": True, "reference": True, "in_order": True},
}


@pytest.fixture(params=FORMATS)
def make_rig(request: pytest.FixtureRequest) -> Any:
    """A rig of every kind of ring in turn, with every feature unless told otherwise."""
    made: list[Rig] = []

    def make(base: int = 0, num: int = NUM, **terms: bool) -> Rig:
        terms = {**TERMS, **FORMATS[request.param], **terms}
        made.append(Rig(base, num, **terms))
        made[-1].mover.step(0)
        return made[-1]

    yield make
    for rig in made:
        rig.close()


# ---- kicks and calls -----------------------------------------------------------------------------


@pytest.mark.parametrize("event_idx", [True, False])
def test_one_kick_for_a_burst(make_rig: Any, event_idx: bool) -> None:
    """The device asked once; while it is awake it is left alone."""
    rig = make_rig(event_idx=event_idx)
    rig.tx.sleep()
    for number in range(move.KICK_FRAMES - 1):
        rig.tap.send(frame(number, 60))
    rig.mover.step(0)
    assert rig.mover.tx["kicks"] == 1
    assert rig.tx.awake()
    rig.tap.send(frame(100, 60))
    rig.mover.step(0)
    assert rig.mover.tx["kicks"] == 1 and not signalled(rig.tx.kick)


@pytest.mark.parametrize("event_idx", [True, False])
def test_a_device_short_of_buffers_is_kicked(make_rig: Any, event_idx: bool) -> None:
    """Once for a burst, even if few buffers come back: it may need just these."""
    rig = make_rig(event_idx=event_idx)
    while rig.rx.pop():
        pass
    rig.rx.sleep()
    assert rig.rx.asleep
    kicks = rig.mover.rx["kicks"]
    for number in range(3):
        assert rig.receive(frame(number, 60))
    rig.rx.publish()
    rig.mover.step(0)
    assert rig.mover.rx["kicks"] == kicks + 1 and signalled(rig.rx.kick)


@pytest.mark.parametrize("event_idx", [True, False])
def test_no_calls_while_frames_move(make_rig: Any, event_idx: bool) -> None:
    rig = make_rig(event_idx=event_idx)
    for number in range(40):
        rig.tap.send(frame(number, 60))
        rig.mover.step(0)
        while rig.tx.pop():
            rig.tx.put(0, 0)
        rig.tx.publish()
        assert rig.receive(frame(1000 + number, 60))
        rig.rx.publish()
        rig.mover.step(0)
        assert rig.read() is not None
    assert not signalled(rig.events[1]) and not signalled(rig.events[3])


def test_transmit_buffers_exhausted(make_rig: Any) -> None:
    """Frames wait in the TAP; the mover does not spin, and goes on when buffers come back."""
    rig = make_rig()
    for number in range(NUM + 3):
        rig.tap.send(frame(number, 60))
    view = rig.mover.view
    rig.mover.step(0)
    assert rig.mover.tx["out"] == NUM and view["busy"] == 1
    rig.mover.step(0)
    assert (view["busy"], view["blocked"], view["tap_ready"]) == (0, 1, 1)
    while rig.tx.pop():
        pass
    rig.tx.put(0, 0)
    rig.tx.publish()
    rig.mover.step(0)
    assert rig.mover.tx["frames"] == NUM + 1
    while rig.tx.held:
        rig.tx.put(0, 0)
    rig.tx.publish()
    rig.mover.step(0)
    assert rig.mover.tx["frames"] == NUM + 3
    assert (view["busy"], view["blocked"], view["tap_ready"]) == (1, 0, 0)


@pytest.mark.parametrize("event_idx", [True, False])
@pytest.mark.parametrize("num", [2, NUM])
@pytest.mark.parametrize("echo", [True, False])
def test_a_mover_that_sleeps_is_woken(make_rig: Any, event_idx: bool, num: int, echo: bool) -> None:
    """A mover in a process of its own, a device that waits for kicks as a real one does: bursts
    with pauses, an echo of each frame or none. One lost notification stops it for good."""
    rig = make_rig(event_idx=event_idx, num=num)
    chance = random.Random(num)
    rig.tap.setblocking(True)
    rig.tap.settimeout(5)
    mover = os.fork()
    if mover == 0:
        try:
            while rig.mover.step(-1) == 0:
                pass
        finally:
            os._exit(1)
    try:
        for burst in range(300 if COMPILED else 60):
            size = chance.choice([1, 1, 2, 3 * num])
            pending = deque(range(size))
            for number in pending:
                rig.tap.send(frame(number, 60))
            while pending:
                wait_for_chain(rig.tx)
                (_, iov) = rig.tx.held[0]
                data = b"".join(ctypes.string_at(*piece) for piece in iov)
                assert data == frame(pending.popleft(), 60), f"burst {burst}"
                rig.tx.put(0, 0)
                rig.tx.publish()
                while echo and not rig.receive(data):
                    wait_for_chain(rig.rx)
                rig.rx.publish()
                if echo:
                    assert rig.tap.recv(100)[HEADER:] == data[HEADER:], f"burst {burst}"
            if chance.random() < 0.5:
                select.select([], [], [], chance.random() / 500)
    finally:
        os.kill(mover, signal.SIGKILL)
        os.waitpid(mover, 0)


def wait_for_chain(device: Device | PackedDevice) -> None:
    """Until a chain can be taken, waiting for the kick that was asked for."""
    while not device.pop():
        device.sleep()
        if device.asleep:
            assert select.select([device.kick], [], [], 5)[0], "no kick within 5 s"
            assert device.awake()


@pytest.mark.parametrize("packed", [False, True])
def test_batch_larger_than_a_step(packed: bool) -> None:
    """In order: what a step leaves of a batch comes with the next one. All buffers but the last
    count as full."""
    count, last = move.FRAMES_MAX + 20, 80
    with rig_with(num=128, packed=packed, in_order=True) as rig:
        for number in range(count):
            assert rig.rx.pop()
            at = rig.rx.held[-1][1][0][0]
            data = bytes(10) + b"\1\0" + frame(number, RX_BUFFER_BYTES - HEADER)[HEADER:]
            ctypes.memmove(at, data, len(data))
        rig.rx.put_batch(count, last)
        rig.rx.publish()
        for frames in (move.FRAMES_MAX, count, count):
            assert rig.mover.step(0) == 0 and rig.mover.rx["frames"] == frames
        for number in range(count):
            size = last if number == count - 1 else RX_BUFFER_BYTES
            data = rig.read()
            assert data is not None and data[HEADER:] == frame(number, size - HEADER)[HEADER:]


# ---- headers -------------------------------------------------------------------------------------


def test_guest_flags_are_masked(make_rig: Any) -> None:
    """Drivers send no flag but NEEDS_CSUM (virtio 1.3, 5.1.6.2); a TAP may set DATA_VALID."""
    rig = make_rig(indirect=False)
    for flags, wanted in ((0, 0), (1, 1), (2, 0), (3, 1)):
        rig.tap.send(bytes([flags]) + frame(flags, 60)[1:])
        rig.mover.step(0)
        assert rig.tx.pop()
        ((at, _),) = rig.tx.held[-1][1]
        assert ctypes.string_at(at, 1) == bytes([wanted])


ADDRESSES = {4: ("192.0.2.1", "198.51.100.9"), 6: ("2001:db8::1", "fe80::2:3")}
MACS = (pk.mac("02:00:00:00:00:01"), pk.mac("02:00:00:00:00:02"))


@given(
    family=st.sampled_from([4, 6]),
    protocol=st.sampled_from([pk.TCP, pk.UDP]),
    payload=st.binary(max_size=1400),
    garbage=st.binary(min_size=2, max_size=2),
)
def test_data_valid_becomes_needs_csum(
    family: int, protocol: int, payload: bytes, garbage: bytes
) -> None:
    """Whatever the field held, completing the checksum as the header says gives the right one."""
    src, dst = map(pk.ip, ADDRESSES[family])
    if protocol == pk.TCP:
        body = pk.tcp(src, dst, 1, 2, seq=7, ack=9, payload=payload)
    else:
        body = pk.udp(src, dst, 1, 2, payload)
    good = pk.ip_frame(MACS, pk.ip_packet(src, dst, protocol, body))
    start = 14 + (20 if family == 4 else 40)
    at = start + (16 if protocol == pk.TCP else 6)
    bad = bytearray(good)
    bad[at : at + 2] = garbage
    data = deliver(b"\2" + bytes(11) + bytes(bad))
    flags, gso, _, _, csum_start, csum_offset, _ = pk.VNET_HDR.unpack(data[:HEADER])
    assert (flags, gso, csum_start, csum_offset) == (1, 0, start, at - start)
    done = bytearray(data[HEADER:])
    total = pk.checksum(bytes(done[start : start + len(body)]))
    if protocol == pk.UDP and total == 0:
        total = 0xFFFF
    done[at : at + 2] = struct.pack(">H", total)
    assert bytes(done) == good


def fragment() -> bytes:
    src, dst = map(pk.ip, ADDRESSES[4])
    packet = bytearray(pk.ip_packet(src, dst, pk.UDP, pk.udp(src, dst, 1, 2, bytes(100))))
    packet[6] = 0x20  # more fragments
    return pk.ip_frame(MACS, bytes(packet))


def echo() -> bytes:
    src, dst = map(pk.ip, ADDRESSES[4])
    return pk.ip_frame(MACS, pk.ip_packet(src, dst, pk.ICMP, pk.icmp(8, 0, bytes(60))))


@pytest.mark.parametrize(
    "data",
    [
        fragment(),
        echo(),
        pk.ether(*MACS, pk.ARP, bytes(46)),
        pk.ether(*MACS, 0x0800, b"\x45" + bytes(8) + b"\x06" + bytes(14)),  # cut before the field
        pk.ether(*MACS, 0x0800, b"\x4f" + bytes(8) + b"\x06" + bytes(36)),  # options to the end
        pk.ether(*MACS, 0x86DD, b"\x60" + bytes(5) + b"\x06" + bytes(20)),
        pk.ether(*MACS, 0x0800, b""),
    ],
)
def test_data_valid_where_there_is_nothing_to_finish(data: bytes) -> None:
    delivered = deliver(b"\2" + bytes(11) + data)
    assert (delivered[:10], delivered[HEADER:]) == (b"\2" + bytes(9), data)


def test_offload_header_is_passed_on() -> None:
    header = pk.VNET_HDR.pack(1, 1, 54, 1448, 34, 16, 0)
    data = deliver(header + frame(1, 40000)[HEADER:])
    assert data[:10] == header[:10]


def deliver(data: bytes) -> bytes:
    """What the mover makes of a frame from the device."""
    rig = Rig(0, num=64, **TERMS)
    try:
        rig.mover.step(0)
        assert rig.receive(data)
        rig.rx.publish()
        assert rig.mover.step(0) == 0
        delivered = rig.read()
        assert delivered is not None
        return delivered
    finally:
        rig.close()


# ---- memory --------------------------------------------------------------------------------------


@given(
    pairs=st.integers(1, 32),
    num=st.sampled_from([2, 16, 256, 1024]),
    mergeable=st.booleans(),
    indirect=st.booleans(),
)
def test_parts_do_not_overlap(pairs: int, num: int, mergeable: bool, indirect: bool) -> None:
    """And are aligned as virtio 1.3, 2.7 and 2.8 want them."""
    made = plan(pairs, num, mergeable, indirect)
    parts = []
    for number, ring in enumerate(ring for pair in made.pairs for ring in pair):
        assert ring.desc % 16 == 0 and ring.avail % 4 == 0 and ring.used % 4 == 0
        assert bool(ring.tables) == (indirect and number % 2 == 1)
        parts += [(ring.desc, 16 * num), (ring.avail, 6 + 2 * num), (ring.used, 6 + 8 * num)]
        parts += [(ring.tables, 32 * num)] if ring.tables else []
        parts.append((ring.buffers, ring.stride * num))
    parts.sort()
    for (at, size), (following, _) in zip(parts, parts[1:], strict=False):
        assert at + size <= following
    assert parts[-1][0] + parts[-1][1] <= made.size
