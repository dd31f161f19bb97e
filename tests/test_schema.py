"""The page of shared bytes: offsets held against a golden file, alignment, writers, drop reasons.

An intended change of the layout changes `golden_schema.txt` in the same commit:

    python tests/test_schema.py > tests/golden_schema.txt
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from shm import schema  # noqa: E402
from shm.layout import LINE, parse  # noqa: E402

GOLDEN = Path(__file__).with_name("golden_schema.txt")
WIDTHS = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "i32": 4}
STRUCTS = {struct.name: struct for struct in schema.STRUCTS}
LIMITS = (
    "PAIRS_MAX", "RINGS_MAX", "WORKERS_MAX", "FLOWS_MAX", "BUCKET_SLOTS", "BUCKETS",
    "HANDOFF_BYTES", "DROP_WORDS",
)  # fmt: skip
LAST_WRITER_WINS = {("flow", "tx_queue"), ("seen", "mac"), ("seen", "addr4")}


def listing() -> str:
    """All that a process of another build must agree on, one fact a line."""
    lines = [f"{name} {getattr(schema, name)}" for name in LIMITS]
    for struct in schema.STRUCTS:
        lines.append(f"\nstruct {struct.name} {struct.size}")
        for field in struct.fields.values():
            array = f"[{field.count}]" if field.count else ""
            lines.append(f"  {field.offset:4} {field.type}{array} {field.name} ({field.writer})")
    lines.append("\ndrops")
    lines += [f"  {number:4} {name}" for number, (name, _) in enumerate(schema.DROPS)]
    lines.append("\nprotocols " + " ".join(schema.PROTOCOLS))
    lines.append("states " + " ".join(schema.STATES))
    for workers in (1, 2, schema.WORKERS_MAX):
        at = schema.offsets(workers)
        lines.append(f"\nsegment for {workers} workers")
        lines += [f"  {name} {value}" for name, value in vars(at).items() if name != "workers"]
    return "\n".join(lines) + "\n"


def sources(*rooms: str) -> dict[str, str]:
    paths = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def test_layout_is_the_golden_one():
    assert listing() == GOLDEN.read_text(), "see the first lines of this file"


@pytest.mark.parametrize("struct", STRUCTS.values(), ids=STRUCTS)
def test_words_are_aligned_and_apart(struct):
    """Atomics need natural alignment; a struct in an array must keep it."""
    assert struct.size % LINE == 0
    end = 0
    for field in struct.fields.values():
        assert field.offset % WIDTHS[field.type] == 0
        assert field.offset >= end
        end = field.offset + WIDTHS[field.type] * max(field.count, 1)
    assert end <= struct.size


@pytest.mark.parametrize("struct", STRUCTS.values(), ids=STRUCTS)
def test_one_writer_per_cache_line(struct):
    writers: dict[int, str] = {}
    for field in struct.fields.values():
        last = field.offset + WIDTHS[field.type] * max(field.count, 1) - 1
        for line in range(field.offset // LINE, last // LINE + 1):
            assert writers.setdefault(line, field.writer) == field.writer, field.name


def test_16_byte_addresses_are_aligned_for_8_byte_loads():
    for struct in schema.STRUCTS:
        for field in struct.fields.values():
            if field.type == "u8" and field.count == 16:
                assert field.offset % 4 == 0, (struct.name, field.name)
    assert schema.FLOW.fields["guest_addr"].offset % 8 == 0
    assert schema.FLOW.fields["far_addr"].offset % 8 == 0


def test_words_with_more_than_one_writer_are_argued_on_the_page():
    for struct, field in LAST_WRITER_WINS:
        assert field in STRUCTS[struct].fields
    assert "last writer wins" in schema.FLOW.fields["tx_queue"].doc
    assert {field.writer for field in schema.SEEN.fields.values()} == {"last"}
    assert "flow.tx_queue" in schema.__doc__ and "seen." in schema.__doc__


def test_sizes_that_the_design_promises():
    assert schema.FLOW.size <= 256
    assert schema.BUCKET_SLOTS * 4 == LINE, "the tags of a bucket are one cache line"
    assert schema.BUCKETS * schema.BUCKET_SLOTS == schema.FLOWS_MAX
    assert schema.BUCKETS & (schema.BUCKETS - 1) == 0 and schema.BUCKETS <= 1 << 16
    assert schema.HANDOFF_BYTES & (schema.HANDOFF_BYTES - 1) == 0
    assert schema.QUEUE.fields["drops"].count == schema.DROP_WORDS >= len(schema.DROPS)
    assert schema.WORKER.fields["opened"].count == len(schema.PROTOCOLS)
    assert schema.WORKER.fields["flows"].count == len(schema.PROTOCOLS) * 8
    assert len(schema.STATES) <= 8 and schema.STATES[0] == "free"
    assert schema.INSTANCE.fields["pair_worker"].count == schema.PAIRS_MAX
    assert schema.PAIRS_MAX < 64, "rx_enabled is one word"


@pytest.mark.parametrize("workers", [1, 2, 7, schema.WORKERS_MAX])
def test_segment_parts_are_apart(workers):
    at = schema.offsets(workers)
    parts = [
        (at.instance, schema.INSTANCE.size), (at.net, schema.NET.size),
        (at.seen, schema.SEEN.size), (at.worker, schema.WORKER.size * schema.WORKERS_MAX),
        (at.queue, schema.QUEUE.size * schema.RINGS_MAX), (at.locks, 4 * schema.BUCKETS),
        (at.tags, 4 * schema.FLOWS_MAX), (at.flow, schema.FLOW.size * schema.FLOWS_MAX),
        (at.handoff, 2 * schema.HANDOFF_STRIDE * workers * workers),
    ]  # fmt: skip
    assert schema.HANDOFF_STRIDE == schema.HANDOFF.size + schema.HANDOFF_BYTES
    for (start, size), (following, _) in zip(parts, parts[1:] + [(at.size, 0)], strict=True):
        assert start % schema.PAGE == 0
        assert start + size <= following


def test_names_are_fit_for_metrics():
    names = [name for name, _ in schema.DROPS]
    names += [field for struct in schema.STRUCTS for field in struct.fields]
    for name in names:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
    assert len(schema.DROP) == len(schema.DROPS)
    for _, doc in schema.DROPS:
        assert len(doc) > 10 and doc == doc.strip() and not doc.endswith(".")


@pytest.mark.parametrize("name", schema.DROP)
def test_every_drop_reason_is_given_and_documented(name):
    """A reason nobody gives is a promise in the metrics that is never kept."""
    texts = sources("dataplane")
    assert any(f'DROP["{name}"]' in text for text in texts.values()), "given nowhere"
    docs = [text.split('"""')[1] for text in texts.values() if text.startswith('"""')]
    assert any(re.search(rf"\b{name}\b", doc) for doc in docs), "in no module's docstring"


@pytest.mark.parametrize(
    ("struct", "field"),
    [
        (struct.name, field.name)
        for struct in (schema.WORKER, schema.QUEUE)
        for field in struct.fields.values()
        if field.writer.startswith("worker")
    ],
)
def test_every_counter_is_counted(struct, field):
    setters = f"{struct}.set_{field}(", f'["{field}"] = '
    element = f"{struct}.{field}("
    texts = sources("dataplane").values()
    array = STRUCTS[struct].fields[field].count > 0
    wanted = (element,) if array else setters
    assert any(setter in text for text in texts for setter in wanted)


def test_magic_follows_every_shared_fact(monkeypatch):
    """Another layout, another list of reasons, another size: another magic."""
    assert 0 < schema.MAGIC < 1 << 63
    text = (ROOT / "shm" / "schema.py").read_text()
    seen = {schema.MAGIC}
    for before, after in (
        ("u32 pairs                queue pairs", "u64 pairs                queue pairs"),
        ('("chain_loop",', '("chain_loops",'),
        ("FLOWS_MAX = 1 << 17", "FLOWS_MAX = 1 << 16"),
        ("HANDOFF_BYTES = 1 << 20", "HANDOFF_BYTES = 1 << 19"),
    ):
        assert text.count(before) == 1
        scope: dict[str, object] = {"__name__": "shm.schema"}
        exec(text.replace(before, after), scope)
        seen.add(scope["MAGIC"])
    assert len(seen) == 5
    assert parse("struct a: b\n writer c:\n u8 d  e").size == LINE


if __name__ == "__main__":
    print(listing(), end="")
