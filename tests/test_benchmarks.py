"""What becomes of a benchmark's result: tables, comparisons, pictures, goals. Nothing is measured
here."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import __main__ as runner
from benchmarks import (
    cases,
    compare,
    goals,
    lab,
    measure,
    model,
    performance,
    places,
    plot,
    series,
    table,
)

ROOT = Path(__file__).resolve().parent.parent
SAID = {
    "tcp": {"bytes": 1e9, "seconds": 2.0},
    "udp": {"datagrams": 2000, "seconds": 2.0},
    "udp_train": {"datagrams": 200_000, "seconds": 2.0},
    "rr": {"transactions": 1000, "seconds": 2.0, "p50_us": 100, "p99_us": 200},
    "crr": {"transactions": 500, "seconds": 2.0, "p50_us": 300, "p99_us": 400},
    "hop": {"bytes": 4e9, "seconds": 2.0},
    "kill": {"transactions": 1000, "seconds": 2.0, "max_us": 40_000},
    "kill_tcp": {"bytes": 4e9, "seconds": 2.0, "longest_gap_ms": 60.0, "stalls": 0},
    "slow": {"bytes": 1e8, "seconds": 2.0, "longest_gap_ms": 3.5, "stalls": 0},
}


def rows_of(part: str, factor: float) -> list[dict[str, Any]]:
    """Rows of a part as they are measured, five runs each; ours are `factor` times as fast."""
    rows = []
    for setups, loads in (cases.PARTS | cases.ON_REQUEST)[part]("passt"):
        for setup in setups:
            for load, amount in loads:
                if load not in SAID:
                    continue
                for way in series.directions(load):
                    scale = factor if setup.back_end == "vhostmq" else 1.0
                    said = {name: value * scale if name in ("bytes", "datagrams", "transactions")
                            else value for name, value in SAID[load].items()}  # fmt: skip
                    runs = [series.rates(said, number + 1.0, 4.0) for number in range(5)]
                    if series.kills((load, amount)):
                        runs = [series.killed(said)] * 5
                    case = {"load": load, "amount": amount, "direction": way}
                    counted = {"syscalls_each": 3.0, "notifications_per_packet": 0.5}
                    row = asdict(setup) | case | measure.summary(runs)
                    rows.append(row | {"failed": 0, "counted": counted})
    return rows


def result(factor: float) -> dict[str, Any]:
    drain = {"front_end": "dpdk_virtio_user", "pairs": 1, "workers": 1, "mtu": 1500,
             "load": "drain", "amount": 64, "direction": "up"}  # fmt: skip
    rate = {"median": 1e6, "min": 1e6, "max": 1e6}
    made: dict[str, Any] = {part: rows_of(part, factor) for part in cases.PARTS}
    made["ring"] = [drain | {"back_end": kind, "per_s": rate} for kind in ("vhostmq", "dpdk_vhost")]
    opened = {f"open_{tenth}_per_s": rate for tenth in ("first", "last")}
    for row in made["flows"]:
        if row["amount"] > 1000:  # as many as this machine affords stand for all
            row |= {"amount": 100_000, **opened}
    spread = {"median": 80.0, "min": 70.0, "max": 90.0}
    made["start"] = {
        kind: dict.fromkeys(("answer_ms", "workers_ms", "guest_ms"), spread)
        for kind in ("warm", "cold")
    }
    made["at_rest"] = {"wakeups_in_5_s": 1, "workers": []}
    made["machine"] = {"cpu": "a", "cores": 2, "runs": 5, "seconds": 2}
    made["machine"]["commits"] = {"throughput": "abc", "ring": "abd", "pairs": "abc"}
    made["flow_memory"] = {"workers": 8, "flows_before": 80, "before_mb": 150.0,
                           "flows": 100_000, "open_mb": 190.0, "bytes_per_flow": 419.8}  # fmt: skip
    made["micro"] = {"breath_1_ns": 200.0, "breath_64_ns": 830.0}
    made["micro"] |= {"lookup_10_ns": 50.0, "lookup_100000_ns": 100.0}
    return made | {"micro": made["micro"] | {"timer_10_ns": 500.0, "timer_100000_ns": 250.0}}


def test_rates() -> None:
    found = series.rates({"bytes": 5e9, "seconds": 2.0}, 0.5, 2.0)
    assert found == {"gbit_s": 20.0, "cpu_s_per_gb": 0.1, "machine_cpu_s_per_gb": 0.4}
    found = series.rates({"datagrams": 1000, "seconds": 2.0, "sent": 9000}, 0.5, 1.0)
    assert found == {"per_s": 500.0, "cpu_us_each": 500.0, "machine_cpu_us_each": 1000.0}
    assert series.rates({"bytes": 0, "seconds": 2.0}, 0.5, 1.0)["cpu_s_per_gb"] is None
    assert series.rates({"datagrams": 0, "seconds": 2.0}, 0.5, 1.0)["per_s"] == 0


def test_summary_is_median_and_range() -> None:
    runs = [{"gbit_s": float(value), "cpu_s_per_gb": None} for value in (8, 40, 24)]
    assert measure.summary(runs) == {"gbit_s": {"median": 24.0, "min": 8.0, "max": 40.0}}


class Quick:
    """A bench whose runs are told, not made."""

    def __init__(self, setup: series.Setup, how: series.How, log: list[str]) -> None:
        self.setup, self.how, self.inside, self.log = setup, how, self, log
        log.append(f"{setup.back_end} up")

    def timed(self, load: series.Load, direction: str) -> series.Run:
        self.log.append(f"{self.setup.back_end} {load[1]} {direction}")
        if load[1] == 8 and self.setup.back_end == "passt":
            raise lab.LabError("no")
        return {"gbit_s": 1.0}

    def counted(self, load: series.Load, direction: str) -> dict[str, float]:
        return {"syscalls_per_mb": load[1]}

    def close(self) -> None:
        self.log.append(f"{self.setup.back_end} down")


@pytest.mark.parametrize("front_end", ["vhostmq_guest", *places.POLLING])
def test_turns(monkeypatch: pytest.MonkeyPatch, front_end: str) -> None:
    """Back-ends are up together, but where the front-end polls: there never two."""
    log: list[str] = []
    monkeypatch.setattr(series, "served", contextlib.nullcontext)
    monkeypatch.setattr(series, "Bench", lambda setup, how, room, port: Quick(setup, how, log))
    setups = [series.Setup(front_end, back_end, 1500) for back_end in ("vhostmq", "passt")]
    rows = series.compare(setups, [("slow", 1), ("slow", 8)], series.How(2, 1, "passt"))
    found = {(row["back_end"], row["amount"]): row for row in rows}
    assert len(rows) == len(found) == 4 and found["vhostmq", 8]["gbit_s"]["median"] == 1.0
    assert found["passt", 8]["failed"] == 2 and found["passt", 8]["counted"]
    assert log.count("vhostmq 1 up") == log.count("passt 8 up") == 2
    if front_end in places.POLLING:
        one = ["vhostmq up", "vhostmq 1 up", "vhostmq down", "vhostmq up", "vhostmq 8 up"]
        assert log[:5] == one and log.count("vhostmq up") == 4
    else:
        assert (
            log[:4] == ["vhostmq up", "passt up", "vhostmq 1 up", "passt 1 up"]
            and log.count("passt up") == 1
        )


def test_what_the_load_is_asked() -> None:
    asked = series.arguments(("udp_train", 1400), "down", "10.0.0.1", 2)
    assert asked == f"udp down 10.0.0.1 {series.PORT} 2 1400 42"
    assert series.arguments(("rr", 5), "both", "h", 1) == f"rr both h {series.PORT} 1 5"


def test_tables() -> None:
    made = result(2.0)
    line = table.throughput(made["throughput"])[2]
    assert line.startswith("| 1500 | 1 | guest to host | 8.0 (8.0-8.0) | 4.0 (4.0-4.0) | 1.50 (0.5")
    line = table.each(made["transactions"])[2]
    assert line.startswith("| request/response |  | 1000 (1000-1000) | 500 (500-500) | 1500.0 ")
    assert line.endswith("| 100, 200 | 100, 200 |")


def test_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ratio of medians, and a word where it may be noise or another machine."""
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    made = [result(1.0), result(1.5)]
    made[1]["machine"]["cores"] = 4
    made[1]["micro"] |= {"breath_1_ns": 100.0, "breath_16_ns": 300.0}
    (faster,) = [
        row for row in made[1]["pairs"] if (row["pairs"], row["load"], row["direction"]) ==
        (2, "tcp", "up") and row["workers"] == 2
    ]  # fmt: skip
    faster["gbit_s"] = {"median": 8.0, "min": 7.5, "max": 9.0}
    faster["counted"]["syscalls_each"] = 6.0
    for path, one in zip(paths, made, strict=True):
        path.write_text(json.dumps(one))
    monkeypatch.setattr("sys.argv", ["compare", *map(str, paths)])
    compare.main()
    lines = capsys.readouterr().out.splitlines()
    lines = [line for line in lines if not line.startswith("RLIMIT_NOFILE")]
    assert lines[0] == "warning: cores differs: 2 and 4"

    def shown(case: str) -> str:
        (found,) = [line for line in lines if line.startswith(case)]
        return " ".join(found.removeprefix(case).split())

    # The same case stands in two parts, and both are shown.
    setup = "vhostmq_guest vhostmq 4 2 0 1500 tcp 8 up "
    for part in ("throughput ", "pairs "):
        assert shown(part + setup + "gbit_s") == "4 (4-4) 6 (6-6) 1.50 no range"
        assert shown(part + setup + "cpu_s_per_gb").endswith(" 0.67 ranges overlap")
    setup = "pairs vhostmq_guest vhostmq 2 2 0 1500 tcp 8 up "
    assert shown(setup + "gbit_s") == "4 (4-4) 8 (7.5-9) 2.00"
    assert shown(setup + "counted syscalls_each") == "3 (3-3) 6 (6-6) 2.00 no range"
    assert shown("micro breath_1_ns") == "200 (200-200) 100 (100-100) 0.50 no range"
    assert lines[-1] == f"only in {paths[1]}: micro breath_16_ns"
    assert not any("failed" in line for line in lines), "nothing failed in either"


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "result.json").write_text(json.dumps(result(2.0)))
    monkeypatch.setattr("sys.argv", ["plot", str(tmp_path / "result.json"), str(tmp_path / "out")])
    plot.main()
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(
        f"{name}.{kind}" for name in performance.PICTURES for kind in ("png", "svg")
    )
    assert all(path.stat().st_size > 5000 for path in (tmp_path / "out").glob("*.png"))


def test_bars_are_hollow_where_the_document_has_a_star() -> None:
    """One rule for what shows the scheduler rather than scaling."""
    made = result(2.0)
    for cores in (2, 64):
        made["machine"]["cores"] = cores
        figure = plot.against_pairs(made, "tcp", "gbit_s", "Gbit/s")
        filled = [patch.get_fill() for patch in figure.axes[0].patches]
        rows = [row for row in made["pairs"] if row["load"] == "tcp"]
        rows.sort(key=lambda row: row["direction"], reverse=True)
        assert filled == [not performance.crowded(row, cores) for row in rows]
        plot.plt.close(figure)


# --- goals and the document -----------------------------------------------------------------------


def test_every_goal_finds_its_rows() -> None:
    """The list of goals names cases that are measured."""
    made = result(2.0)
    lost = [goal.text for goal in goals.GOALS if goal.figures(made) is None]
    assert not lost


def test_goals_compare_the_right_rows() -> None:
    """Twice as fast for the same time: every rate doubles, every cost halves."""
    made, ratios = result(2.0), {}
    for goal in goals.GOALS:
        ours, theirs = goal.figures(made) or (0.0, 1.0)
        ratios.setdefault((goal.topic, goal.measure), set()).add(ours / theirs)
    assert ratios["tcp_1500", "gbit_s"] == ratios["tcp_65520", "gbit_s"] == {2.0}
    assert ratios["cpu_1500", "cpu_s_per_gb"] == {0.5} == ratios["pairs", "machine_cpu_s_per_gb"]
    assert ratios["mtu", "cpu_s_per_gb"] == {1.0} == ratios["sharding", "cpu_s_per_gb"]
    assert ratios["datagrams", "per_s"] == {2.0} and ratios["rr", "p99_us"] == {1.0}
    assert ratios["drain", "per_s"] == {1.0} and ratios["lookup", "lookup"] == {2.0}
    assert ratios["timer", "timer"] == {0.5}


def test_a_goal_of_ours_alone() -> None:
    """Judged by our figure, whatever the other one is; of a stall by that of the worst run."""
    rows: list[dict[str, Any]] = [
        {**case, "load": "slow", "amount": 1, "mtu": 1500,
         "longest_gap_ms": {"median": 1.0, "max": gap_ms}}
        for case, gap_ms in ((goals.OURS, 150.0), (goals.PASST, 100.0))
    ]  # fmt: skip
    (goal,) = (goal for goal in goals.GOALS if goal.figures({"rows": rows}))
    assert goal.figures({"rows": rows}) == (150.0, 100.0) and goal.met((150.0, 100.0))
    assert not goal.met((200.5, 1000.0))
    assert performance.goal_line(goal, (150.0, 100.0)).endswith("200 | 150 | 100 | 1.50 | met |")


def test_goals_of_start_and_rest() -> None:
    """There is nothing to compare them with."""
    start = {kind: {"answer_ms": {"median": 80.0}, "workers_ms": {"median": 1200.0}}
             for kind in ("warm", "cold")}  # fmt: skip
    made = {"start": start, "at_rest": {"wakeups_in_5_s": 0}}
    lines = performance.goals(made)[2:]
    assert len(lines) == 5 and lines[-1].endswith(" in 5 s | ≤ 5 | 0 | - | - | met |")
    assert [line.endswith("**not met** |") for line in lines] == [False, False, True, False, False]


def test_opening_is_one_measure_over_another() -> None:
    row = asdict(cases.many_flows()) | {"load": "rr", "amount": 100_000, "direction": "both"}
    row |= {
        f"open_{part}_per_s": {"median": rate} for part, rate in (("first", 9e3), ("last", 8e3))
    }
    (goal,) = (goal for goal in goals.GOALS if goal.figures({"flows": [row]}))
    assert goal.figures({"flows": [row]}) == (8e3, 9e3) and not goal.met((8e3, 9e3))


def test_document() -> None:
    """Met, not met, and nothing of what was not measured; the notes of what is not met and of
    nothing else."""
    made = result(2.0)
    del made["qemu"]
    text = performance.document(made, "# n\n\n## datagrams\nWhy so.\n\n## drain\nNot shown.\n")
    assert "| vhostmq guest, MTU 1500, one stream, guest to host, Gbit/s | ≥ 1.6 | 8 | 4 |" in text
    assert "2.00 | met |" in text and "2.00 | **not met** |" in text
    assert "| qemu, MTU 1500" not in text
    assert "### Not met: datagrams\n\nWhy so." in text and "Not shown" not in text
    assert "### Not met: lookup\n\nNot looked into yet." in text
    assert "| tcp 16 down | 9000 | vhostmq behind vhostmq_guest | 4/2 \\* | 8.00 (8.00" in text
    assert "| vhostmq behind vhostmq_guest | 1/1 | " in text and "more than the 2 cores" in text
    assert "| stalls of 200 ms |" in text and "| 3.5 (3.5-3.5) | 0 (0-0) | 3 | 0.5 |" in text
    assert "That is 420 bytes a flow" in text and "the first tenth" in text
    assert "\n\ncommit abc: throughput, pairs; commit abd: ring\n\n" in text
    made["machine"]["cores"] = 64
    assert "\\*" not in performance.document(made, "")


def test_sweep() -> None:
    """Every load with every number of pairs and workers at every MTU, and rest, in a document of
    its own."""
    asked = {
        (setup, load)
        for setups, loads in cases.sweep("passt")
        for setup in setups
        for load in loads
    }
    for mtu in (1500, 9000, 65520):
        for pairs, workers in ((1, 1), (2, 2), (4, 1), (8, 2), (16, 2)):
            setup = series.Setup("vhostmq_guest", "vhostmq", mtu, pairs, workers)
            assert {(setup, load) for load in (("idle", 0), ("tcp", 16), ("rr", 1000))} <= asked
        assert (cases.many_flows(mtu), ("rr", cases.affordable_flows()[-1])) in asked
    made = result(2.0)
    made["sweep"], made["machine"]["commits"]["sweep"] = rows_of("sweep", 2.0), "abe"
    idle = measure.summary([{"idle_switches_per_s": 0.2, "idle_cpu_us_per_s": 11.0}])
    setup = asdict(series.Setup("vhostmq_guest", "vhostmq", 1500))
    made["sweep"].append(setup | idle | {"load": "idle", "amount": 0, "direction": "both"})
    text = performance.sweep(made)
    assert "| rr 1000 | 65520 | vhostmq behind vhostmq_guest | 16/2 \\* | 1000 (" in text
    assert "commit abe: sweep\n" in text and "abc" not in text and "more than the 2 cores" in text
    assert text.endswith("| - | - | - |  | 0.2 (0.2-0.2) | 11 (11-11) | - | - |  |\n")


def test_what_is_measured_again_replaces_what_was(tmp_path: Path) -> None:
    """Parts of one machine may be measured one by one; those of another are not mixed with them,
    unless nothing of them would stay."""
    path, here, there = tmp_path / "r.json", {"cpu": "a", "cores": 2}, {"cpu": "b"}
    assert runner.merged(path, ["ring"], here) == {"machine": here}, "the first part of a result"
    path.write_text(json.dumps({"machine": here, "ring": [1], "micro": {}}))
    assert runner.merged(path, ["ring"], here)["micro"] == {}
    assert runner.merged(path, [], here | there) == {"machine": here | there}
    assert runner.merged(path, ["micro", "ring"], here | there) == {"machine": here | there}
    with pytest.raises(lab.LabError, match="cpu differs"):
        runner.merged(path, ["ring"], here | there)


def test_rest_is_what_the_back_end_does_alone() -> None:
    """A process that wakes 50 times a second, and none at all."""
    bench = object.__new__(series.Bench)
    bench.setup, bench.how = series.Setup("loopback", "vhostmq", 1500), series.How(1, 1, "")
    wakes = "import time\nwhile True: time.sleep(0.02)"
    bench.back_end = subprocess.Popen([sys.executable, "-c", wakes])
    try:
        time.sleep(0.3)
        found = bench.timed(("idle", 0), "both")
    finally:
        bench.back_end.kill()
        bench.back_end.wait()
    assert 25 <= (found["idle_switches_per_s"] or 0) <= 100
    assert 0 < (found["idle_cpu_us_per_s"] or 0) < 500_000
    assert bench.counted(("idle", 0), "both") == {}
    bench.back_end = None
    assert bench.timed(("idle", 0), "both") == {}


def test_what_perf_counted(tmp_path: Path) -> None:
    """Its lines, without those of what may not be counted; nothing where it did not run."""
    log = tmp_path / "perf.txt"
    assert measure.perf_counts(log) == {}
    log.write_text("# started\n\n250,,raw_syscalls:sys_enter,1000,100.00,,\n"
                   "<not supported>,,syscalls:sys_enter_read,0,100.00,,\n")  # fmt: skip
    assert measure.perf_counts(log) == {"raw_syscalls:sys_enter": 250.0}


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that sleeps up to 100 times a second."""
    sleeps = "import time\nwhile True: time.sleep(0.01)"
    process = subprocess.Popen([sys.executable, "-c", sleeps])
    time.sleep(0.5)
    yield process
    process.kill()
    process.wait()


needs_perf = pytest.mark.skipif(
    not shutil.which("perf"), reason="NOT TESTED here: perf is not installed"
)


@needs_perf
def test_perf_counts_no_longer_than_asked(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """Of what goes on all the time: one second."""
    counted = measure.perf_for(1, [sleeper.pid], tmp_path / "perf.txt")
    calls = counted.get(measure.PERF_EVENTS[0])
    if calls is None:
        pytest.skip("NOT TESTED here: perf may not count system calls")
    assert 20 <= calls <= 110


@needs_perf
def test_opening_and_closing_are_not_counted(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    """Of three seconds one: from "open" to "seconds"."""
    bench = object.__new__(series.Bench)
    bench.setup, bench.how = series.Setup("loopback", "vhostmq", 1500), series.How(1, 1, "")
    bench.back_end, bench.room = sleeper, SimpleNamespace(folder=tmp_path)

    def run(load: series.Load, direction: str, heard: places.Heard) -> dict[str, Any]:
        for word, wait_s in ((b"", 1), (b"open", 0.5), (b"open begin", 0), (b"open seconds", 1)):
            heard(word)
            time.sleep(wait_s)
        return {"transactions": 2}

    bench.run = run
    found = bench.counted(("rr", 2), "both")
    if not found:
        pytest.skip("NOT TESTED here: perf may not count system calls")
    assert 20 <= 2 * found["syscalls_each"] <= 110


def test_model() -> None:
    made = result(1.0)
    found = model.costs(made)
    assert found["cpu_s_per_gb_up"] == 3.0 and found["ring_frame_ns"] == pytest.approx(10)
    assert found["breath_ns"] == pytest.approx(190)
    (workers,) = [line for line in model.predictions(found)
                  if (line["kind"], line["direction"]) == ("workers", "down")]  # fmt: skip
    assert workers["gbit_s"][1] == pytest.approx(2 * workers["gbit_s"][0]) == pytest.approx(16 / 3)
    packets = model.packet_rates(found)
    assert packets["datagrams of 64 bytes, guest to host"][0] == pytest.approx(2000 / 3e6)
    assert packets["frames dropped, 64 a breath"][1] == pytest.approx(2 * 64 / 0.83)
    assert "predicted 4.0, measured 4.0 Gbit/s" in " ".join(model.check(made))
    made["machine"]["cores"] = 4
    assert "predicted 8.0, measured 4.0 Gbit/s" in " ".join(model.check(made))


def test_committed_documents_show_the_committed_result() -> None:
    """README's lines, docs/performance.md and docs/sweep.md are made from them."""
    readme = (ROOT / "README.md").read_text()
    committed = json.loads(performance.RESULT.read_text())
    assert table.text(committed) in readme, "run python -m benchmarks.table"
    made = performance.document(copy.deepcopy(committed), performance.NOTES.read_text())
    assert performance.DOCUMENT.read_text() == made, "run python -m benchmarks.performance"
    swept = performance.sweep(json.loads(performance.SWEEP_RESULT.read_text()))
    assert performance.SWEEP.read_text() == swept, "the same"


def test_every_note_has_goals() -> None:
    topics = {goal.topic for goal in goals.GOALS}
    assert set(performance.notes(performance.NOTES.read_text())) <= topics
