"""session.py - one vhost-user connection without its socket: a message in, effects out.

Theory      `receive(message, fds)` changes `device` at once and returns what the world must do
            about it, in order. The server executes the effects, tells back what only it can know
            (`ring_stopped`, `effect_failed`) and never reads a message itself. No socket, no
            worker, no clock: a conversation can be written down and tested as one.

            VMM ──message, fds──▶ receive ──▶ [RingStop, MemoryChanged, RingChanged, Ack] ──▶ server

Rings       A ring starts when everything it needs is there, in any order (device.waiting); in
            practice that is SET_VRING_KICK, since an initial kick is not guaranteed after a
            reconnect. It stops
              - on GET_VRING_BASE, for the reply of which the worker says where it stopped;
              - when guest memory leaves from under it; it goes on, from where it stopped, when
                that comes back;
              - on SET_VRING_BASE, or a new SET_VRING_NUM, while it runs. Only a front-end that
                resets its device without GET_VRING_BASE (UML) does that. The addresses we hold are
                stale then, so the ring waits for the next SET_VRING_KICK.
            A ring that cannot run (RingRefused) is the guest driver's doing as often as the VMM's:
            it stays stopped, the session goes on, and the next driver may do better.
Refusals    A message that cannot be honoured changes nothing. It is answered where an answer can
            be sent (Nack); if none can, the front-end would go on in a false belief, so the
            session closes with that one reason.
Acks        Under REPLY_ACK a request with NEED_REPLY and no reply of its own gets u64 0 or 1.
            SET_PROTOCOL_FEATURES that brings REPLY_ACK is answered already (UML waits for it).
Queues      GET_QUEUE_NUM means queue pairs to QEMU and DPDK and rings to Cloud Hypervisor
            (rust-vmm). The latter sets NEED_REPLY on every message once it has taken REPLY_ACK,
            which it does before it asks; the former never set it on a request with a reply of its
            own. So NEED_REPLY tells who asks.
Ownership   Every descriptor handed to `receive` is kept in `device` or closed before it returns,
            refused messages included. A descriptor named by `device` lives until the next
            `receive`, `hangup` or `effect_failed`.
Limits      An Offer bounds rings and memory slots; vhost_user.py bounds messages and MTU. What a
            front-end can make us log is one line a message, and one for each of its rings.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from control import vhost_user as vu
from control.device import CloseFd, Device, Fstat
from control.effects import (
    Ack,
    Announce,
    BackendChannel,
    Close,
    Effect,
    Log,
    MemoryChanged,
    MtuChanged,
    Nack,
    Reply,
    ReplyVringBase,
    RingChanged,
    RingRefused,
    RingStop,
)
from control.vhost_user import Message, ProtocolFeature, Refused, Request, VirtioFeature
from shm.record import Record


class Offer(Record):
    """What this back-end promises every front-end. It must be the same on each connection: a
    front-end that comes back insists on the features it had, and memory slots must not shrink."""

    features: int
    queue_pairs: int = 1
    protocol_features: int = vu.SERVED_PROTOCOL_FEATURES
    mem_slots: int = 509

    def __post_init__(self) -> None:
        if not 1 <= self.queue_pairs <= vu.QUEUE_PAIRS_MAX:
            raise ValueError(
                f"{self.queue_pairs} queue pairs: 1 to {vu.QUEUE_PAIRS_MAX} are possible"
            )
        if self.protocol_features & ~vu.SERVED_PROTOCOL_FEATURES:
            raise ValueError("a protocol feature that is not served")
        if self.features & VirtioFeature.LOG_ALL or not self.features & VirtioFeature.VERSION_1:
            raise ValueError("VERSION_1 must be offered, LOG_ALL must not")

    @property
    def virtio(self) -> int:
        """The answer to GET_FEATURES: consistent, and without MQ when there is one queue pair
        only."""
        features = vu.consistent(self.features) | VirtioFeature.PROTOCOL_FEATURES
        return features if self.queue_pairs > 1 else features & ~VirtioFeature.NET_MQ

    @property
    def protocol(self) -> int:
        """The answer to GET_PROTOCOL_FEATURES. Without MQ Cloud Hypervisor assumes two rings and
        QEMU one pair."""
        bits = int(self.protocol_features)
        return bits if self.queue_pairs > 1 else bits & ~ProtocolFeature.MQ


PACKED_BASE = 0x8000
_MEANT_TO_RUN = (
    Request.SET_FEATURES,
    Request.SET_VRING_ADDR,
    Request.SET_VRING_KICK,
)


class Session:
    """The back-end's end of one connection. `close` and `fstat` are the system calls, replaceable
    for tests."""

    def __init__(self, offer: Offer, close: CloseFd = os.close, fstat: Fstat = os.fstat) -> None:
        self.offer = offer
        self.device = Device(2 * offer.queue_pairs, offer.mem_slots, close, fstat)
        self.closed = False
        self._close_fd = close
        self._need_reply = False
        self._stopping: set[int] = set()  # stopped rings whose base a worker may still tell
        self._zero: set[int] = set()  # rings that were stopped at 0

    # What the server calls

    def receive(self, message: Message, fds: list[int]) -> list[Effect]:
        """One message with its descriptors, which are no longer the caller's. Never raises for
        what a peer sent."""
        pending = list(fds)
        try:
            if self.closed:
                return []
            if problem := message.header.problem():
                return self._end(problem)
            self._need_reply = message.header.need_reply
            effects = self._serve(message, pending)
            if self._acks(message.header.request):
                effects.append(self._verdict(message.header.request, effects))
            return effects
        except Refused as refusal:
            return self._refuse(message.header.request, str(refusal))
        finally:
            for fd in pending:
                self._close_fd(fd)

    def hangup(self) -> list[Effect]:
        """The front-end is gone, or shall be: let go of everything. The session is over."""
        if self.closed:
            return []
        self.closed = True
        effects: list[Effect] = [RingStop(r.index) for r in self.device.rings if r.started]
        if self.device.memory:
            effects.append(MemoryChanged())
        if self.device.backend_fd is not None:
            effects.append(BackendChannel(None))
        self._stopping.clear()
        self._zero.clear()
        self.device.release()
        return effects

    def ring_stopped(self, index: int, base: int) -> None:
        """A worker let go of a ring at `base` (as on the wire). Ignored where nobody asks: after a
        reset the base is what the front-end says."""
        if index in self._stopping:
            self._stopping.discard(index)
            self.device.change_ring(index, base=base)
            if base == 0:
                self._zero.add(index)
            else:
                self._zero.discard(index)

    def vring_base_reply(self, index: int) -> bytes:
        """The answer to GET_VRING_BASE."""
        state = vu.VringState(index, self.device.rings[index].base)
        return vu.encode_reply(Request.GET_VRING_BASE, state.encode())

    def effect_failed(self, effect: Effect, reason: str) -> list[Effect]:
        """An effect could not be executed: the state follows, and these effects come right after
        it. Memory that nobody could map is forgotten; where no ack can say so, the session
        closes."""
        if self.closed:
            return []
        match effect:
            case MemoryChanged():
                if not self._acks(0):
                    return self._end(f"guest memory: {reason}")
                unmap = [MemoryChanged()] if self.device.memory else []
                self.device.drop_memory()
                return [Log("error", f"guest memory: {reason}"), *self._settle_all(), *unmap]
            case RingChanged(index):
                # Its worker may still have what it was given before.
                self._stopping.add(index)
                self.device.change_ring(index, started=False, problem=reason)
                return [RingStop(index), RingRefused(index, reason)]
        return [Log("error", f"{type(effect).__name__}: {reason}")]

    # Answers

    def _acks(self, request: int) -> bool:
        agreed = self.device.protocol_features & ProtocolFeature.REPLY_ACK
        return bool(agreed) and self._need_reply and request not in vu.OWN_REPLY

    def _verdict(self, request: int, effects: list[Effect]) -> Ack:
        # Only what sets a ring up fails with it. Memory that makes a ring stop is good memory all
        # the same, and QEMU aborts when SET_VRING_ENABLE fails.
        refused = any(isinstance(effect, RingRefused) for effect in effects)
        return Ack(request, ok=not (refused and request in _MEANT_TO_RUN))

    def _refuse(self, request: int, why: str) -> list[Effect]:
        reason = f"{vu.request_name(request)}: {why}"
        if request in vu.ERROR_REPLIES:
            return [Nack(request, reason, vu.encode_reply(request, vu.ERROR_REPLIES[request]))]
        if self._acks(request):
            return [Nack(request, reason, vu.encode_ack(request, ok=False))]
        return self._end(reason)

    def _end(self, reason: str) -> list[Effect]:
        return [*self.hangup(), Close(reason)]

    def _serve(self, message: Message, fds: list[int]) -> list[Effect]:
        request = message.header.request
        rule = vu.RULES.get(request)
        if rule is None:
            raise Refused("not served")
        if rule.needs & ~self.offer.protocol:
            missing = vu.feature_names(rule.needs, ProtocolFeature)
            raise Refused(f"protocol feature {missing} is not offered")
        if len(message.payload) != message.header.size:
            raise Refused(f"{len(message.payload)} of {message.header.size} payload bytes")
        body = rule.decode(message.payload)
        least, most = rule.fds
        if not least <= len(fds) <= most:
            raise Refused(f"{len(fds)} descriptors with it")
        return _HANDLERS[request](self, body, fds)

    # Features and other questions about the device as a whole. A handler that keeps a descriptor
    # takes it out of the list it is given.

    def _u64(self, request: int, value: int) -> list[Effect]:
        return [Reply(vu.encode_reply(request, vu.encode_u64(value)))]

    def _get_features(self, _body: None, _fds: list[int]) -> list[Effect]:
        return self._u64(Request.GET_FEATURES, self.offer.virtio)

    def _set_features(self, bits: int, _fds: list[int]) -> list[Effect]:
        if surplus := bits & ~self.offer.virtio:
            raise Refused(f"features that were not offered: {vu.feature_names(surplus)}")
        device = self.device
        usable = vu.consistent(bits)
        changed = usable != device.features or not device.features_known
        effects: list[Effect] = []
        if changed and usable != bits:
            text = (
                f"ignoring guest features without what they need: {vu.feature_names(bits ^ usable)}"
            )
            effects.append(Log("warning", text))
        device.features, device.features_known = usable, True
        for ring in device.rings:
            # Without PROTOCOL_FEATURES there is no SET_VRING_ENABLE: all rings count as enabled at
            # once.
            enable = not bits & VirtioFeature.PROTOCOL_FEATURES and not ring.enabled
            if enable:
                device.change_ring(ring.index, enabled=True)
            effects += self._settle(ring.index, changed or enable)
        return effects

    def _get_protocol_features(self, _body: None, _fds: list[int]) -> list[Effect]:
        return self._u64(Request.GET_PROTOCOL_FEATURES, self.offer.protocol)

    def _set_protocol_features(self, bits: int, _fds: list[int]) -> list[Effect]:
        if surplus := bits & ~self.offer.protocol:
            names = vu.feature_names(surplus, ProtocolFeature)
            raise Refused(f"protocol features that were not offered: {names}")
        self.device.protocol_features = bits
        return []

    def _get_queue_num(self, _body: None, _fds: list[int]) -> list[Effect]:
        pairs = self.offer.queue_pairs
        return self._u64(Request.GET_QUEUE_NUM, 2 * pairs if self._need_reply else pairs)

    def _set_owner(self, _body: None, _fds: list[int]) -> list[Effect]:
        return []

    def _reset_owner(self, _body: None, _fds: list[int]) -> list[Effect]:
        effects: list[Effect] = []
        for index in range(len(self.device.rings)):
            effects += self._change(index, enabled=False)
        return effects

    def _reset_device(self, _body: None, _fds: list[int]) -> list[Effect]:
        """Rings, features and status are as at the start; memory and protocol features stay, and
        so does the error descriptor, which QEMU sends once in its life."""
        device = self.device
        effects: list[Effect] = [RingStop(ring.index) for ring in device.rings if ring.started]
        self._forget_rings(num=0, base=0, enabled=False)
        self._zero.clear()
        device.features, device.features_known, device.status = 0, False, 0
        return effects

    def _set_status(self, status: int, _fds: list[int]) -> list[Effect]:
        # Only noted. QEMU says 0 between the GET_VRING_BASE of two queue pairs: rings still to be
        # asked must keep what they have.
        if status > 0xFF:
            raise Refused(f"status {status:#x} is beyond 8 bits")
        self.device.status = status
        return []

    def _get_status(self, _body: None, _fds: list[int]) -> list[Effect]:
        return self._u64(Request.GET_STATUS, self.device.status)

    def _send_rarp(self, mac: bytes, _fds: list[int]) -> list[Effect]:
        # Offered because QEMU complains otherwise. No switch has to learn where the guest is: its
        # packets leave by the host's sockets.
        return [Announce(mac)]

    def _net_set_mtu(self, mtu: int, _fds: list[int]) -> list[Effect]:
        # What the guest's device says. We carry frames of any size that virtio allows it.
        if not vu.MTU_MIN <= mtu <= vu.MTU_MAX:
            raise Refused(f"MTU {mtu} is not within {vu.MTU_MIN} to {vu.MTU_MAX}")
        return [MtuChanged(mtu)]

    def _set_backend_req_fd(self, _body: None, fds: list[int]) -> list[Effect]:
        fd = fds.pop()
        self.device.set_backend_fd(fd)
        return [BackendChannel(fd)]

    # Guest memory

    def _set_mem_table(self, regions: list[vu.MemoryRegion], fds: list[int]) -> list[Effect]:
        self.device.set_memory(regions, fds)
        return self._memory_changed()

    def _get_max_mem_slots(self, _body: None, _fds: list[int]) -> list[Effect]:
        return self._u64(Request.GET_MAX_MEM_SLOTS, self.offer.mem_slots)

    def _add_mem_reg(self, region: vu.MemoryRegion, fds: list[int]) -> list[Effect]:
        self.device.add_region(region, fds)
        return self._memory_changed()

    def _rem_mem_reg(self, region: vu.MemoryRegion, _fds: list[int]) -> list[Effect]:
        self.device.remove_region(region)
        return self._memory_changed()

    def _memory_changed(self) -> list[Effect]:
        # Rings without memory stop before it goes, rings that get it start after it came.
        effects = self._settle_all()
        before = [effect for effect in effects if not isinstance(effect, RingChanged)]
        after = [effect for effect in effects if isinstance(effect, RingChanged)]
        return [*before, MemoryChanged(), *after]

    # Rings

    def _set_vring_num(self, state: vu.VringState, _fds: list[int]) -> list[Effect]:
        self._check(state.index)
        if not 1 <= state.num <= vu.RING_SIZE_MAX:
            raise Refused(
                f"ring {state.index}: size {state.num} is not within 1 to {vu.RING_SIZE_MAX}"
            )
        same = state.num == self.device.rings[state.index].num
        halted = [] if same else self._halt(state.index)
        return halted + self._set_up(state.index, num=state.num)

    def _set_vring_base(self, state: vu.VringState, _fds: list[int]) -> list[Effect]:
        """A packed ring begins with wrap counter 1 (virtio 1.3, 2.8.1). User-Mode Linux says 0,
        which is a place one lap further on: meant only of a ring that was stopped there."""
        self._check(state.index)
        fresh = state.num == 0 and state.index not in self._zero
        base = PACKED_BASE if fresh and self.device.packed else state.num
        return self._halt(state.index) + self._set_up(state.index, base=base)

    def _set_vring_addr(self, addr: vu.VringAddr, _fds: list[int]) -> list[Effect]:
        # `log` is not looked at: without the LOG flag some send an address there, some 0, UML all
        # ones.
        self._check(addr.index)
        if addr.flags:
            raise Refused(
                f"ring {addr.index}: flags {addr.flags:#x} (dirty logging is not offered)"
            )
        return self._set_up(
            addr.index, desc_uva=addr.desc, avail_uva=addr.avail, used_uva=addr.used
        )

    def _set_vring_kick(self, ring: vu.VringFd, fds: list[int]) -> list[Effect]:
        self._check(ring.index)
        if not ring.has_fd:
            raise Refused(f"ring {ring.index}: polling without a kick descriptor is not supported")
        return self._set_up(ring.index, kick_fd=self._take(ring, fds))

    def _set_vring_call(self, ring: vu.VringFd, fds: list[int]) -> list[Effect]:
        self._check(ring.index)
        return self._change(ring.index, call_fd=self._take(ring, fds))

    def _set_vring_err(self, ring: vu.VringFd, fds: list[int]) -> list[Effect]:
        self._check(ring.index)
        return self._change(ring.index, err_fd=self._take(ring, fds))

    def _set_vring_enable(self, state: vu.VringState, _fds: list[int]) -> list[Effect]:
        self._check(state.index)
        if state.num > 1:
            raise Refused(f"ring {state.index}: enable {state.num} is neither 0 nor 1")
        return self._change(state.index, enabled=bool(state.num))

    def _get_vring_base(self, state: vu.VringState, _fds: list[int]) -> list[Effect]:
        self._check(state.index)
        effects: list[Effect] = []
        if self.device.rings[state.index].started:
            self._stopping.add(state.index)
            effects.append(RingStop(state.index))
        self._forget_ring(state.index)
        return [*effects, ReplyVringBase(state.index)]

    def _check(self, index: int) -> None:
        if index >= len(self.device.rings):
            raise Refused(f"ring {index} of {len(self.device.rings)}")

    def _take(self, ring: vu.VringFd, fds: list[int]) -> int | None:
        if len(fds) != ring.has_fd:
            told = "one announced" if ring.has_fd else "none announced"
            raise Refused(f"ring {ring.index}: {len(fds)} descriptors, {told}")
        return fds.pop() if fds else None

    def _forget_ring(self, index: int, **more: Any) -> None:
        """What a stopped ring must not be found with again."""
        nothing = dict.fromkeys(("kick_fd", "call_fd", "desc_uva", "avail_uva", "used_uva"))
        self.device.change_ring(index, **nothing, started=False, problem="", **more)

    def _forget_rings(self, **more: Any) -> None:
        for index in range(len(self.device.rings)):
            self._forget_ring(index, **more)

    def _halt(self, index: int) -> list[Effect]:
        """A front-end that sets a running ring up anew has reset it: stop until it kicks again."""
        if not self.device.rings[index].started:
            return []
        self.device.change_ring(index, started=False, kick_fd=None)
        return [RingStop(index)]

    def _set_up(self, index: int, **changes: Any) -> list[Effect]:
        """A change meant to make the ring run: if it still cannot, that is told anew."""
        return self._change(index, problem="", **changes)

    def _change(self, index: int, **changes: Any) -> list[Effect]:
        before = self.device.rings[index]
        self.device.change_ring(index, **changes)
        return self._settle(index, self.device.rings[index] != before)

    def _settle(self, index: int, changed: bool) -> list[Effect]:
        """Start or stop one ring as its description now demands; `changed`: a running one has
        something new."""
        device = self.device
        ring = device.rings[index]
        waiting = device.waiting(index)
        problem = "" if waiting else device.problem(index)
        runs = not waiting and not problem
        effects: list[Effect] = []
        if ring.started and not runs:
            self._stopping.add(index)
            effects.append(RingStop(index))
        if problem and problem != ring.problem:
            effects.append(RingRefused(index, problem))
        if runs and (changed or not ring.started):
            effects.append(RingChanged(index))
        if runs:
            self._stopping.discard(index)
        device.change_ring(index, started=runs, problem=problem)
        return effects

    def _settle_all(self) -> list[Effect]:
        rings = range(len(self.device.rings))
        return [effect for index in rings for effect in self._settle(index, False)]


_HANDLERS: dict[int, Callable[[Session, Any, list[int]], list[Effect]]] = {
    Request.GET_FEATURES: Session._get_features,
    Request.SET_FEATURES: Session._set_features,
    Request.SET_OWNER: Session._set_owner,
    Request.RESET_OWNER: Session._reset_owner,
    Request.SET_MEM_TABLE: Session._set_mem_table,
    Request.SET_VRING_NUM: Session._set_vring_num,
    Request.SET_VRING_ADDR: Session._set_vring_addr,
    Request.SET_VRING_BASE: Session._set_vring_base,
    Request.GET_VRING_BASE: Session._get_vring_base,
    Request.SET_VRING_KICK: Session._set_vring_kick,
    Request.SET_VRING_CALL: Session._set_vring_call,
    Request.SET_VRING_ERR: Session._set_vring_err,
    Request.GET_PROTOCOL_FEATURES: Session._get_protocol_features,
    Request.SET_PROTOCOL_FEATURES: Session._set_protocol_features,
    Request.GET_QUEUE_NUM: Session._get_queue_num,
    Request.SET_VRING_ENABLE: Session._set_vring_enable,
    Request.SEND_RARP: Session._send_rarp,
    Request.NET_SET_MTU: Session._net_set_mtu,
    Request.SET_BACKEND_REQ_FD: Session._set_backend_req_fd,
    Request.RESET_DEVICE: Session._reset_device,
    Request.GET_MAX_MEM_SLOTS: Session._get_max_mem_slots,
    Request.ADD_MEM_REG: Session._add_mem_reg,
    Request.REM_MEM_REG: Session._rem_mem_reg,
    Request.SET_STATUS: Session._set_status,
    Request.GET_STATUS: Session._get_status,
}
