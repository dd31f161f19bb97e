"""memory.py - what a flow costs in memory: all workers and control, with as many flows as
descriptors allow and with few.

Theory      PSS counts shared pages once, however many workers have them. A few flows first: what
            every worker touches once, its code above all, is not the flows'.
Limits      A back-end of its own: pages of the table stay after their flows. The kernel's sockets
            are not counted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks import cases, lab, measure, series

FLOWS_BEFORE = 10 * cases.FLOW_PROCESSES


def per_flow(how: series.How) -> dict[str, Any]:
    """Megabytes with few and with many flows, and bytes for each."""
    setup, flows = cases.many_flows(), cases.affordable_flows()[-1]
    with series.served(), lab.Lab() as room:
        bench = series.Bench(setup, replace(how, seconds=1), room, lab.METRICS_PORT)
        sizes = [with_flows(bench, number) for number in (FLOWS_BEFORE, flows)]
        bench.inside.close()
    found = {
        "workers": setup.workers,
        "flows_before": FLOWS_BEFORE,
        "before_mb": sizes[0],
        "flows": flows,
        "open_mb": sizes[1],
        "bytes_per_flow": (sizes[1] - sizes[0]) * 2**20 / (flows - FLOWS_BEFORE),
    }
    print("memory of flows:", found, flush=True)
    return found


def with_flows(bench: series.Bench, number: int) -> float:
    """MB of the back-end while so many are open."""
    assert bench.back_end is not None
    pid, sizes = bench.back_end.pid, list[float]()

    def heard(said: bytes) -> None:
        if b"open" in said and not sizes:
            sizes.append(sum(measure.memory_mb(one)["pss_mb"] for one in measure.tree(pid)))

    bench.run(("rr", number), "both", heard)
    if not sizes:
        raise lab.LabError("load.c did not say when its connections were open")
    return sizes[0]
