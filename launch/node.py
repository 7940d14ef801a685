"""`python -m launch.node`: what each node of a run executes. It joins the other nodes, starts this node's workers, and starts
them again when one is lost or a node comes or goes; a signal to it is for them.

    python -m launch.node --run NAME --nodes MIN:MAX --workers N -- pretrain --train.lr 1e-4 ...

torchrun's agent does the work. What is ours: the settings without which it does not live through the loss of a node, the whole
grace period for a save, exit statuses with a meaning, workers that start fast, and a line for a human about whatever happens.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from launch.ended import TERMINATED, Ended, Record, first_line, name_of

if TYPE_CHECKING:
    from monitoring.board import Board

PORT = 29400  # of the rendezvous, where each node is a machine of its own
COMMANDS = ("pretrain", "finetune")  # those that nodes share
SETTINGS = "EQUIAV_CONFIG"  # environment variable with the run's settings, as YAML
MESSAGE = Path("/dev/termination-log")  # what Kubernetes shows of a container that has ended
AWAY = 1800.0  # seconds without a node 0, after which the others hold their machines no longer
LOOK_AGAIN = 2.0  # seconds, where the rendezvous host is away


@dataclass(frozen=True)
class Node:
    """One of the machines (or pods) of a run."""

    run: str
    least: int  # nodes
    most: int
    workers: int  # of this node; 0: one for each GPU
    index: int  # 0 hosts the rendezvous
    host: str  # name of the node that does
    address: str  # of this one, for the others
    port: int
    command: list[str]  # of equiav
    record: Record
    data: str  # URL of the dataset
    metrics_port: int  # 0: none
    metrics: Path  # folder in which this node and its workers tell of themselves


def main(argv: list[str] | None = None) -> int:
    """-> the status with which to end."""
    node = parse(argv)
    asked = NodeStop(node)
    os.environ |= {
        # An agent that shares its store with the workers keeps the addresses of a round that is over.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # How signals reach the workers is said here. torchrun would kill them after 30 seconds.
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGHUP",
        "EQUIAV_NODE": "1",
        "EQUIAV_METRICS": str(node.metrics),
    }
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a node that is lost is told in a line, not in thirty
    try:
        # The server imports once what all workers need. It begins now, and the agent is imported meanwhile.
        multiprocessing.set_forkserver_preload(["launch.server", "equiav.cli", f"equiav.commands.{node.command[0]}"])
        forkserver.ensure_running()
        with told(node) as board:
            return run(node, asked, board)
    except Ended as ended:
        tell(node, str(ended))
        leave_word(str(ended))
        return ended.status_of(node.index)
    finally:
        shutil.rmtree(node.metrics, ignore_errors=True)


@contextmanager
def told(node: Node) -> Iterator[Board]:
    """Serves to Prometheus what this node and its workers tell, while they live, and at the end until it was read."""
    from monitoring import metrics
    from monitoring.board import Board
    from monitoring.exporter import serve

    server = serve(node.metrics, node.run, node.metrics_port) if node.metrics_port else None
    if isinstance(server, str):
        tell(node, server)
    board = Board(node.metrics if node.metrics_port else None, "node", tell=lambda text: tell(node, text))
    board.add(metrics.ROUNDS, 0)  # it is there, and waits
    try:
        yield board
    except Ended as ended:
        asked_to = ended.status in (TERMINATED, 128 + signal.SIGINT)
        if node.index == 0 and (ended.final or asked_to):
            board.set(metrics.ENDED, time.time(), "asked" if asked_to else "failed")
        raise
    finally:
        board.close()
        if server and not isinstance(server, str):
            server.linger()


class NodeStop:
    """The signals that this node has got. They are for its workers."""

    def __init__(self, node: Node):
        self.node = node
        self.numbers: list[int] = []
        self.agent: Any = None
        self.ending = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: Any) -> None:
        self.numbers.append(number)
        if self.ending:
            return  # as the first one says
        if not (self.agent and self.agent.signal(number)):
            self.ending = True
            raise Ended(TERMINATED, f"{name_of(number)}: ends; no worker of this node runs")
        tell(self.node, f"{name_of(number)}: the workers finish their step, save, and end")


def parse(argv: list[str] | None) -> Node:
    parser = argparse.ArgumentParser(prog="python -m launch.node", description=__doc__)
    parser.add_argument("--run", required=True, help="its name, the same on all nodes")
    parser.add_argument("--nodes", default="1:1", help="MIN:MAX; fewer wait for more, more wait as spares")
    parser.add_argument("--workers", type=count, default=1, help="of this node; auto: one for each GPU")
    parser.add_argument("--index", type=int, default=0, help="of this node; 0 hosts the rendezvous")
    parser.add_argument("--host", default=os.environ.get("TORCHX_RANK0_HOST", "localhost"), help="name of node 0")
    parser.add_argument("--port", type=int, default=0, help="of the rendezvous, at node 0 (default: see PORT)")
    parser.add_argument("--metrics-port", type=int, default=0, help="where Prometheus can ask this node; 0: nowhere")
    parser.add_argument("--folder", default="", help="URL of the run's checkpoints, which remember how it ended")
    parser.add_argument("--data", default="", help="URL of the dataset: a node that cannot reach it stays outside")
    parser.add_argument("command", nargs="+", help="of equiav, with its settings, after --")
    given = parser.parse_args(argv)
    match = re.fullmatch(r"(\d+)(?::(\d+))?", given.nodes)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        parser.error(f"--nodes is {given.nodes!r}, expected MIN:MAX")
    command = list(given.command)
    if command[0] not in COMMANDS:
        parser.error(f"what stands after -- begins with {command[0]!r}, expected {' or '.join(COMMANDS)}")
    if settings := os.environ.pop(SETTINGS, ""):
        path = Path(tempfile.mkdtemp(prefix="equiav-")) / "config.yaml"
        path.write_text(settings)
        command[1:1] = ["--config", str(path)]
    submission = os.environ.get("EQUIAV_SUBMISSION", "")
    return Node(
        given.run,
        least,
        most,
        given.workers,
        given.index,
        given.host,
        os.environ.get("POD_IP", given.host if given.index == 0 else "localhost"),
        given.port or port_of(given.host, given.folder),
        command,
        Record(given.folder, submission, given.index),
        given.data,
        given.metrics_port,
        Path(tempfile.mkdtemp(prefix="equiav-metrics-")),
    )


def count(workers: str) -> int:
    if workers != "auto" and int(workers) < 1:
        raise ValueError
    return 0 if workers == "auto" else int(workers)


def port_of(host: str, folder: str) -> int:
    """Where all nodes are this machine, another run may be here, too."""
    return 20000 + crc32(folder.encode()) % 9000 if host == "localhost" else PORT


def run(node: Node, asked: NodeStop, board: Board) -> int:
    """Round after round, until the run has ended or this node is asked to."""
    node.record.look()
    from launch.agent import LOST, Closed, make_agent  # torch, of which this program needs the agent alone

    while True:
        wait_for_host(node)
        try:
            asked.agent = agent = make_agent(node, asked.numbers, board, lambda text: tell(node, text))
            agent.run()
            node.record.write(0, "the run has finished")
            tell(node, "finished")
            return 0
        except Closed:
            tell(node, "the run has finished without this node")
            return 0
        except LOST as error:
            # Its host is lost, or not there yet. This node's place in the run is not: it waits for the next one.
            tell(node, f"no rendezvous at {node.host}:{node.port}; tries again ({first_line(error)})")
            if asked.agent:
                asked.agent.abandon()
            asked.agent = agent = None
            gc.collect()  # a store that this node hosts lives as long as somebody knows it, and so does its port
            time.sleep(LOOK_AGAIN)
            node.record.look()


def wait_for_host(node: Node) -> None:
    """Its name may not resolve yet. In Python: torch's own waiting would hold up a signal."""
    said, until = False, time.monotonic() + AWAY
    while node.index:
        try:
            socket.create_connection((node.host, node.port), timeout=LOOK_AGAIN).close()
            return
        except OSError as error:
            if not said:
                tell(node, f"waits for node 0 at {node.host}:{node.port} ({error})")
                said = True
            if time.monotonic() > until:
                raise Ended(1, f"node 0 has not been at {node.host}:{node.port} for {AWAY / 60:.0f} minutes") from None
            time.sleep(LOOK_AGAIN / 4)


def leave_word(text: str) -> None:
    """For `kubectl describe pod` and `torchx status`."""
    if MESSAGE.is_file():
        MESSAGE.write_text(text[:4000])


def tell(node: Node, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} node {node.index}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads that torch leaves behind may abort an interpreter that winds up, and the status with it
