"""dpdk_guest.py - a guest without a kernel: DPDK's virtio-user with a tap behind it.

Theory      testpmd carries frames between virtio-user and a tap, and a network namespace with that
            tap is "the guest".
Why so      --single-file-segments: vhost-user has room for 8 regions.
"""

from __future__ import annotations

from pathlib import Path

from lab import Lab

from benchmarks.guest.guests import GUEST_MAC, Guest, GuestError, Result
from benchmarks.guest.prepare import Images
from benchmarks.lab import LabError


class DpdkGuest(Guest):
    """testpmd forwarding between virtio-user and a tap in a namespace of its own."""

    interface = "dtap0"
    role = "dpdk"

    def __init__(
        self,
        lab: Lab,
        images: Images,
        vhost_socket: Path,
        queues: int,
        packed: bool,
        in_order: bool,
    ) -> None:
        super().__init__(lab, images, vhost_socket)
        self.queues = queues
        self.rings = f"packed_vq={int(packed)},in_order={int(in_order)}"
        self.scratch = str(lab.directory)
        self.udhcpc_event = str(images.udhcpc_event)

    def start(self) -> None:
        """Start testpmd (root: it takes huge pages and makes a tap) and wait for the tap."""
        self.lab.add_namespace(self.role)
        net = f"net_virtio_user0,path={self.vhost_socket},mac={GUEST_MAC},queues={self.queues}"
        net += f",{self.rings}"
        command = [
            *("stdbuf", "-oL", "dpdk-testpmd", "-l", "0,1", "--no-pci", "--no-telemetry"),
            "--log-level=pmd.net.virtio.init:debug",
            *("--in-memory", "--single-file-segments", "-m", "256", f"--vdev={net}"),
            f"--vdev=net_tap0,iface={self.interface},mac=52:54:00:12:34:58",
            *("--", "--total-num-mbufs=16384", "--forward-mode=io", "--auto-start", "--no-numa"),
            *(f"--rxq={self.queues}", f"--txq={self.queues}", "--stats-period=60"),
        ]
        self.process = self.lab.start(self.role, command, "testpmd")
        self.process.wait_for(self._tap_is_there, "tap", 30)

    def _tap_is_there(self) -> bool:
        return not self.run(f"ip link show {self.interface}").status

    def run(self, command: str, timeout_s: float = 20) -> Result:
        """Run a shell command where the tap is, with the guests' programs."""
        path = f"PATH={self.images.bin}:/usr/sbin:/usr/bin:/sbin:/bin"
        argv = ["env", path, "KEEP_MTU=1", "sh", "-c", command]
        try:
            done = self.lab.run(self.role, argv, timeout_s=timeout_s, check=False)
        except LabError as error:
            raise GuestError(str(error)) from error
        return Result(done.returncode, done.stdout)

    def kill(self) -> None:
        super().kill()
        self.lab.remove_namespace(self.role)

    def close(self) -> None:
        super().close()
        self.lab.remove_namespace(self.role)
