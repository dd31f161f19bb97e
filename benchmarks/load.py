"""load.py - the guest's part of a throughput series: iperf3 to the host, one JSON line per event.

Usage       python -m benchmarks.load RUNS SECONDS STREAMS, inside `vhostmq guest`.
Output      {"event": "begin"} before each run, {"event": "end", ...} after it: the host reads its
            back-end's processor time at both. {"event": "failed", ...} when the connection broke.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from benchmarks.demo_guest import gateway

LIMIT_S = 20


def run(host: str, direction: str, seconds: int, streams: int) -> dict[str, object]:
    """One iperf3 run; bytes the receiver got and how long that took."""
    command = ["iperf3", "-c", host, "-t", str(seconds), "-P", str(streams), "-J"]
    if direction == "down":
        command.append("-R")
    for _ in range(20):
        try:
            done = subprocess.run(command, capture_output=True, timeout=LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            return {"event": "failed", "direction": direction, "error": f"stuck for {LIMIT_S} s"}
        result = json.loads(done.stdout)
        if "busy" not in result.get("error", ""):
            break
        time.sleep(0.5)  # the server has not finished with the run before
    if "error" in result:
        return {"event": "failed", "direction": direction, "error": result["error"]}
    received = result["end"]["sum_received"]
    return {
        "event": "end",
        "direction": direction,
        "bytes": received["bytes"],
        "seconds": received["seconds"],
    }


def main() -> None:
    """All runs of a series."""
    runs, seconds, streams = (int(word) for word in sys.argv[1:])
    host = gateway()
    for _ in range(runs):
        for direction in ("up", "down"):
            print(json.dumps({"event": "begin"}), flush=True)
            print(json.dumps(run(host, direction, seconds, streams)), flush=True)


if __name__ == "__main__":
    main()
