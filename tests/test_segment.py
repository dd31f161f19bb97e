"""The named shared segment: made once, opened by others, refused when not ours, unlinked."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

import pytest
from compiled import in_processes

from shm import schema
from shm.layout import View
from shm.segment import Segment, SegmentError

DEVICES = Path("/dev/shm")


@pytest.fixture
def name():
    made = f"/vhostmq-test-{os.getpid()}"
    yield made
    (DEVICES / made[1:]).unlink(missing_ok=True)


def instance(segment: Segment) -> View:
    return View(schema.INSTANCE, segment.buffer, segment.offsets.instance)


@pytest.mark.parametrize("workers", [1, 4])
def test_what_one_writes_the_other_reads(name, workers):
    creator = Segment(name, workers, create=True)
    opener = Segment(name, workers)
    assert instance(opener)["magic"] == schema.MAGIC
    assert instance(opener)["workers"] == workers
    instance(creator)["pairs"] = 7
    assert instance(opener)["pairs"] == 7
    word = opener.address + schema.INSTANCE.fields["pairs"].offset
    assert ctypes.c_uint32.from_address(word).value == 7
    instance(opener)["pairs"] = 9
    assert instance(creator)["pairs"] == 9
    assert len(creator.buffer) == creator.offsets.size == schema.offsets(workers).size
    creator.close()
    opener.close()


def test_a_new_segment_is_all_zero_and_costs_only_what_is_touched(name):
    segment = Segment(name, 2, create=True)
    assert os.stat(DEVICES / name[1:]).st_blocks * 512 < 1 << 16 < segment.offsets.size
    assert not any(segment.buffer[schema.INSTANCE.size : 1 << 20])
    segment.close()


def test_only_its_owner_may_open_it(name):
    segment = Segment(name, 1, create=True)
    assert os.stat(DEVICES / name[1:]).st_mode & 0o777 == 0o600
    segment.close()


def test_a_name_in_use_is_refused(name):
    segment = Segment(name, 1, create=True)
    with pytest.raises(SegmentError, match=name):
        Segment(name, 1, create=True)
    assert instance(segment)["magic"] == schema.MAGIC
    segment.close()


def test_a_missing_segment_is_refused(name):
    with pytest.raises(SegmentError, match=name):
        Segment(name, 1)


def test_a_segment_for_fewer_workers_is_refused(name):
    Segment(name, 1, create=True).close()
    with pytest.raises(SegmentError, match="too small"):
        Segment(name, 2)


def test_a_segment_of_another_schema_is_refused(name):
    segment = Segment(name, 1, create=True)
    instance(segment)["magic"] = schema.MAGIC + 1
    segment.close()
    with pytest.raises(SegmentError, match="another version"):
        Segment(name, 1)


@pytest.mark.parametrize("size", [0, 1, 4095])
def test_a_file_of_another_kind_is_refused(name, size):
    (DEVICES / name[1:]).write_bytes(bytes(size))
    with pytest.raises(SegmentError):
        Segment(name, 1)


def test_refusing_keeps_no_descriptor(name):
    Segment(name, 1, create=True).close()
    gc.collect()  # what earlier tests forgot to close
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(SegmentError):
            Segment(name, 3)
        Segment(name, 1).close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_memory_outlives_its_name_and_its_creator(name):
    """A worker that outlives control keeps its segment; a new one cannot open it any more."""
    segment = Segment(name, 1, create=True)

    def opens(number):
        Segment(name, 1)  # ends without closing: that must not remove the name
        return 0

    assert in_processes(2, opens) == [0, 0]
    other = Segment(name, 1)
    instance(segment)["pairs"] = 5
    segment.unlink()
    segment.unlink()
    segment.close()
    assert instance(other)["pairs"] == 5
    with pytest.raises(SegmentError):
        Segment(name, 1)
    other.close()
