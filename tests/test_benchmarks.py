"""What becomes of a benchmark's result: tables, comparisons, pictures. Nothing is measured here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as bench
from benchmarks import compare, plot, table

ROOT = Path(__file__).resolve().parent.parent


def runs(backend: str, factor: float) -> list[dict[str, Any]]:
    """Five runs each of two loads, as one_series gives them."""
    common = {"backend": backend, "queues": 4, "workers": 2, "mtu": 1500}
    tcp = {"load": "tcp", "amount": 8, "direction": "up"}
    request = {"load": "rr", "amount": 1, "direction": "both"}
    made = []
    for number in range(5):
        said = {"bytes": factor * (number + 1) * 1e9, "seconds": 2.0}
        made.append(common | tcp | bench.rates(said, used_s=1.0))
        said = {"transactions": 1000, "seconds": 2.0, "p50_us": 100.0 + number, "p99_us": 200.0}
        made.append(common | request | bench.rates(said, used_s=factor))
    return made


def result(factor: float) -> dict[str, Any]:
    rows = bench.summary(runs("vhostmq", factor) + runs("passt", 1.0))
    return {
        "machine": {"cpu": "a", "cores": 1},
        "throughput": [row for row in rows if row["load"] == "tcp"],
        "transactions": [row for row in rows if row["load"] == "rr"],
        "pairs": rows,
    }


def test_rates() -> None:
    found = bench.rates({"bytes": 5e9, "seconds": 2.0}, 0.5)
    assert found == {"gbit_s": 20.0, "cpu_s_per_gb": 0.1}
    found = bench.rates({"datagrams": 1000, "seconds": 2.0}, 0.5)
    assert found == {"per_s": 500.0, "cpu_us_each": 500.0}
    assert bench.rates({"bytes": 0, "seconds": 2.0}, 0.5)["cpu_s_per_gb"] is None


def test_summary_is_median_and_range() -> None:
    row = result(2.0)["throughput"][0]
    assert row["gbit_s"] == {"median": 24.0, "min": 8.0, "max": 40.0}
    assert (row["backend"], row["queues"], row["direction"]) == ("vhostmq", 4, "up")


def test_tables() -> None:
    made = result(2.0)
    (line,) = table.throughput(made["throughput"])[2:]
    assert line.startswith("| 1500 | 8 | guest to host | 24.0 (8.0-40.0) | 12.0 (4.0-20.0) |")
    (line,) = table.each(made["transactions"])[2:]
    assert line.startswith("| request/response |  | 500 (500-500) | 500 (500-500) | 2000.0 ")
    assert line.endswith("| 102, 200 | 102, 200 |")


def test_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ratio of medians, and a word where it may be noise or another machine."""
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, made in zip(paths, (result(1.0), result(1.5)), strict=True):
        path.write_text(json.dumps(made))
    other = json.loads(paths[1].read_text())
    other["machine"]["cores"] = 2
    paths[1].write_text(json.dumps(other))
    monkeypatch.setattr("sys.argv", ["compare", *map(str, paths)])
    compare.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "warning: cores differs: 1 and 2"
    (moved,) = [line for line in lines if "vhostmq 4 2 1500 tcp 8 up gbit_s" in line][:1]
    assert "12 (4-20)" in moved and "18 (6-30)" in moved and moved.endswith("1.50  ranges overlap")
    (cpu,) = [line for line in lines if "vhostmq 4 2 1500 rr 1 both cpu_us_each" in line][:1]
    assert cpu.endswith("  1.50"), "ranges that lie apart are not noise"


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "result.json").write_text(json.dumps(result(2.0)))
    monkeypatch.setattr("sys.argv", ["plot", str(tmp_path / "result.json"), str(tmp_path / "out")])
    plot.main()
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(names) == 12 and all(name.endswith((".png", ".svg")) for name in names)
    assert all(path.stat().st_size > 5000 for path in (tmp_path / "out").glob("*.png"))


def test_readme_shows_the_committed_result() -> None:
    """Every table line of README's numbers is made from benchmarks/results.json."""
    readme = (ROOT / "README.md").read_text()
    committed = json.loads((ROOT / "benchmarks/results.json").read_text())
    lines = table.throughput(committed["throughput"])
    lines += table.each(committed["datagrams"] + committed["transactions"])
    missing = [line for line in lines if line not in readme]
    assert not missing, missing
