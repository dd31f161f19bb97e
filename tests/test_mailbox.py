"""The mailbox: messages with descriptors, answers, reports, and every way a side can be gone."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shm.mailbox import FDS_MAX, MESSAGE_MAX, Mailbox, MailboxError, Report, ask

MESSAGES = st.recursive(
    st.none() | st.integers() | st.binary(max_size=200) | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner),
    max_leaves=8,
)


@pytest.fixture
def boxes():
    left, right = Mailbox.pair()
    yield left, right
    left.close()
    right.close()


def marked(number: int) -> int:
    """A descriptor that can be told from others: a file holding `number`."""
    fd = os.memfd_create("marked")
    os.write(fd, bytes([number]))
    return fd


@given(st.lists(MESSAGES, max_size=5), st.lists(MESSAGES, max_size=5))
def test_messages_keep_their_order_and_borders(there, back):
    left, right = Mailbox.pair()
    for message in there:
        left.send(message)
    for message in back:
        right.send(message)
    assert [right.receive(1)[0] for _ in there] == there
    assert [left.receive(1)[0] for _ in back] == back
    left.close()
    right.close()


@pytest.mark.parametrize("count", [0, 1, 2, FDS_MAX])
def test_descriptors_travel_with_their_message_and_stay_open_here(boxes, count):
    left, right = boxes
    fds = [marked(number) for number in range(count)]
    left.send("no descriptors")
    left.send("some", tuple(fds))
    assert right.receive(1) == ("no descriptors", [])
    message, received = right.receive(1)
    assert message == "some"
    assert [os.pread(fd, 1, 0)[0] for fd in received] == list(range(count))
    assert not set(received) & set(fds)
    for fd in fds + received:
        os.close(fd)


@pytest.mark.parametrize("size", [MESSAGE_MAX - 100, MESSAGE_MAX // 2])
def test_large_messages(boxes, size):
    left, right = boxes
    left.send(bytes(size))
    assert right.receive(1) == (bytes(size), [])


def test_a_message_that_would_be_cut_is_refused_before_it_is_sent(boxes):
    left, right = boxes
    with pytest.raises(AssertionError, match="too large"):
        left.send(bytes(MESSAGE_MAX))
    with pytest.raises(AssertionError, match="too large"):
        left.send("descriptors", (0,) * (FDS_MAX + 1))
    with pytest.raises(MailboxError):
        right.receive(0)


def test_nothing_waiting_is_not_the_end(boxes):
    left, _ = boxes
    for timeout_s in (0, 0.05):
        started_s = time.monotonic()
        with pytest.raises(MailboxError) as refused:
            left.receive(timeout_s)
        assert "gone" not in str(refused.value)
        assert time.monotonic() - started_s >= timeout_s


def test_the_other_side_closed(boxes):
    left, right = boxes
    right.send("last words")
    right.close()
    assert left.receive(0) == ("last words", [])
    with pytest.raises(MailboxError, match="gone"):
        left.receive(0)
    with pytest.raises(MailboxError):
        left.send("too late")


def test_the_other_side_closed_with_something_unread(boxes):
    """The kernel then reports a reset, not an end of file; a worker must still learn of it."""
    left, right = boxes
    left.send("never read")
    right.close()
    with pytest.raises(MailboxError, match="gone"):
        left.receive(0)


def test_the_other_side_was_killed():
    left, right = Mailbox.pair()
    pid = os.fork()
    if pid == 0:
        left.close()
        right.receive(5)
        os.kill(os.getpid(), signal.SIGKILL)
    right.close()
    left.send("go")
    left.send("never read")
    with pytest.raises(MailboxError, match="gone"):
        left.receive(5)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    left.close()


def test_ask_returns_the_answer_and_keeps_reports(boxes):
    left, right = boxes

    def serve():
        question, fds = right.receive(5)
        assert os.pread(fds[0], 1, 0) == bytes([7])
        os.close(fds[0])
        right.send(Report("broken", rings=[3]))
        right.send(Report("other"))
        right.send(["answer to", question])

    thread = threading.Thread(target=serve)
    thread.start()
    fd = marked(7)
    assert ask(left, "question", (fd,)) == ["answer to", "question"]
    thread.join()
    os.close(fd)
    assert [(report.kind, report.values) for report in left.reports] == [
        ("broken", {"rings": [3]}),
        ("other", {}),
    ]


def test_ask_gives_up(boxes):
    left, right = boxes
    with pytest.raises(MailboxError):
        ask(left, "question", timeout_s=0.05)
    assert right.receive(0) == ("question", [])
    right.close()
    with pytest.raises(MailboxError):
        ask(left, "question", timeout_s=5)
