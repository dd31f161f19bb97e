"""prepare.py - what real guests need from the machine, and their images.

Theory      Everything that needs root or the network happens here, once: Debian packages, an
            ordinary user for the programs under test, huge pages for DPDK. Then the guests' images
            are built into build/system/ of the checkout: a Debian kernel (downloaded and unpacked,
            never installed), `xfer` and `load` (static), one initramfs for QEMU and one for
            User-Mode Linux. Both hold the same small tree: busybox, ethtool, iperf3, xfer, load,
            `guest_init.sh` and the modules that reach the network card. System tests and benchmarks
            share all of it.
Reuse       A digest of every input is kept beside the images; while it stands, nothing is rebuilt.
            Remove build/system/ to fetch a newer kernel.
Limits      Debian or Ubuntu on x86-64; packages come from the sources that apt has configured.

Run it as root (`python -m benchmarks.guest.prepare`); the test session and the benchmarks run it as
well.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import pwd
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "system"

PACKAGES = (
    "busybox-static",
    "cpio",
    "dpdk-dev",
    "ethtool",
    "gcc",
    "iperf3",
    "iproute2",
    "iputils-ping",
    "kmod",
    "libc6-dev",
    "libseccomp2",
    "qemu-system-x86",
    "user-mode-linux",
    "util-linux",
)
KERNEL_PACKAGE = "linux-image-amd64"
XZ_MAGIC = b"\xfd7zXZ\x00"
UML_MODULES = Path("/usr/lib/uml/modules")
ORDINARY_USER = "vhostmq-test"
DPDK_HUGE_PAGES = 128  # of 2 MiB, what testpmd takes with -m 256
HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")

GUEST_PROGRAMS = ("ethtool", "iperf3")
GUEST_SOURCES = ("guest_init.sh", "udhcpc_event.sh", "xfer.c", "sha256.h", "load.c", "load_rr.h")
BUILT_PROGRAMS = ("xfer", "load")
QEMU_GUEST_MODULES = ("virtio_pci", "virtio_console", "virtio_net")
UML_GUEST_MODULES = ("ipv6", "virtio_net")


class PrepareError(Exception):
    """The machine cannot run real guests; the message says what is missing."""


@dataclass(frozen=True)
class Images:
    """Where the built things are."""

    kernel: Path  # for QEMU
    qemu_initramfs: Path
    uml_initramfs: Path
    bin: Path  # the guests' /bin, usable on the host as well: busybox's applets, xfer, load
    udhcpc_event: Path


def ordinary_user() -> pwd.struct_passwd:
    """Who runs the programs under test: the caller of sudo, else the account made for it."""
    caller_uid = int(os.environ.get("SUDO_UID", "0"))
    return pwd.getpwuid(caller_uid) if caller_uid else pwd.getpwnam(ORDINARY_USER)


def prepare() -> Images:
    """Bring the machine and build/system/ up to date; cheap when they are. Root only."""
    if os.geteuid() != 0:
        raise PrepareError("real guests are prepared by root (sudo)")
    install_packages()
    make_user()
    reserve_huge_pages()
    BUILD.mkdir(parents=True, exist_ok=True)
    kernel_tree = fetch_kernel()
    return build_images(kernel_tree)


def install_packages() -> None:
    """Install those of PACKAGES that are missing."""
    missing = [name for name in PACKAGES if not installed(name)]
    if missing:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        output_of("apt-get", "update", timeout_s=300)
        command = ("apt-get", "install", "--yes", "--no-install-recommends", *missing)
        output_of(*command, timeout_s=900, env=environment)


def installed(package: str) -> bool:
    """Whether dpkg has the package configured."""
    command = ["dpkg-query", "-W", "-f=${db:Status-Status}", package]
    return subprocess.run(command, capture_output=True, text=True).stdout == "installed"


def make_user() -> None:
    """Make the account that runs the back-end when nobody called sudo."""
    try:
        ordinary_user()
    except KeyError:
        output_of("useradd", "--system", "--create-home", "--shell", "/bin/sh", ORDINARY_USER)


def reserve_huge_pages() -> None:
    """Ask for the pages that DPDK lacks. Getting fewer is its test's to notice."""
    missing = DPDK_HUGE_PAGES - free_huge_pages()
    if missing > 0 and HUGE_PAGES.exists():
        reserved = HUGE_PAGES / "nr_hugepages"
        reserved.write_text(str(int(reserved.read_text()) + missing))


def free_huge_pages() -> int:
    """Huge pages of 2 MiB that nobody uses."""
    free = HUGE_PAGES / "free_hugepages"
    return int(free.read_text()) if free.exists() else 0


def fetch_kernel() -> Path:
    """Unpack Debian's kernel package under build/system/kernel and return that folder."""
    tree = BUILD / "kernel"
    if not tree.exists():
        unpacked = BUILD / "kernel.new"
        shutil.rmtree(unpacked, ignore_errors=True)
        unpacked.mkdir()
        output_of("apt-get", "update", timeout_s=300)
        depends = output_of("apt-cache", "depends", KERNEL_PACKAGE)
        images = [word for word in depends.split() if word.startswith("linux-image-")]
        package = next(name for name in images if name != KERNEL_PACKAGE)
        output_of("apt-get", "download", package, cwd=unpacked, timeout_s=600)
        (archive,) = unpacked.glob("*.deb")
        output_of("dpkg-deb", "-x", archive, unpacked, timeout_s=300)
        archive.unlink()
        (modules,) = (unpacked / "lib/modules").iterdir()
        output_of("depmod", "-b", unpacked, modules.name)
        unpacked.rename(tree)
    return tree


def build_images(kernel_tree: Path) -> Images:
    """Build the programs and both initramfs unless the digest of their inputs is the one kept."""
    (packed_kernel,) = (kernel_tree / "boot").glob("vmlinuz-*")
    version = packed_kernel.name.removeprefix("vmlinuz-")
    images = Images(
        kernel=BUILD / "vmlinux",
        qemu_initramfs=BUILD / "qemu.cpio",
        uml_initramfs=BUILD / "uml.cpio",
        bin=BUILD / "root/bin",
        udhcpc_event=BUILD / "root/udhcpc_event.sh",
    )
    (uml_modules,) = UML_MODULES.iterdir()
    stamp = BUILD / "inputs.sha256"
    digest = digest_of_inputs(version, uml_modules.name)
    if stamp.exists() and stamp.read_text() == digest:
        return images
    stamp.unlink(missing_ok=True)
    images.kernel.write_bytes(unpacked(packed_kernel.read_bytes()))
    root = build_root()
    modules = {
        images.qemu_initramfs: module_files(kernel_tree, version, QEMU_GUEST_MODULES),
        images.uml_initramfs: uml_module_files(uml_modules),
    }
    for archive, files in modules.items():
        pack(root, files, archive)
    stamp.write_text(digest)
    return images


def digest_of_inputs(*versions: str) -> str:
    """A digest that changes when a source, this file, a program or a kernel does."""
    digest = hashlib.sha256(repr(versions).encode())
    programs = [Path(located(name)) for name in ("busybox", *GUEST_PROGRAMS)]
    for file in [Path(__file__), *(HERE / name for name in GUEST_SOURCES), *programs]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def unpacked(image: bytes) -> bytes:
    """The ELF kernel in a bzImage that holds it in xz, else the bzImage: QEMU boots either (PVH).

    It saves an emulated CPU the unpacking, which is half of the time to boot.
    """
    start = image.find(XZ_MAGIC)
    elf = lzma.LZMADecompressor().decompress(image[start:]) if start >= 0 else b""
    return elf if elf.startswith(b"\x7fELF") else image


def build_root() -> Path:
    """The tree common to both guests: /init, /bin with its libraries."""
    root = BUILD / "root"
    shutil.rmtree(root, ignore_errors=True)
    for folder in ("bin", "dev", "proc", "sys", "tmp"):
        (root / folder).mkdir(parents=True)
    busybox = located("busybox")
    shutil.copy(busybox, root / "bin/busybox")
    for applet in output_of(busybox, "--list").split():
        if applet not in ("busybox", *GUEST_PROGRAMS):
            (root / "bin" / applet).symlink_to("busybox")
    for name in GUEST_PROGRAMS:
        copy_program(located(name), root)
    for name in BUILT_PROGRAMS:
        build_program(name, root / "bin")
    shutil.copy(HERE / "guest_init.sh", root / "init")
    shutil.copy(HERE / "udhcpc_event.sh", root / "udhcpc_event.sh")
    for script in (root / "init", root / "udhcpc_event.sh"):
        script.chmod(0o755)
    return root


def build_program(name: str, folder: Path) -> Path:
    """Compile one of BUILT_PROGRAMS, static, into a folder."""
    compiler = ("gcc", "-O2", "-static", "-Wall", "-Wextra")
    output_of(*compiler, "-o", folder / name, HERE / f"{name}.c", timeout_s=120)
    return folder / name


def copy_program(program: str, root: Path) -> None:
    """Copy a program into /bin and each shared library it needs to the same path in the tree."""
    shutil.copy(program, root / "bin")
    for word in output_of("ldd", program).split():
        if word.startswith("/"):
            copied = root / word[1:]
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(word, copied)


def module_files(tree: Path, version: str, names: tuple[str, ...]) -> list[Path]:
    """The files of the named modules and all they depend on, in the order to insert them."""
    files: dict[Path, None] = {}
    for name in names:
        listing = output_of("modprobe", "-d", tree, "-S", version, "--show-depends", name)
        for line in listing.splitlines():
            verb, _, file = line.partition(" ")
            if verb == "insmod":
                files[Path(file.strip())] = None
    return list(files)


def uml_module_files(modules: Path) -> list[Path]:
    """The same for User-Mode Linux, whose modules are not under /lib/modules."""
    tree = BUILD / "uml"
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "lib/modules").mkdir(parents=True)
    (tree / "lib/modules" / modules.name).symlink_to(modules)
    return module_files(tree, modules.name, UML_GUEST_MODULES)


def pack(root: Path, modules: list[Path], archive: Path) -> None:
    """Write an initramfs of the tree and these modules. Uncompressed: an emulated CPU is slow."""
    folder = root / "modules"
    folder.mkdir()
    for module in modules:
        shutil.copy(module, folder / module.name)
    order = "".join(f"/modules/{module.name}\n" for module in modules)
    (root / "modules.order").write_text(order)
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    listing = "\n".join(names).encode()
    command = ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0", "-F", str(archive)]
    subprocess.run(command, input=listing, cwd=root, check=True, timeout=60)
    shutil.rmtree(folder)


def located(program: str) -> str:
    """The path of an installed program (ordinary users' PATH often lacks /usr/sbin)."""
    path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if path is None:
        raise PrepareError(f"{program} is not installed")
    return path


def output_of(
    *command: str | Path,
    timeout_s: float = 60,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> str:
    """Standard output of a command; PrepareError with what it printed if it fails."""
    argv = [str(word) for word in command]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=timeout_s, cwd=cwd, env=env
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PrepareError(f"{' '.join(argv)}: {error}") from error
    if done.returncode:
        raise PrepareError(f"{' '.join(argv)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    try:
        print(prepare())
    except PrepareError as error:
        sys.exit(f"prepare: {error}")
