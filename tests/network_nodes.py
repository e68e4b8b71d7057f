"""Machines of one cluster on this one: network namespaces on a bridge, which a bucket server listens at too."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NETWORK = "10.213.77"
BRIDGE, HERE = "qs-bridge", f"{NETWORK}.1"


def missing() -> str:
    """Why no network namespaces are made here; empty if they are."""
    if os.geteuid():
        return "network namespaces need the rights of root"
    if not shutil.which("ip"):
        return "no ip, which Debian's iproute2 brings"
    made = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return f"no network namespaces here: {made.stderr.strip()}" if made.returncode else ""


def ip(*words: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert not check or done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


@dataclass
class Node:
    """A machine with a network, and names of its own; what runs there sees only the environment it is given."""

    number: int
    hosts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = f"qs-{uuid.uuid4().hex[:6]}-{self.number}"
        self.link = self.name[:13]
        self.address = f"{NETWORK}.{10 + self.number}"
        self.files = Path("/etc/netns") / self.name

    def make(self) -> None:
        ip("netns", "add", self.name)
        ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", self.link, "master", BRIDGE, "up")
        for words in (["link", "set", "lo", "up"], ["addr", "add", f"{self.address}/24", "dev", "eth0"]):
            ip("-n", self.name, *words)
        ip("-n", self.name, "link", "set", "eth0", "up")

    def cut_off(self) -> None:
        """No packet leaves or comes, and nobody is told."""
        ip("link", "set", self.link, "down")

    def back(self) -> None:
        ip("link", "set", self.link, "up")

    def knows(self, hosts: Mapping[str, str]) -> None:
        """/etc/hosts, which `ip netns exec` mounts."""
        self.files.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in hosts.items())]
        (self.files / "hosts").write_text("\n".join(lines) + "\n")

    def start(self, args: Sequence[str], env: Mapping[str, str], cwd: Path) -> Running:
        cwd.mkdir(parents=True, exist_ok=True)
        command = ["ip", "netns", "exec", self.name, sys.executable, str(ROOT / "entrypoint.py"), *args]
        process = subprocess.Popen(command, env=dict(env), cwd=cwd, stderr=subprocess.PIPE, text=True)
        return Running(process)

    def remove(self) -> None:
        ip("netns", "del", self.name, check=False)
        ip("link", "del", self.link, check=False)
        shutil.rmtree(self.files, ignore_errors=True)


class Running:
    """A command, and what it has said so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said = ""
        self.news = threading.Condition()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            with self.news:
                self.said += line
                self.news.notify_all()

    def wait_for(self, text: str, seconds: float = 1200) -> None:
        with self.news:
            assert self.news.wait_for(lambda: text in self.said, seconds), f"never said {text!r}:\n{self.said}"

    def code(self, seconds: float = 1800) -> int:
        code = self.process.wait(seconds)
        self.reader.join(10)
        return code


@contextmanager
def cluster(count: int) -> Iterator[list[Node]]:
    nodes = [Node(number) for number in range(count)]
    with Path("/run/lock", BRIDGE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test run on this machine has the same addresses
        ip("link", "del", BRIDGE, check=False)
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{HERE}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        try:
            for node in nodes:
                node.make()
            yield nodes
        finally:
            for node in nodes:
                node.remove()
            ip("link", "del", BRIDGE, check=False)


def free_port() -> int:
    with socket.create_server((HERE, 0)) as probe:
        return int(probe.getsockname()[1])
