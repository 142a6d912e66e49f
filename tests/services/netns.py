"""Two machines in one: network namespaces with a cable between them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Nodes:
    """Two hosts that see each other and nothing else. Raises CalledProcessError where a command fails."""

    names: tuple[str, str]
    addresses: tuple[str, str]
    links: tuple[str, str]

    def start(self, node: int, command: list[str], **options: object) -> subprocess.Popen[str]:
        """The command on that host, in a process group of its own."""
        words = ["ip", "netns", "exec", self.names[node], *command]
        return subprocess.Popen(words, start_new_session=True, text=True, **options)  # type: ignore[call-overload, no-any-return]

    def cut(self) -> None:
        """Pull the cable: packets vanish, no connection is told."""
        subprocess.run(["ip", "-n", self.names[1], "link", "set", self.links[1], "down"], check=True)


def why_not() -> str | None:
    """Why there can be no namespaces here, or None."""
    if shutil.which("ip") is None:
        return "needs the command ip (iproute2)"
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"needs the right to make network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@contextlib.contextmanager
def two_nodes() -> Iterator[Nodes]:
    mark = os.getpid() % 100_000
    names, links = (f"a{mark}", f"b{mark}"), (f"va{mark}", f"vb{mark}")
    addresses = ("10.77.0.1", "10.77.0.2")

    def run(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for name in names:
            run("netns", "add", name)
            run("-n", name, "link", "set", "lo", "up")
            # give up an answer that does not come after seconds, not after the kernel's quarter of an hour
            run("netns", "exec", name, "sysctl", "-q", "-w", "net.ipv4.tcp_retries2=6")
        run("link", "add", links[0], "netns", names[0], "type", "veth", "peer", "name", links[1], "netns", names[1])
        for name, link, address in zip(names, links, addresses, strict=True):
            run("-n", name, "addr", "add", f"{address}/24", "dev", link)
            run("-n", name, "link", "set", link, "up")
        yield Nodes(names, addresses, links)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)
