"""Hosts for tests: network namespaces joined by a bridge, where the machine allows it; else all of them are this one."""

import os
import subprocess
from pathlib import Path


def ip(*arguments, check=True):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=check)


class Hosts:
    """`node-0`, `node-1`, ... Use as a context."""

    def __init__(self, count, family=4):
        """family: 6 for hosts that have no IPv4 address but 127.0.0.1. Each knows itself as 127.0.1.1, as on Debian."""
        self.tag, self.count, self.family = f"eq{os.getpid() % 10000}{family}", count, family
        try:
            ip("link", "add", self.tag, "type", "bridge")
            self.apart = True
        except (OSError, subprocess.CalledProcessError):
            self.apart = False

    def __enter__(self):
        if self.apart:
            ip("link", "set", self.tag, "up")
        for number in range(self.count if self.apart else 0):
            name, outer = self.name(number), self.outer(number)
            ip("netns", "add", name)
            ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", outer, "master", self.tag)
            ip("link", "set", outer, "up")
            address = f"{self.address(number)}/{24 if self.family == 4 else 64}"
            ip("-n", name, "address", "add", address, "dev", "eth0", *(["nodad"] if self.family == 6 else []))
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")
            self.resolve(number, range(self.count))
        return self

    def __exit__(self, *_):
        for number in range(self.count if self.apart else 0):
            ip("netns", "delete", self.name(number), check=False)
            ip("link", "delete", self.outer(number), check=False)
            hosts = self._hosts(number)
            hosts.unlink(missing_ok=True)
            hosts.parent.rmdir()
        if self.apart:
            ip("link", "delete", self.tag, check=False)

    def name(self, number):
        return f"{self.tag}-{number}"

    def outer(self, number):
        return f"{self.tag}v{number}"

    def address(self, number):
        if not self.apart:
            return "127.0.0.1"
        return f"10.213.7.{number + 1}" if self.family == 4 else f"fd00:213:7::{number + 1}"

    def on(self, number, command):
        """The command, to be run on a host."""
        return ["ip", "netns", "exec", self.name(number), *command] if self.apart else command

    def cut(self, number):
        """From the network."""
        ip("link", "set", self.outer(number), "down")

    def join(self, number):
        ip("link", "set", self.outer(number), "up")

    def resolve(self, number, known):
        """The names that a host can resolve."""
        path = self._hosts(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:  # the same file, since it is mounted over /etc/hosts
            own = "127.0.1.1" if self.family == 4 else "::1"
            file.write("127.0.0.1 localhost\n::1 localhost\n")
            file.write("".join(f"{own if k == number else self.address(k)} node-{k}\n" for k in known))

    def _hosts(self, number):
        return Path("/etc/netns") / self.name(number) / "hosts"
