"""Two hosts on this machine: each with its own network, hostname, processes, disk for code, data and output,
home, and SSH server. A cable joins them, and can be cut."""

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT

ROOT = Path(__file__).resolve().parents[2]
DISK = Path("/srv")  # where each host sees a disk of its own
NAMESPACES = ("--mount", "--uts", "--net", "--pid", "--ipc")
NAMES = ("host-a", "host-b")
CABLE = "eth0"
ENVIRONMENT = {
    "HOME": f"{DISK}/home",
    "TMPDIR": f"{DISK}/tmp",
    "XDG_CACHE_HOME": f"{DISK}/cache",
    "PYTHONPATH": f"{DISK}/checkout",
    "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
}
SET_UP = """
set -e
hostname {name}
mkdir -p /run/sshd ~/.ssh
mount --bind {own} {disk}
mount --bind {own}/home/.ssh ~/.ssh
mount --bind {own}/hosts /etc/hosts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs {code}
ip link set lo up
touch {own}/ready
while :; do sleep 1 & wait; done
"""


def why_not() -> str:
    """What this machine lacks for two hosts; "" if nothing."""
    if missing := [
        name for name in ("unshare", "nsenter", "setpriv", "ip", "mount") if not shutil.which(name)
    ]:
        return f"no {' and '.join(missing)} on this machine"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True)
    return f"namespaces are not permitted ({tried.stderr.strip()})" if tried.returncode else ""


@dataclass
class Host:
    """One of the two: `disk` is its disk as this process sees it, `address` that of its end of the cable."""

    name: str
    disk: Path
    address: str
    holder: subprocess.Popen | None = None
    pid: int = 0  # of its first process

    def start(self, *command: object, **environment: object) -> subprocess.Popen[str]:
        """Starts a command in the host's folder `work`; all that it prints can be read."""
        inside = ["nsenter", "--target", self.pid, *NAMESPACES, f"--wd={self.disk}/work"]
        settings = ENVIRONMENT | {name: str(value) for name, value in environment.items()}
        return subprocess.Popen(
            [*map(str, inside), "env", "-C", f"{DISK}/work", *map(str, command)],
            stdout=PIPE,
            stderr=STDOUT,
            text=True,
            errors="replace",
            env=settings,
            start_new_session=True,
        )

    def run(self, *command: object) -> str:
        process = self.start(*command)
        output = process.communicate()[0]
        if process.returncode:
            raise RuntimeError(f"{self.name}: {shlex.join(map(str, command))}: {output}")
        return output

    def processes(self) -> list[str]:
        """The commands of Python that run on this host."""
        listed = self.run("ps", "-eo", "stat=,args=").splitlines()
        return [line for line in listed if "python" in line and not line.startswith("Z")]

    def kill_all(self) -> None:
        for line in self.run("ps", "-eo", "pid=,args=").splitlines():
            if "python" in line:
                with suppress(RuntimeError):
                    self.run("kill", "-KILL", line.split()[0])

    def cut(self) -> None:
        self.run("ip", "link", "set", CABLE, "down")

    def mend(self) -> None:
        self.run("ip", "link", "set", CABLE, "up")


@contextmanager
def two_hosts(folder: Path) -> Iterator[list[Host]]:
    """The hosts, with the disks `folder`/host-a and `folder`/host-b and a checkout of this code on each."""
    hosts = [Host(name, folder / name, f"10.77.0.{number}") for number, name in enumerate(NAMES, start=1)]
    names = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts)
    try:
        for host in hosts:
            for name in ("home/.ssh", "tmp", "cache", "work"):
                (host.disk / name).mkdir(parents=True)
            (host.disk / "hosts").write_text(names)
            copy_checkout(host.disk / "checkout")
            begin(host)
        first, second = hosts
        ends = ["name", CABLE, "netns", str(first.pid), "type", "veth"]
        check("ip", "link", "add", *ends, "peer", "name", CABLE, "netns", str(second.pid))
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", CABLE)
            host.mend()
        yield hosts
    finally:
        for host in hosts:
            if host.holder:
                host.holder.kill()  # and with it all processes of the host
                host.holder.wait()


def begin(host: Host) -> None:
    script = SET_UP.format(name=host.name, own=host.disk, disk=DISK, code=ROOT / "mmvit")
    alone = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", script]
    host.holder = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *alone])  # it ends with this process
    while not (host.disk / "ready").exists():
        if host.holder.poll() is not None:
            raise RuntimeError(f"{host.name} could not be set up")
        time.sleep(0.05)
    children = Path(f"/proc/{host.holder.pid}/task/{host.holder.pid}/children").read_text()
    host.pid = int(children.split()[0])


def copy_checkout(to: Path) -> None:
    """Copies the files of this checkout that git knows or would know."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def serve_ssh(hosts: list[Host]) -> None:
    """Lets each host log in to the other without a password, with keys of their own."""
    keys = hosts[0].disk / "key"
    check("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys))
    for host in hosts:
        own = host.disk / "home" / ".ssh"
        own.chmod(0o700)
        for name in ("id_ed25519", "host_key"):
            shutil.copy(keys, own / name)
            (own / name).chmod(0o600)
        public = keys.with_suffix(".pub").read_text()
        (own / "authorized_keys").write_text(public)
        (own / "known_hosts").write_text("".join(f"{each.name} {public}" for each in hosts))
        server = ["/usr/sbin/sshd", "-f", "/dev/null", "-h", f"{DISK}/home/.ssh/host_key"]
        options = ["StrictModes=no", "UsePAM=no", "PermitRootLogin=yes", "PidFile=none"]
        host.run(*server, *[word for option in options for word in ("-o", option)])


def check(*command: str) -> None:
    subprocess.run(command, check=True)
