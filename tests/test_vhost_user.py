"""The vhost-user codec: golden bytes, both directions, and no input that raises but Refused."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from conversation import NUMBERS
from hypothesis import given
from hypothesis import strategies as st

from control import session
from control import vhost_user as vu

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


def test_requests_have_the_numbers_of_the_specification() -> None:
    assert {name: vu.Request[name] for name in NUMBERS} == NUMBERS
    assert sorted(vu.Request) == list(range(1, 45))


def test_feature_bits_have_the_positions_of_the_specification() -> None:
    named = dict(
        CSUM=0,
        GUEST_CSUM=1,
        MTU=3,
        MAC=5,
        GUEST_TSO4=7,
        GUEST_TSO6=8,
        HOST_TSO4=11,
        HOST_TSO6=12,
        MRG_RXBUF=15,
        CTRL_VQ=17,
        GUEST_ANNOUNCE=21,
        NET_MQ=22,
        LOG_ALL=26,
        INDIRECT_DESC=28,
        EVENT_IDX=29,
        PROTOCOL_FEATURES=30,
        VERSION_1=32,
        ACCESS_PLATFORM=33,
        RING_PACKED=34,
        IN_ORDER=35,
        GUEST_USO4=54,
        GUEST_USO6=55,
        HOST_USO=56,
    )
    assert {name: vu.VirtioFeature[name] for name in named} == {k: 1 << v for k, v in named.items()}


def test_the_default_offer_is_what_qemu_uml_dpdk_and_cloud_hypervisor_need() -> None:
    # MQ 0, RARP 2, REPLY_ACK 3, NET_MTU 4, BACKEND_REQ 5, RESET_DEVICE 13,
    # CONFIGURE_MEM_SLOTS 15, STATUS 16
    assert vu.SERVED_PROTOCOL_FEATURES == 0x1A03D


def test_every_rule_has_a_handler_and_every_handler_a_rule() -> None:
    assert set(vu.RULES) == set(session._HANDLERS)


GOLDEN: list[tuple[Any, bytes]] = [
    (vu.VringState(3, 0x80008000), bytes.fromhex("03000000 00800080")),
    (
        vu.VringAddr(1, 0, desc=0x1111, used=0x2222, avail=0x3333, log=2**64 - 1),
        bytes.fromhex(
            "01000000 00000000 1111000000000000 2222000000000000 3333000000000000 ffffffffffffffff"
        ),
    ),
    (vu.VringFd(2, True), bytes.fromhex("0200000000000000")),
    (vu.VringFd(2, False), bytes.fromhex("0201000000000000")),
    (
        vu.MemoryRegion(gpa=0x10, size=0x20, uva=0x30, mmap_offset=0x40),
        bytes.fromhex(
            "0000000000000000 1000000000000000 2000000000000000 3000000000000000 4000000000000000"
        ),
    ),
]


@pytest.mark.parametrize(("value", "data"), GOLDEN)
def test_payloads_on_the_wire(value: Any, data: bytes) -> None:
    assert value.encode() == data
    assert type(value).decode(data) == value


def test_headers_on_the_wire() -> None:
    assert vu.encode_request(3) == bytes.fromhex("03000000 01000000 00000000")
    assert vu.encode_request(2, vu.encode_u64(5), need_reply=True) == bytes.fromhex(
        "02000000 09000000 08000000 0500000000000000"
    )
    assert vu.encode_reply(17, vu.encode_u64(2)) == bytes.fromhex(
        "11000000 05000000 08000000 0200000000000000"
    )
    assert vu.encode_ack(5, ok=True)[12:] == bytes(8)
    assert vu.encode_ack(5, ok=False)[12:] == bytes([1]) + bytes(7)


def test_the_mac_address_of_a_rarp_is_the_first_six_bytes() -> None:
    mac = bytes.fromhex("525400123456")
    assert vu.decode_mac(mac + b"\xff\xff") == mac


@given(U64, U64, U64, U64, U32, U32)
def test_what_is_encoded_decodes_to_the_same(
    a: int, b: int, c: int, d: int, i: int, n: int
) -> None:
    for value in (vu.VringState(i, n), vu.VringAddr(i, n, a, b, c, d), vu.MemoryRegion(a, b, c, d)):
        assert type(value).decode(value.encode()) == value
    regions = [vu.MemoryRegion(a, b, c, d)] * (n % 33)
    assert vu.decode_mem_table(vu.encode_mem_table(regions)) == regions
    assert vu.decode_u64(vu.encode_u64(a)) == a
    fd = vu.VringFd(i & 0xFF, bool(n & 1))
    assert vu.VringFd.decode(fd.encode()) == fd


@given(st.sampled_from(sorted(vu.RULES)), st.binary(max_size=300))
def test_no_payload_raises_anything_but_refused(request: int, payload: bytes) -> None:
    try:
        vu.RULES[request].decode(payload)
    except vu.Refused as refusal:
        assert str(refusal)


@pytest.mark.parametrize("request_", sorted(vu.RULES))
def test_a_payload_of_another_length_is_refused(request_: int) -> None:
    rule = vu.RULES[request_]
    right = {len(data) for value, data in GOLDEN} | {0}
    fitting = []
    for size in range(0, 50):
        try:
            rule.decode(bytes(size))
            fitting.append(size)
        except vu.Refused:
            pass
    if request_ == vu.Request.SET_MEM_TABLE:
        assert fitting == list(range(8, 50))
    else:
        assert len(fitting) == 1 and fitting[0] in right


def test_a_memory_table_may_be_longer_than_its_regions() -> None:
    # UML has room for two regions and says one.
    regions = [vu.MemoryRegion(0xAA8000, 0x1F558000, 0xAA8000, 0xAA8000)]
    assert vu.decode_mem_table(vu.encode_mem_table(regions) + bytes(32)) == regions


@pytest.mark.parametrize("count", [2, 8, 33, 2**32 - 1])
def test_a_memory_table_shorter_than_its_count_is_refused(count: int) -> None:
    payload = struct.pack("=II", count, 0) + bytes(32)
    with pytest.raises(vu.Refused, match=str(count)):
        vu.decode_mem_table(payload)


def test_a_memory_table_of_more_than_32_regions_is_refused_though_complete() -> None:
    regions = [vu.MemoryRegion(0, 1, 0, 0)] * 33
    with pytest.raises(vu.Refused, match="33 memory regions, more than 32"):
        vu.decode_mem_table(vu.encode_mem_table(regions))


@pytest.mark.parametrize("value", [0x200, 0x300, 1 << 63])
def test_reserved_bits_beside_a_ring_index_are_refused(value: int) -> None:
    with pytest.raises(vu.Refused, match="reserved"):
        vu.VringFd.decode(vu.encode_u64(value))


@pytest.mark.parametrize(
    ("flags", "size", "expect_reply", "problem"),
    [
        (1, 4096, False, ""),
        (9, 0, False, ""),
        (5, 8, True, ""),
        (0, 0, False, "version 0"),
        (2, 0, False, "version 2"),
        (5, 0, False, "reply nobody asked for"),
        (1, 0, True, "request where a reply"),
        (1, 4097, False, "4097"),
        (1, 2**32 - 1, False, "4294967295"),
    ],
)
def test_headers_that_end_a_connection(
    flags: int, size: int, expect_reply: bool, problem: str
) -> None:
    header = vu.Header.decode(struct.pack("=III", 1, flags, size))
    assert problem in header.problem(expect_reply)
    assert bool(header.problem(expect_reply)) == bool(problem)
    assert header.payload_size == (size if size <= 4096 else 0)


def test_names() -> None:
    assert vu.request_name(5) == "SET_MEM_TABLE"
    assert vu.request_name(45) == "request 45"
    assert vu.request_name(0) == "request 0"
    assert vu.feature_names(1 << 32 | 1 << 4 | 1) == "CSUM b4 VERSION_1"
    assert vu.feature_names(0x28, vu.ProtocolFeature) == "REPLY_ACK BACKEND_REQ"
    assert vu.feature_names(0) == ""


F = vu.VirtioFeature


@pytest.mark.parametrize(
    ("features", "left"),
    [
        (F.GUEST_TSO4 | F.GUEST_CSUM, F.GUEST_TSO4 | F.GUEST_CSUM),
        (F.GUEST_TSO4 | F.GUEST_ECN | F.CSUM, F.CSUM),
        (F.HOST_TSO4 | F.HOST_TSO6 | F.HOST_ECN | F.HOST_USO | F.GUEST_CSUM, F.GUEST_CSUM),
        (F.HOST_ECN | F.HOST_TSO6 | F.CSUM, F.HOST_ECN | F.HOST_TSO6 | F.CSUM),
        (F.GUEST_USO4 | F.GUEST_USO6 | F.GUEST_UFO | F.VERSION_1, F.VERSION_1),
        (F.NET_MQ | F.VERSION_1, F.NET_MQ | F.VERSION_1),
    ],
)
def test_features_without_what_they_need(features: int, left: int) -> None:
    assert vu.consistent(features) == left


@given(U64)
def test_consistent_features_stay_as_they_are(features: int) -> None:
    kept = vu.consistent(features)
    assert kept & ~features == 0
    assert vu.consistent(kept) == kept
    for feature, needed in vu.REQUIREMENTS:
        # Nothing is dropped but what lacks its requirement.
        assert bool(kept & feature) == bool(features & feature and kept & needed)
