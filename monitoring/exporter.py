"""Serves to Prometheus what the processes of a node tell of themselves (board.py).

It lives in the node's program, or, where there is none, in a process of its own: workers come and go under it. Counters are
sums over all processes that there were, so that they never go back; the other numbers are of those that live.

    python -m monitoring.exporter --folder FOLDER --run NAME --port 9108
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from monitoring.board import Key, started, write
from monitoring.metrics import COUNTER, GAUGE, HISTOGRAM, METRICS, STEP_SECONDS

PORT = 9108
FOLDER = "EQUIAV_METRICS"  # environment variable: where the processes of a node write, if their launcher serves it
KEPT = 8  # files of processes that have ended, before they become one
AT_ONCE = 16  # connections; of more, one is closed: the oldest of who has most
FRESH = 0.5  # seconds for which an answer is given again
LONGEST = 100  # characters of a label's value
MOST_VALUES = 20  # of a label that data can fill
SCRAPES = 2  # after the end, of each who asks
ONCE, LEAST = 16.0, 5.0  # seconds between two scrapes of who has asked once; that anybody is waited for
SELDOM, MOST = 60.0, 75.0  # seconds between two scrapes of who is not waited for; that anybody is waited for, at most
REQUEST = 10.0  # seconds for all of a request


class Told(NamedTuple):
    """What a process has told."""

    path: Path
    began: float  # seconds since the machine was started
    ended: float  # as well; 0: it has not said so
    alive: bool
    values: dict[Key, Any]


class Scrapes(NamedTuple):
    """Of one who asks."""

    number: int
    last: float  # time.monotonic()
    interval: float  # seconds; 0: there was one only


class Exporter:
    """Reads the files of a folder, whose processes are all of this machine."""

    def __init__(self, folder: Path, run: str):
        self.folder, self.run = folder, plain(run)
        self._lock, self._answer, self._until = threading.Lock(), b"", 0.0
        self._registry = CollectorRegistry()
        self._registry.register(self)  # type: ignore[arg-type]

    def answer(self) -> bytes:
        with self._lock:
            if time.monotonic() > self._until:
                self._answer = generate_latest(self._registry)
                self._until = time.monotonic() + FRESH
            return self._answer

    def alive(self) -> bool:
        """Whether any process that writes here lives."""
        return any(told.alive for told in self._told())

    def values(self) -> dict[Key, Any]:
        """What is to be served."""
        everyone = self._told()
        last = max((told.began for told in everyone), default=0.0)
        here = {role(told.path) for told in everyone if told.alive}
        # What has ended is to be seen until somebody begins, and never beside who has its place.
        shown = [told for told in everyone if told.alive or (told.ended > last and role(told.path) not in here)]
        sums: dict[Key, Any] = defaultdict(float) | self._before(everyone)
        found: dict[Key, Any] = {}
        for told in everyone:
            for key, value in told.values.items():
                if KINDS.get(key[0]) in (COUNTER, HISTOGRAM):
                    sums[key] = added(sums[key], value)
        for told in shown:
            found |= {key: sums.get(key, value) for key, value in told.values.items()}
        # A rank that no longer lives here is told by another node, or by none.
        return found | {key: value for key, value in sums.items() if not RANKED[key[0]]}

    def collect(self) -> Iterator[Any]:
        """As prometheus_client wants it."""
        by_name: dict[str, list[tuple[tuple[str, ...], Any]]] = defaultdict(list)
        for (name, labels), value in sorted(self.values().items()):
            if len(by_name[name]) < MOST_VALUES or RANKED[name]:
                by_name[name].append((tuple(map(plain, labels)), value))
        for metric in METRICS:
            if metric.name not in by_name:
                continue
            make = {GAUGE: GaugeMetricFamily, COUNTER: CounterMetricFamily, HISTOGRAM: HistogramMetricFamily}[
                metric.kind
            ]
            family: Any = make(metric.full_name, metric.help, labels=["run", *metric.labels])
            for labels, value in by_name[metric.name]:
                if metric.kind == HISTOGRAM:
                    counts = [sum(value[1 : 2 + k]) for k in range(len(STEP_SECONDS) + 1)]
                    bounds = [*map(str, STEP_SECONDS), "+Inf"]
                    family.add_metric([self.run, *labels], list(zip(bounds, counts, strict=True)), value[0])
                else:
                    family.add_metric([self.run, *labels], value)
            yield family

    def describe(self) -> Iterable[Any]:
        return []  # else the registry would collect once at its registration

    def _told(self) -> list[Told]:
        found = []
        for path in self.folder.glob("*-*.json"):
            # It may have become part of `before`; what is no file of ours costs nobody the others.
            with suppress(*UNREADABLE):
                content = json.loads(path.read_text())
                began, ended = number(content["began"]), number(content["ended"])
                values = checked(content["values"])
                if type(content["pid"]) is not int or not math.isfinite(began) or not math.isfinite(ended):
                    raise ValueError
                alive = not ended and started(content["pid"]) == content["start"]
                found.append(Told(path, began, ended, alive, values))
        return sorted(found, key=lambda told: told.began)

    def _before(self, everyone: list[Told]) -> dict[Key, Any]:
        """Sums of processes whose files are gone. Many that have ended become one file: it has the names of those that are in
        it, so that whatever happens meanwhile, none counts twice. Takes them out of `everyone`."""
        path, names, sums = self.folder / "before.json", set[str](), dict[Key, Any]()
        with suppress(*UNREADABLE):
            content = json.loads(path.read_text())
            names, sums = set(content["names"]), checked(content["values"])
        last = max((told.began for told in everyone), default=0.0)
        everyone[:] = [told for told in everyone if told.path.name not in names]
        gone = [told for told in everyone if not told.alive and told.ended < last]
        if len(gone) > KEPT:
            for told in gone:
                for key, value in told.values.items():
                    if KINDS[key[0]] in (COUNTER, HISTOGRAM):
                        sums[key] = added(sums.get(key, 0.0), value)
            with suppress(OSError):  # a full disk: they stay as they are
                write(
                    path,
                    {
                        "names": [told.path.name for told in gone],
                        "values": [[*key, value] for key, value in sums.items()],
                    },
                )
                for told in gone:
                    told.path.unlink(missing_ok=True)
            everyone[:] = [told for told in everyone if told not in gone]
        return sums


UNREADABLE = (OSError, ValueError, KeyError, TypeError, RecursionError)
KINDS = {metric.name: metric.kind for metric in METRICS}
LABELS = {metric.name: len(metric.labels) for metric in METRICS}
RANKED = {metric.name: metric.per_rank for metric in METRICS}


def checked(values: Any) -> dict[Key, Any]:
    """Of a file that any process of this user can write: values that can be added and shown; raises ValueError or TypeError."""
    found: dict[Key, Any] = {}
    for name, labels, value in values:
        if name not in KINDS:
            continue
        numbers = value if KINDS[name] == HISTOGRAM else [value]
        if len(numbers) != (len(STEP_SECONDS) + 2 if KINDS[name] == HISTOGRAM else 1):
            raise ValueError(f"{name} has {len(numbers)} numbers")
        if type(labels) is not list or len(labels) != LABELS[name] or not all(type(label) is str for label in labels):
            raise TypeError(f"{name} has labels {labels!r}")
        numbers = [number(one) for one in numbers]
        found[name, tuple(labels)] = numbers if KINDS[name] == HISTOGRAM else numbers[0]
    return found


def number(value: Any) -> float:
    """Of any size that a float can have."""
    if type(value) not in (int, float) or (type(value) is int and abs(value) > 2**1000):
        raise ValueError(f"{type(value).__name__}, expected a number")
    return float(value)


def role(path: Path) -> str:
    """rank-0-PID-START.json -> rank-0"""
    return path.name.rsplit("-", 2)[0]


def added(one: Any, other: Any) -> Any:
    if isinstance(other, list):
        return [a + b for a, b in zip(one or [0.0] * len(other), other, strict=True)]
    return one + other


def plain(text: str) -> str:
    """Of a label: printable, and not longer than anybody reads."""
    return re.sub(r"[^\x20-\x7e]", "?", text)[:LONGEST]


class Server(ThreadingHTTPServer):
    """Answers GET /metrics, a few at a time. Who does not read, or does not ask, is left after some seconds."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, answer: Callable[[], bytes]):
        self.answer = answer
        self.scrapes: dict[str, Scrapes] = {}  # by who asks
        self._lock = threading.Lock()
        self._open: dict[socket.socket, str] = {}  # the oldest first -> from where
        self.address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        super().__init__(("", port), Handler)
        threading.Thread(target=self.serve_forever, daemon=True, name="exporter").start()

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        """A scrape takes milliseconds, so whoever has been here long is none: nobody can keep Prometheus out by waiting."""
        with self._lock:
            if len(self._open) >= AT_ONCE:
                most = Counter(self._open.values()).most_common(1)[0][0]
                oldest = next(one for one, where in self._open.items() if where == most)
                del self._open[oldest]
                self.leave(oldest)
            self._open[request] = client_address[0]
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        late = threading.Timer(REQUEST, self.leave, [request])
        late.start()
        try:
            super().process_request_thread(request, client_address)
        except OSError:
            pass  # the connection was gone when it was closed
        finally:
            late.cancel()
            with self._lock:
                self._open.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who asks may hang up at any moment: that is no error of ours. What is one is printed."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def leave(self, request: socket.socket) -> None:
        with suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)

    def served(self, who: str) -> None:
        number, last, _ = self.scrapes.get(who, (0, time.monotonic(), 0.0))
        if len(self.scrapes) < 1000:
            self.scrapes[who] = Scrapes(number + 1, time.monotonic(), time.monotonic() - last)

    def linger(self, until: Callable[[], bool] = lambda: False) -> None:
        """After the end of a run: until everybody who asks has its last numbers."""
        time.sleep(2 * FRESH)  # an answer from before the end is still given
        before, begun = dict(self.scrapes), time.monotonic()
        patience = {
            who: min(max(2.5 * (asked.interval or ONCE), LEAST), MOST)
            for who, asked in before.items()
            if begun - asked.last < max(2.5 * asked.interval, ONCE) and asked.interval <= SELDOM + 1
        }

        def waits(who: str) -> bool:
            missing = self.scrapes[who].number < before[who].number + SCRAPES
            return missing and time.monotonic() < begun + patience[who]

        while any(map(waits, patience)) and not until():
            time.sleep(0.1)


class Handler(BaseHTTPRequestHandler):
    server: Any  # a Server
    timeout = 5  # seconds for a client to say or take something

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "There is /metrics")
            return
        body = self.server.answer()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.server.served(f"{self.client_address[0]} {self.headers.get('User-Agent', '')}"[:LONGEST])

    def version_string(self) -> str:
        return "equiav"

    def log_message(self, format: str, *args: Any) -> None:
        """A line for each scrape tells nobody anything."""


def serve(folder: Path, run: str, port: int) -> Server | str:
    """In a thread of this process -> the server, or why there is none: nothing that a run has to end for."""
    try:
        return Server(port, Exporter(folder, run).answer)
    except OSError as error:
        how = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        return f"port {port} {how}: no metrics are served. Choose another (metrics.port; 0: none)"


def start_companion(folder: Path, run: str, port: int, tell: Callable[[str], None]) -> None:
    """In a process of its own, which outlives this one for as long as others of the run come; it waits for its turn where there
    is one already."""
    with suppress(OSError, ValueError):
        before = int((folder / "port").read_text())
        if before != port:
            tell(f"metrics of an earlier start are still served at port {before}; those of this one follow there")
    command = [sys.executable, "-m", "monitoring.exporter", "--folder", str(folder), "--run", run, "--port", str(port)]
    nowhere = subprocess.DEVNULL  # who reads this process's words waits for no other
    subprocess.Popen(command, start_new_session=True, stdin=nowhere, stdout=nowhere, stderr=nowhere)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m monitoring.exporter", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the processes write")
    parser.add_argument("--run", required=True, help="value of the label `run`")
    parser.add_argument("--port", type=int, default=PORT)
    given = parser.parse_args(argv)
    exporter = Exporter(given.folder, given.run)
    lock = os.open(given.folder / "exporter", os.O_CREAT | os.O_RDWR, 0o600)
    while True:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        time.sleep(1)  # there is one, which may be about to end
        if not exporter.alive():
            return 0
    server = serve(given.folder, given.run, given.port)
    if isinstance(server, str):
        print(f"equiav: {server}", file=sys.stderr)
        return 1
    (given.folder / "port").write_text(str(given.port))
    while True:
        time.sleep(1)
        if exporter.alive():
            continue
        server.linger(exporter.alive)  # the next start of the run may come meanwhile
        if not exporter.alive():
            shutil.rmtree(given.folder, ignore_errors=True)
            return 0


if __name__ == "__main__":
    sys.exit(main())
