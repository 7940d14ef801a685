"""What goes wrong in a real run calls by the alert that is for it, in its time, and by no other.

Minutes are seconds here, in the rules' windows, delays and limits alike; nothing else about them is changed."""

import os
import re
import shutil
import signal
import tarfile
import time
from contextlib import contextmanager
from threading import Thread

import pytest
import yaml

from equiav.config import DataConfig
from equiav.data.local_s3 import LocalS3
from equiav.data.sources import EncodeSynthetic, Shape
from equiav.data.synthetic import World
from monitoring import alerts
from streaming import Store
from streaming.pack import pack
from tests.launch.nodes import Nodes
from tests.monitoring.prometheus import Prometheus
from tests.streaming.fault_proxy import FaultProxy
from tests.train.ranks import free_port
from tests.train.test_pretrain import Run, steps

pytestmark = pytest.mark.slow
CLIPS = 64


def in_seconds(rules):
    """30m -> 30s, 300 s -> 5 s."""
    rules = re.sub(r"\b(\d+)m\b", r"\1s", rules)
    for name in ("stalled_seconds", "unsaved_seconds"):
        rules, found = re.subn(rf"> {alerts.LIMITS[name]}\b", f"> {alerts.LIMITS[name] // 60}", rules)
        assert found
    return rules.replace(":15s]", ":1s]")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Shards of two clips; steps of eight."""
    folder = tmp_path_factory.mktemp("faults")
    encode = EncodeSynthetic(World(1, 64, 3, 2.56), Shape(3, 64, 90, "wav", 30.0, False, DataConfig()))
    clips = [(f"clip-{k}", k) for k in range(CLIPS)]
    pack(clips, encode, Store(str(folder / "clips")), processes=0, part_items=2)
    settings = {
        "model": {"size": "tiny", "depth": 1},
        "data": {"audio_mean": -10.3, "audio_std": 3.9},
        "objective": {"centroid_size": 3},
        "stream": {"url": str(folder / "clips"), "window": 3, "lanes": 2, "workers": 0},
        "train": {"batch_size": 8, "micro_batch": 4, "steps": 1000, "warmup_steps": 20, "lr": 1e-3, "lr_start": 1e-6},
        "checkpoint": {"every_steps": 50},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


class Watched:
    """A run, and the Prometheus that watches it."""

    def __init__(self, folder, *ports):
        self.folder, self.begun = folder, time.time()
        self.prometheus = Prometheus(folder, ports, in_seconds(alerts.text()))

    def fired(self):
        """alert -> seconds from the beginning to its firing"""
        span = int(time.time() - self.begun) + 1
        firing = 'timestamp(ALERTS{alertstate="firing",alertname!="EquiavWatchdog"})'
        found = self.prometheus.ask(f"min by (alertname) (min_over_time(({firing})[{span}s:1s]))")
        return {one["metric"]["alertname"]: float(one["value"][1]) - self.begun for one in found}

    def calls(self, *expected, seconds=90, also=()):
        """These fire, and while they do, no other but what may follow from it, too."""
        begun = time.monotonic()
        while not set(expected) <= self.fired().keys():
            assert time.monotonic() - begun < seconds, (self.fired(), self.prometheus.ask("ALERTS"))
            time.sleep(0.5)
        print(delays := {name: round(seconds, 1) for name, seconds in self.fired().items()})
        assert delays.keys() - set(also) == set(expected)

    def stays_silent(self, seconds):
        time.sleep(seconds)
        assert self.fired() == {}


@pytest.fixture
def alone(config, tmp_path):
    """-> starts a run by hand, which serves its numbers itself"""

    @contextmanager
    def start(*arguments, W=None, fault="", env=None):
        port = free_port()
        module = "tests.monitoring.faulty" if fault else "equiav"
        arguments = ["--metrics.port", str(port), *arguments]
        run = Run(config, tmp_path / "out", W, *arguments, module=module, env={**(env or {}), "FAULT": fault})
        # A line a step fills a pipe that nobody reads.
        reads = Thread(target=shutil.copyfileobj, args=(run.process.stdout, (tmp_path / "log").open("w")))
        reads.start()
        watched = Watched(tmp_path, port)
        try:
            run.reach(10)
            yield run, watched
        finally:
            watched.prometheus.end()
            run.process.kill()
            run.process.wait()
            reads.join()

    return start


@pytest.fixture
def nodes(config, tmp_path):
    made = Nodes(config, tmp_path / "out", port=free_port())
    made.metrics = free_port()
    made.watched = Watched(tmp_path, made.metrics, made.metrics + 1)
    yield made
    made.watched.prometheus.end()
    made.end()


def test_a_run_without_a_fault(alone):
    with alone() as (run, watched):
        run.reach(400)
        watched.stays_silent(35)
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(60) == 143
        watched.stays_silent(15)  # who has ended, as asked, is missed by nobody


def test_a_stall(alone):
    with alone() as (run, watched):
        run.process.send_signal(signal.SIGSTOP)
        watched.calls("EquiavStalled")


def test_losses_that_are_not_finite(alone):
    with alone("--train.lr", "1e30", "--train.max_skipped", "10000") as (_, watched):
        watched.calls("EquiavNotFinite")
        time.sleep(35)
        watched.calls("EquiavNotFinite")


def test_a_store_that_is_too_slow(config, alone, tmp_path):
    with LocalS3(config.parent, bandwidth="700k") as s3:
        env = {
            "AWS_ACCESS_KEY_ID": s3.key,
            "AWS_SECRET_ACCESS_KEY": s3.secret,
            "AWS_ENDPOINT_URL": s3.options["endpoint_url"],
        }
        cache = ["--stream.cache", str(tmp_path / "cache"), "--stream.cache_bytes", "3300000"]
        with alone("--stream.url", "s3://clips", *cache, env=env) as (_, watched):
            watched.calls("EquiavDataStarved")


def test_a_predictor_that_returns_what_it_is_given(alone):
    with alone(fault="identity") as (_, watched):
        watched.calls("EquiavPredictorIdentity")


def test_a_representation_that_collapses(alone):
    with alone(fault="collapse") as (_, watched):
        watched.calls("EquiavCollapsed")
        time.sleep(35)  # for as long as any other would wait
        watched.calls("EquiavCollapsed")


def test_a_rank_that_is_slow(alone):
    with alone(W=2, fault="straggler") as (_, watched):
        watched.calls("EquiavStraggler")


def test_a_damaged_shard(config, alone, tmp_path):
    shutil.copytree(config.parent / "clips", tmp_path / "clips")
    for path in sorted((tmp_path / "clips").glob("*.tar"))[:3]:
        with tarfile.open(path) as tar:
            places = [(info.offset_data, info.size) for info in tar if info.name.endswith(".jpg")]
        with path.open("r+b") as file:
            for offset, size in places:
                file.seek(offset)
                file.write(bytes(size))
    with alone("--stream.url", str(tmp_path / "clips"), "--stream.max_bad", "0.15", "--stream.patience", "10") as (
        _,
        watched,
    ):
        watched.calls("EquiavQuarantine")


def test_a_store_that_is_down_when_it_is_saved(alone, tmp_path):
    (tmp_path / "store" / "runs").mkdir(parents=True)
    with LocalS3(tmp_path / "store") as s3:
        proxy = FaultProxy(s3.port)
        env = {
            "AWS_ACCESS_KEY_ID": s3.key,
            "AWS_SECRET_ACCESS_KEY": s3.secret,
            "AWS_ENDPOINT_URL": proxy.options()["endpoint_url"],
        }
        url = ["--checkpoint.url", "s3://runs/one", "--checkpoint.every_steps", "20", "--checkpoint.patience", "2"]
        with alone(*url, "--train.steps", "100000", env=env) as (_, watched):
            watched.stays_silent(5)
            proxy.down = True
            watched.calls("EquiavSavesFail", "EquiavUnsaved")
        proxy.close()


def test_a_worker_that_is_lost_again_and_again(nodes):
    nodes.nodes = "1"
    nodes.start(0, "--checkpoint.every_steps", "2")  # it gets on all the same
    for _ in range(8):
        nodes.until(nodes.moved())
        time.sleep(2)  # each is scraped
        os.kill(nodes.worker(0), signal.SIGKILL)
    nodes.watched.calls("EquiavRestartStorm", also=["EquiavStalled"])  # it pauses between rounds that fail at once


def test_a_node_that_does_not_come(nodes):
    nodes.start(0)
    nodes.until(lambda: 10 in steps(nodes.out))
    nodes.watched.calls("EquiavWorldShrunk")


def test_nodes_that_are_gone(nodes):
    nodes.start(0)
    nodes.start(1)
    nodes.until(lambda: 30 in steps(nodes.out))
    nodes.kill(0)
    nodes.kill(1)
    nodes.watched.calls("EquiavAbsent")
