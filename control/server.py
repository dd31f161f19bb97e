"""server.py - the vhost-user socket: bytes and descriptors in, effects carried out, one front-end
at a time.

Theory      One `selectors` loop. A connection is read by exact sizes, 12 bytes of header and then
            the payload it announces: a longer read would credit descriptors to the wrong message.
            Each complete message goes to the session (session.py), whose effects are carried out in
            order on the workers. Nothing here waits for the front-end: half a message, then
            silence, costs a file descriptor and no more.
Second one  A further front-end is accepted and closed at once, with one line.
Gone        At hang-up all rings stop, guest memory is unmapped, sockets of flows stay: the same
            guest may come back. With --one-off the loop ends.
Death       There is always a note (notes.py) for the control that guard.py makes if this one dies.
            It goes on with the same front-end, which notices nothing. A note takes a millisecond
            with 32 pairs, half a thousand messages set them up: so the front-end's messages count
            as in hand until it has been silent for QUIET_S, and one note is made for all of them.
Limits      MESSAGES_MAX messages per turn of the loop; the answers of one message may wait unsent.
Ownership   Sockets here; descriptors that came with messages belong to the session.
"""

from __future__ import annotations

import array
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from control import effects as fx
from control import vhost_user as vu
from control.logs import Log
from control.notes import Notes
from control.places import Slot
from control.session import Offer, Session
from control.watch import LOOK_S
from control.workers import Workers
from dataplane.keeper import descriptors
from dataplane.slow import ndp
from shm.mailbox import AWAKE

FDS_MAX = 64
MESSAGES_MAX = 64
ADVERTISE_S = 400.0
QUIET_S = 0.003  # after this much silence of the front-end there is time for a note


class Hangup(Exception):
    """The connection is over; the text says why, empty for a plain end of file."""


class Connection:
    """One front-end: its socket, its session and the message being read."""

    def __init__(self, sock: socket.socket, offer: Offer) -> None:
        self.socket = sock
        self.session = Session(offer)
        self.unsent = b""
        self._data = b""
        self._fds: list[int] = []
        self._header: vu.Header | None = None

    def noted(self) -> tuple[Any, ...]:
        """What the next control has to know (notes.py)."""
        return self.socket.fileno(), self.session, self.unsent, self._data, self._fds, self._header

    @classmethod
    def again(cls, noted: tuple[Any, ...], offer: Offer) -> Connection:
        """The connection that a control before this one has noted."""
        fd, session, *read = noted
        made = cls(socket.socket(fileno=fd), offer)
        made.session = session
        made.unsent, made._data, made._fds, made._header = read
        return made

    def read(self) -> tuple[vu.Message, list[int]] | None:
        """The next whole message and its descriptors, or None when the rest is still to come."""
        while True:
            if self._header is None:
                want = vu.HEADER_SIZE
            else:
                want = self._header.payload_size
            if len(self._data) < want and not self._fill(want - len(self._data)):
                return None
            if len(self._data) < want:
                continue
            data, self._data = self._data, b""
            if self._header is None:
                self._header = vu.Header.decode(data)
                continue
            message, fds = vu.Message(self._header, data), self._fds
            self._header, self._fds = None, []
            return message, fds

    def _fill(self, size: int) -> bool:
        """Read up to `size` bytes and any descriptors; False when nothing is there yet."""
        try:
            data, control, flags, _ = self.socket.recvmsg(
                size, socket.CMSG_SPACE(4 * FDS_MAX), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return False
        except OSError as error:
            raise Hangup(str(error)) from error
        for level, kind, payload in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
                self._fds += fds
        if len(self._fds) > FDS_MAX:
            raise Hangup("more descriptors than any message has")
        if not data:
            raise Hangup("")
        if flags & socket.MSG_CTRUNC:
            raise Hangup("descriptors were cut off: too many, or more than RLIMIT_NOFILE allows")
        self._data += data
        return True

    def send(self, data: bytes) -> None:
        """Answer. What the socket does not take now is sent before anything else is read."""
        self.unsent += data
        self.flush()

    def flush(self) -> None:
        """Send what is unsent, as far as the front-end reads it."""
        try:
            while self.unsent:
                sent = self.socket.send(self.unsent, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                self.unsent = self.unsent[sent:]
        except BlockingIOError:
            return
        except OSError as error:
            raise Hangup(f"answer not sent: {error.strerror}") from error

    def close(self) -> None:
        """Close the socket and descriptors of a message that never became whole."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self.socket.close()


def found(notes: Notes, base: set[int]) -> tuple[Any, bool]:
    """What a control before this one has noted, if there was one, and whether it had messages in
    hand. Descriptors of its own that it has not noted are closed; `base` was nobody's.

    With messages in hand the front-end is not kept: what became of them nobody can tell, not even
    which descriptors were still open, and the one that control died of would be the end of the next
    one, too. The rings stop, the sockets of flows stay.
    """
    noted, in_hand = notes.read()
    kept = set(base)
    if noted is not None:
        front_end, workers, _ = noted
        kept |= {fd for slot in workers.slots for fd in slot.descriptors()}
        if front_end and not in_hand:
            fd, session, _, _, fds, _ = front_end
            kept |= {fd, *fds, *session.device.descriptors()}
    for fd in descriptors() - kept:
        os.close(fd)
    return noted, in_hand


class Server:
    """The control process's loop."""

    def __init__(
        self, workers: Workers, offer: Offer, log: Log, one_off: bool, notes: Notes
    ) -> None:
        self.workers = workers
        self.offer = offer
        self.log = log
        self.one_off = one_off
        self.notes = notes
        self.selector = selectors.DefaultSelector()
        self.connection: Connection | None = None
        self.status = 0
        self._running = True
        self._in_hand = False
        self._advertise_s = time.monotonic() + ADVERTISE_S
        self._look_s = time.monotonic() + LOOK_S
        self._signals, signal_end = socket.socketpair()
        for end in (self._signals, signal_end):
            end.setblocking(False)
        self._signal_end = signal_end
        signal.set_wakeup_fd(signal_end.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self._watch(self._signals, lambda: self._signals.recv(64))
        self._watch(workers.born_fd, workers.take_born)
        workers.on_up = self._worker_up
        workers.on_down = self._worker_down
        workers.on_refused = self._ring_refused
        workers.on_change = self._note

    def _watch(self, source: Any, action: Callable[[], object]) -> None:
        self.selector.register(source, selectors.EVENT_READ, action)

    def _stop(self, *_: object) -> None:
        self._running = False

    def _worker_up(self, slot: Slot) -> None:
        if slot.mailbox is not None:
            self._watch(slot.mailbox, lambda: self._reports(slot))

    def _worker_down(self, slot: Slot) -> None:
        if slot.mailbox is not None and slot.mailbox in self.selector.get_map():
            self.selector.unregister(slot.mailbox)

    def _ring_refused(self, index: int, reason: str) -> None:
        """A worker that has just come up cannot take a ring."""
        if self.connection is not None:
            failed = self.connection.session.effect_failed(fx.RingChanged(index), reason)
            self._carry_out(self.connection, failed)

    def _reports(self, slot: Slot) -> None:
        for report in self.workers.reports(slot):
            if report.kind == AWAKE:
                self._look_s = min(self._look_s, time.monotonic() + LOOK_S)
            for index in report.values.get("rings", ()):
                self.log.error(
                    f"ring {index} is broken: the guest's driver corrupted it; it is stopped"
                )

    def _set_aside(self) -> None:
        """Reports that came before the answer to a command (shm/mailbox.py): their mailbox may say
        nothing more. A worker that a command wakes reports first that it is awake."""
        for slot in self.workers.slots:
            if slot.mailbox is not None and slot.mailbox.reports:
                self._reports(slot)

    # --- front-ends -----------------------------------------------------------------------------

    def listen(self, sock: socket.socket) -> None:
        """Serve front-ends that connect here."""
        sock.setblocking(False)
        self._watch(sock, lambda: self._accept(sock))

    def adopt(self, sock: socket.socket) -> None:
        """Serve a front-end that is connected already."""
        sock.setblocking(False)
        self.connection = Connection(sock, self.offer)
        self._watch(sock, self._readable)

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, _ = listening.accept()
        except OSError as error:
            self.log.error(f"front-end not accepted: {error}")
            return
        if self.connection is not None:
            self.log.warning("a second front-end was turned away: one is connected")
            sock.close()
            return
        self.log.info("front-end connected")
        self.adopt(sock)

    def _readable(self) -> None:
        connection = self.connection
        if connection is None:
            return
        self._in_hand = True
        self.notes.take_in_hand()
        try:
            connection.flush()
            for _ in range(MESSAGES_MAX):
                if connection.unsent or (whole := connection.read()) is None:
                    break
                message, fds = whole
                self.log.debug(vu.request_name(message.header.request))
                self._carry_out(connection, connection.session.receive(message, fds))
        except Hangup as hangup:
            self._hang_up(str(hangup))
            return
        # A front-end that does not read its answers is not listened to until it does.
        events = selectors.EVENT_WRITE if connection.unsent else selectors.EVENT_READ
        self.selector.modify(connection.socket, events, self._readable)

    # --- over the death of control ----------------------------------------------------------------

    def _note(self) -> None:
        """For the next control, should this one die."""
        connection = self.connection.noted() if self.connection else None
        self.notes.write((connection, self.workers.noted(), self._running), self._in_hand)

    def take_over(self, noted: Any, in_hand: bool) -> None:
        """Go on where a control before this one stood (`found`)."""
        front_end, workers, running = noted
        self._running &= running
        self._in_hand = in_hand
        if in_hand:
            self.log.error("control died over a message of its front-end, which must connect again")
            self._running &= not self.one_off
            workers = workers._replace(regions={}, rings={}, left={})
        elif front_end:
            self.connection = Connection.again(front_end, self.offer)
            self._watch(self.connection.socket, self._readable)
        self.workers.take_over(workers)
        here = ", the front-end still connected" if self.connection else ""
        self.log.info(f"control is back{here}")
        self._readable()  # that an answer waits to be sent is not announced
        self._in_hand = False
        self._note()

    def _hang_up(self, reason: str) -> None:
        connection, self.connection = self.connection, None
        if connection is None:
            return
        self.selector.unregister(connection.socket)
        self.log.info(f"front-end gone{': ' + reason if reason else ''}")
        try:
            self._carry_out(connection, connection.session.hangup())
        except Hangup:
            pass  # nobody is there to be answered
        self.workers.set_memory(())
        connection.close()
        if self.one_off:
            self._running = False

    def _carry_out(self, connection: Connection, effects: list[fx.Effect]) -> None:
        """Do what the session decided, in order; an Ack tells whether all before it succeeded."""
        session, failed = connection.session, False
        pending = list(effects)
        while pending:
            effect = pending.pop(0)
            match effect:
                case fx.MemoryChanged():
                    if not self.workers.set_memory(session.device.memory):
                        failed = True
                        pending = (
                            session.effect_failed(effect, "a worker could not map it") + pending
                        )
                case fx.RingChanged(index):
                    ring = session.device.rings[index]
                    if ring.started and not self.workers.set_ring(ring, session.device.features):
                        failed = True
                        pending = session.effect_failed(effect, "its worker refused it") + pending
                case fx.RingStop(index):
                    base = self.workers.stop_ring(index)
                    if base is not None:
                        session.ring_stopped(index, base)
                case fx.RingRefused(index, reason):
                    self.log.error(f"ring {index} cannot run: {reason}")
                    self._signal(session.device.rings[index].err_fd)
                case fx.Reply(data):
                    connection.send(data)
                case fx.ReplyVringBase(index):
                    connection.send(session.vring_base_reply(index))
                case fx.Ack():
                    connection.send(effect.data(failed))
                case fx.Nack(_, reason, data):
                    self.log.warning(reason)
                    connection.send(data)
                case fx.Announce(mac):
                    self.log.debug(f"guest announces {mac.hex(':')}")
                case fx.BackendChannel():
                    pass  # nothing is ever asked of the front-end
                case fx.MtuChanged(mtu):
                    self._compare_mtu(mtu)
                case fx.Log(level, text):
                    getattr(self.log, level)(text)
                case fx.Close(reason):
                    raise Hangup(reason)

    def _compare_mtu(self, mtu: int) -> None:
        """A guest that is told more than its device takes complains, or sends nothing."""
        told = self.workers.net.mtu
        if mtu < told:
            self.log.warning(
                f"the guest's device has MTU {mtu}, it is told {told}: use --mtu {mtu}"
            )
        else:
            self.log.info(f"the guest's device has MTU {mtu}")

    def _signal(self, fd: int | None) -> None:
        """Signal a ring's error descriptor, whatever kind it is, without waiting."""
        if fd is not None:
            os.set_blocking(fd, False)
            try:
                os.write(fd, (1).to_bytes(8, "little"))
            except OSError:
                pass  # full: it is signalled already

    def _advertise(self) -> None:
        """Tell the guest that its router is still there (RFC 4861 6.2.4)."""
        self._advertise_s = time.monotonic() + ADVERTISE_S
        advertisement = ndp.unsolicited_ra(self.workers.net)
        if advertisement is not None and self.workers.instance["rx_enabled"] & 1:
            self.workers.send_frames(0, (advertisement,))

    def run(self) -> int:
        """Serve until a signal, or until the front-end is gone with --one-off. The exit status."""
        self._note()
        while self._running:
            self._set_aside()
            wait_s = max(min(self._advertise_s, self._look_s) - time.monotonic(), 0)
            if self._in_hand:
                wait_s = min(wait_s, QUIET_S)
            events = self.selector.select(wait_s)
            for key, _ in events:
                key.data()
                if not self._in_hand:
                    self._note()
            if self._in_hand and not events:
                self._in_hand = False
                self._note()
            if time.monotonic() >= self._look_s:
                self._look_s = time.monotonic() + self.workers.look()
                self._note()
            if time.monotonic() >= self._advertise_s:
                self._advertise()
        if self.connection is not None:
            self._hang_up("stopped")
        return self.status
