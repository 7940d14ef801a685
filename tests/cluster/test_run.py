"""Runs on a cluster, started as users start them, while machines die under them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest
import yaml

from launch import manifests
from launch.scheduler import to_yaml
from monitoring.alerts import ALERTS, WATCHDOG
from tests.cluster.cluster import SERVER
from tests.train.ranks import free_port

pytestmark = pytest.mark.cluster

NAMESPACE, SYSTEM = "equiav", "equiav-system"
PACKS, DEMO = (
    one["metadata"]["name"] for one in yaml.safe_load_all(Path("k8s/80-demo.yaml").read_text()) if one["kind"] == "Job"
)
TORCHX = str(Path(sys.executable).parent / "torchx")
STEPS = 240
ATTACKED = 450  # steps: as long as all that is done to a run takes
ALIKE = 60  # first steps that are compared with an undisturbed run
LONG = ["--train.micro_batch", "8", "--train.steps", str(ATTACKED), "--checkpoint.every_steps", "10"]
RUN = ["--train.micro_batch", "8", "--train.steps", str(STEPS), "--checkpoint.every_steps", "10"]


def torchx(*arguments, status=0, env=None):
    done = subprocess.run([TORCHX, *arguments], capture_output=True, text=True, env={**os.environ, **(env or {})})
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def until(condition, seconds, what):
    begun = time.monotonic()
    while not (found := condition()):
        assert time.monotonic() - begun < seconds, what() if callable(what) else what
        time.sleep(0.3)
    return found


@pytest.fixture(scope="module")
def applied(kubectl):
    """`kubectl apply -f k8s/`, as it is written. Names are served from outside of this cluster: that takes a policy more."""
    kubectl("apply", "-f", "k8s/")
    for namespace in (NAMESPACE, SYSTEM):
        about = {"name": "names-of-this-cluster", "namespace": namespace}
        ports = [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]
        rule = {"to": [{"ipBlock": {"cidr": f"{SERVER}/32"}}], "ports": ports}
        spec = {"podSelector": {}, "policyTypes": ["Egress"], "egress": [rule]}
        policy = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": about, "spec": spec}
        kubectl("apply", "-f", "-", input=json.dumps(policy))

    def packed():
        return ended(kubectl, PACKS) == "Complete"

    until(packed, 240, lambda: kubectl("-n", NAMESPACE, "describe", "pods"))


@pytest.fixture(scope="module")
def launcher(kubectl, applied):
    """-> submits into the namespace"""
    return ["run", "-s", "kubernetes", "-cfg", f"namespace={NAMESPACE},service_account=equiav,grace=60"]


def ended(kubectl, job):
    """How a job has ended: Complete, Failed or not yet."""
    conditions = kubectl.json("-n", NAMESPACE, "get", "job", job)["status"].get("conditions", [])
    return next(
        (one["type"] for one in conditions if one["status"] == "True" and one["type"] in ("Complete", "Failed")), ""
    )


def pods(kubectl, job):
    """index -> the pod that lives and is not about to end"""
    listed = kubectl.json("-n", NAMESPACE, "get", "pods", "-l", f"batch.kubernetes.io/job-name={job}")["items"]
    return {
        int(pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]): pod
        for pod in listed
        if pod["status"]["phase"] in ("Pending", "Running") and "deletionTimestamp" not in pod["metadata"]
    }


def runs(pod):
    return pod["status"]["phase"] == "Running"


def store_folder(kubectl):
    """Where the demonstration's store has its objects, on this machine."""
    claim = kubectl.json("-n", SYSTEM, "get", "pvc", "store")
    volume = kubectl.json("get", "pv", claim["spec"]["volumeName"])
    return Path(volume["spec"]["hostPath"]["path"]) / "equiav"


def trouble(kubectl, job):
    def told():
        selector = f"batch.kubernetes.io/job-name={job}"
        log = kubectl("-n", NAMESPACE, "logs", "-l", selector, "--prefix", "--tail=15", check=False)
        return kubectl("-n", NAMESPACE, "get", "pods", "-o", "wide", check=False) + log

    return told


def test_the_manifests_are_as_the_cluster_has_them(kubectl, applied):
    budget = "poddisruptionbudget.policy/demo configured"  # kubectl says so of every budget, and changes nothing
    for how in ("-f", "-k"):
        again = kubectl("apply", how, "k8s/").splitlines()
        assert again
        assert [line for line in again if not line.endswith("unchanged") and line != budget] == []
        kubectl("diff", how, "k8s/")  # status 1 if there is any
    kubectl("apply", "-f", "k8s/", "--dry-run=server")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "bad", "namespace": NAMESPACE}}
    pod["spec"] = {"containers": [{"name": "bad", "image": "x"}], "hostNetwork": True}
    with pytest.raises(RuntimeError, match="violates PodSecurity"):
        kubectl("apply", "-f", "-", input=json.dumps(pod))


@pytest.fixture(scope="module")
def demonstrated(kubectl, applied):
    until(lambda: ended(kubectl, DEMO), 300, trouble(kubectl, DEMO))
    assert ended(kubectl, DEMO) == "Complete"
    return "s3://equiav/demo"


def test_the_demonstration_trains(kubectl, demonstrated):
    folder = store_folder(kubectl) / "demo" / "checkpoints"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 120
    assert (folder / "model" / "config.json").exists()


@pytest.fixture(scope="module")
def prometheus(kubectl, applied):
    """-> what it answers to a path, through `kubectl port-forward`"""
    rolled = ("-n", SYSTEM, "rollout", "status", "deployment/prometheus", "--timeout=120s")
    assert "successfully rolled out" in kubectl(*rolled, check=False), kubectl("-n", SYSTEM, "describe", "pods")
    port = free_port()
    forward = subprocess.Popen(
        [
            "kubectl",
            "--kubeconfig",
            kubectl.kubeconfig,
            "-n",
            SYSTEM,
            "port-forward",
            "service/prometheus",
            f"{port}:9090",
        ]
    )

    def ask(path):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{path}", timeout=10) as answer:
            return json.load(answer)["data"]

    yield ask
    forward.kill()


def test_prometheus_finds_the_pods_and_has_the_alerts(kubectl, prometheus):
    until(lambda: ended(kubectl, DEMO), 300, trouble(kubectl, DEMO))
    steps = "query?query=max%20by(namespace,run)(max_over_time(equiav_step%5B1h%5D))"

    def scraped():
        with suppress(OSError):
            return prometheus(steps)["result"]

    (found,) = until(scraped, 60, trouble(kubectl, "prometheus"))
    assert found["metric"] == {"namespace": NAMESPACE, "run": DEMO}
    assert found["value"][1] == "120"  # the last step, too
    pods = prometheus("query?query=count(count%20by(pod)(last_over_time(up%7Bjob=%22equiav%22%7D%5B1h%5D)))")["result"]
    assert pods[0]["value"][1] in "123"  # of the demonstration alone, one for each pod that has run
    (group,) = prometheus("rules")["groups"]
    assert len([rule for rule in group["rules"] if rule["type"] == "alerting"]) == len(ALERTS)
    assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}
    firing = [one["labels"]["alertname"] for one in prometheus("alerts")["alerts"] if one["state"] == "firing"]
    assert firing == [WATCHDOG]


def resident(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


class Attacked:
    """A run, and what is done to it."""

    def __init__(self, kubectl, cluster, name):
        self.kubectl, self.cluster, self.name = kubectl, cluster, name
        self.folder = store_folder(kubectl) / name / "checkpoints"
        self.gaps = {}
        self._moved = [time.monotonic()]  # when a newer step was there
        Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        last = 0
        while True:
            with suppress(OSError):
                if (now := self.saved()) > last:
                    last = now
                    self._moved.append(time.monotonic())
            time.sleep(0.2)

    def saved(self):
        return max((int(path.parent.name[5:13]) for path in self.folder.glob("step-*/manifest.json")), default=0)

    def pods(self):
        return pods(self.kubectl, self.name)

    def moves(self, seconds=180):
        before = self.saved()
        until(
            lambda: self.saved() > before or ended(self.kubectl, self.name), seconds, trouble(self.kubectl, self.name)
        )
        assert self.saved() < ATTACKED, "it finished before all was done to it: more steps"

    def whole(self):
        """All pods run."""
        until(lambda: sum(map(runs, self.pods().values())) == 3, 180, trouble(self.kubectl, self.name))

    def happens(self, what, *actions):
        with self.told(what):
            for action in actions:
                action()
            self.moves()
            self.whole()

    @contextmanager
    def told(self, what):
        """The largest gap between two saved steps meanwhile."""
        begun = time.monotonic()
        yield
        time.sleep(0.5)
        moved = [when for when in self._moved if when >= begun]
        before = max(when for when in self._moved if when < begun)
        gap = max(b - a for a, b in pairwise([before, *moved, time.monotonic()]))
        self.gaps[what] = gap

    def processes(self, index, words=b""):
        """Of a pod, as this machine knows them."""
        there = f"pod{self.pods()[index]['metadata']['uid']}"
        found = self.cluster.processes(self.node_of(index), words)
        return [pid for pid in found if there in Path(f"/proc/{pid}/cgroup").read_text()]

    def agent(self, index):
        """Its first process."""
        return self.processes(index, b"launch.node")[0]

    def worker(self, index):
        """The one that trains has most memory."""
        return max(set(self.processes(index)) - {self.agent(index)}, key=resident)

    def node_of(self, index):
        return self.cluster.nodes.index(self.pods()[index]["spec"]["nodeName"])

    def exec(self, index, code):
        name = self.pods()[index]["metadata"]["name"]
        self.kubectl("-n", NAMESPACE, "exec", name, "--", "python", "-c", code, check=False)

    def exhaust(self, index):
        """The kernel kills whom it is told to, when the pod's memory is out."""
        Path(f"/proc/{self.worker(index)}/oom_score_adj").write_text("1000")
        self.exec(index, "x = bytearray(3 << 30); x[::4096] = x[::4096]; import time; time.sleep(5)")

    def fill(self, index):
        uid = self.pods()[index]["metadata"]["uid"]
        self.exec(index, "import os; f = open('/tmp/full', 'wb'); os.posix_fallocate(f.fileno(), 0, 3 << 30)")
        self.replaced(index, uid)

    def replaced(self, index, uid):
        """Waits for the pod that takes a lost one's place."""

        def there():
            pod = self.pods().get(index)
            return pod and pod["metadata"]["uid"] != uid and runs(pod)

        until(there, 120, trouble(self.kubectl, self.name))


@pytest.fixture(scope="module")
def undisturbed(kubectl, applied, tmp_path_factory):
    """The first steps of the same run on this machine -> what they said. Then the cluster is the attacked runs' alone."""
    until(lambda: ended(kubectl, DEMO), 300, trouble(kubectl, DEMO))  # two cores
    # A machine here has two processors, and a pod of the run asks for one: with a machine less there is no room for others.
    kubectl("-n", SYSTEM, "scale", "deployment", "prometheus", "grafana", "state", "--replicas=0")
    out = tmp_path_factory.mktemp("whole")
    command = [sys.executable, "-m", "launch.node", "--run", "whole", "--workers", "2", "--", "pretrain"]
    command += ["--config", "smoke", "--stream.url", str(store_folder(kubectl) / "clips"), "--out", str(out), *LONG]
    run, said = subprocess.Popen(command, stdout=subprocess.DEVNULL), out / "metrics.jsonl"
    until(
        lambda: said.exists() and len(said.read_bytes().splitlines()) > ALIKE, 200, "the undisturbed run does not begin"
    )
    run.terminate()
    run.wait()
    return b"".join(said.read_bytes().splitlines(keepends=True)[:ALIKE])


@pytest.fixture(scope="module")
def attacked():
    """What runs ended with, whatever happened to them."""
    return []


@pytest.fixture
def attack(kubectl, cluster, launcher, undisturbed, attacked, capsys):
    """-> starts a run of up to three nodes. When it has ended, it has begun as the undisturbed one, and ended as the others."""
    runs = []

    def start(name):
        handle = torchx(*launcher, "launch/pretrain.py", "--nodes", "1:3", "--cpu", "1", "--memory", "3Gi", "--scratch", "2Gi",
                        "--data", "s3://equiav/clips", "--out", f"s3://equiav/{name}", "--secret", "equiav-store",
                        "--", *LONG)  # fmt: skip
        assert f"kubernetes://torchx/{NAMESPACE}:{name}" in handle
        runs.append(Attacked(kubectl, cluster, name))
        runs[0].whole()
        runs[0].happens("nothing")
        return runs[0]

    yield start
    (run,) = runs
    until(lambda: ended(kubectl, run.name), 400, trouble(kubectl, run.name))
    with capsys.disabled():
        print("\n| what happens | largest gap between two saved steps, s |\n|---|---|")
        for what, gap in run.gaps.items():
            print(f"| {what} | {gap:.0f} |")
    assert ended(kubectl, run.name) == "Complete"
    said, model = (run.folder / name for name in ("metrics.jsonl", "model/model.safetensors"))
    assert said.read_bytes().startswith(undisturbed)
    assert len(said.read_bytes().splitlines()) == ATTACKED
    attacked.append((said.read_bytes(), model.read_bytes()))
    assert all(one == attacked[0] for one in attacked)


def test_whatever_happens_within_the_machines_the_run_is_the_same(cluster, attack):
    run = attack("within")
    run.happens("a worker is killed", lambda: os.kill(run.worker(1), signal.SIGKILL))
    run.happens("a worker is killed for its memory", lambda: run.exhaust(1))
    run.happens("an agent is killed", lambda: os.kill(run.agent(2), signal.SIGKILL))
    run.happens("the rendezvous host's agent is killed", lambda: os.kill(run.agent(0), signal.SIGKILL))
    run.happens("a pod's scratch is full: it is evicted", lambda: run.fill(2))
    run.happens("a kubelet is killed", lambda: cluster.send(run.node_of(1), "kubelet", signal.SIGKILL))
    run.happens("a containerd is killed", lambda: cluster.send(run.node_of(1), "containerd", signal.SIGKILL))
    for what, program in (("the API server", "kube-apiserver"), ("the server of names", "coredns")):
        away = [
            lambda program=program: cluster.send("control", program, signal.SIGSTOP),
            lambda: time.sleep(15),
            lambda program=program: cluster.send("control", program, signal.SIGCONT),
        ]
        run.happens(f"{what} is away for 15 s", *away)


def test_whatever_happens_to_the_machines_the_run_is_the_same(kubectl, cluster, attack):
    run = attack("attacked")
    others = {index: pod["metadata"]["uid"] for index, pod in run.pods().items() if index != 1}
    run.happens(
        "a pod is deleted", lambda: kubectl("-n", NAMESPACE, "delete", "pod", run.pods()[1]["metadata"]["name"])
    )
    assert others == {index: pod["metadata"]["uid"] for index, pod in run.pods().items() if index != 1}

    number, uid = run.node_of(0), run.pods()[0]["metadata"]["uid"]
    with run.told("the rendezvous host's machine loses its power"):
        cluster.kill(number)  # it may be the store's, too
        until(lambda: not cluster.ready(number), 60, "a node that is dead counts as ready")
        dead = time.monotonic()
        run.replaced(0, uid)
        assert time.monotonic() - dead < 30
        run.moves()
    cluster.start(number)
    until(lambda: cluster.ready(number), 120, "a node does not come back")

    index = next(index for index, pod in run.pods().items() if index)
    number, uid = run.node_of(index), run.pods()[index]["metadata"]["uid"]
    with run.told("a machine is cut off the network"):
        cluster.cut(number)
        run.replaced(index, uid)
        run.moves()
    with run.told("it comes back"):
        cluster.join(number)
        until(lambda: cluster.ready(number), 120, "a node does not come back")
        run.whole()
        run.moves()

    name = cluster.nodes[run.node_of(2)]
    # Pods of tests before may hang at the job controller for minutes.
    others = "--pod-selector=batch.kubernetes.io/job-name!=job"
    drain = ("drain", name, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=120s", others)
    run.happens("a machine is drained", lambda: kubectl(*drain), lambda: kubectl("uncordon", name))

    def scale(count):
        return lambda: kubectl("-n", SYSTEM, "scale", "deployment", "store", f"--replicas={count}")

    run.happens("the store is away for 30 s", scale(0), lambda: time.sleep(30), scale(1))


def test_a_model_of_the_cluster_is_fine_tuned_there(kubectl, launcher, demonstrated):
    """Two nodes, from what the demonstration left in the store; its clips have labels since they were packed."""
    torchx(*launcher, "launch/finetune.py", "--nodes", "2", "--cpu", "1", "--memory", "3Gi", "--scratch", "4Gi",
           "--data", "s3://equiav/clips", "--test", "s3://equiav/clips", "--weights", demonstrated,
           "--config", "smoke", "--out", "s3://equiav/tuned", "--secret", "equiav-store", "--",
           "--tune.loss", "one", "--tune.epochs", "1", "--tune.mixup", "0.5", "--tune.balance",
           "--train.micro_batch", "8")  # fmt: skip
    until(lambda: ended(kubectl, "tuned"), 300, trouble(kubectl, "tuned"))
    assert ended(kubectl, "tuned") == "Complete", trouble(kubectl, "tuned")()
    model = store_folder(kubectl) / "tuned" / "checkpoints" / "model"
    said = json.loads((model / "results.json").read_text())
    assert said["clips"] == said["of"] > 0
    assert 0 <= said["accuracy"] <= 1
    assert (model / "results.md").read_text().startswith("| dataset, sound and pictures | accuracy, % |")


def test_a_model_of_the_cluster_is_evaluated_there(kubectl, launcher, demonstrated):
    """Two processes, on what the demonstration left in the store."""
    torchx(*launcher, "launch/eval.py", "--cpu", "2", "--memory", "4Gi", "--scratch", "4Gi", "--workers", "2",
           "--data", "s3://equiav/clips", "--weights", demonstrated, "--out", "s3://equiav/evaluated",
           "--secret", "equiav-store", "--", "--batch", "8", "--seeds", "2")  # fmt: skip
    until(lambda: ended(kubectl, "eval-retrieval"), 300, trouble(kubectl, "eval-retrieval"))
    assert ended(kubectl, "eval-retrieval") == "Complete", trouble(kubectl, "eval-retrieval")()
    folder = store_folder(kubectl) / "evaluated"
    said = json.loads((folder / "retrieval.json").read_text())
    assert said["clips"] == said["of"] > 0
    assert (folder / "retrieval.md").read_text().startswith("| among ")


class Relay:
    """Between a command and the API server. `cut` ends what goes through it, as a load balancer does."""

    def __init__(self, kubectl):
        self.config = yaml.safe_load(Path(kubectl.kubeconfig).read_text())
        server = urlsplit(self.config["clusters"][0]["cluster"]["server"])
        self.upstream, self.ends = (server.hostname, server.port), []
        self.listens = socket.create_server(("127.0.0.1", 0))
        Thread(target=self._accept, daemon=True).start()

    def env(self, folder):
        port = self.listens.getsockname()[1]
        self.config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{port}"
        (folder / "relayed").write_text(yaml.safe_dump(self.config))
        return {"KUBECONFIG": str(folder / "relayed")}

    def cut(self):
        for end in self.ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self):
        while True:
            here, there = self.listens.accept()[0], socket.create_connection(self.upstream)
            self.ends += [here, there]
            for source, target in ((here, there), (there, here)):
                Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source, target):
        with suppress(OSError):
            while part := source.recv(65536):
                target.sendall(part)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


def test_torchx_shows_and_ends_a_run(kubectl, launcher, tmp_path):
    arguments = [*launcher, "launch/pretrain.py", "--nodes", "2", "--cpu", "1", "--memory", "3Gi", "--scratch", "4Gi"]
    arguments += ["--data", "s3://equiav/clips", "--out", "s3://equiav/watched", "--secret", "equiav-store", "--", *RUN]
    torchx(*arguments)
    handle = f"kubernetes://torchx/{NAMESPACE}:watched"
    until(lambda: "RUNNING" in torchx("status", handle), 120, trouble(kubectl, "watched"))
    until(lambda: " steps (" in torchx("log", handle), 120, trouble(kubectl, "watched"))
    text = torchx("log", handle)
    assert "worker/0" in text
    assert "worker/1" in text
    assert "2 node(s)" in torchx("log", "--regex", "round", f"{handle}/worker/1")
    followed = tmp_path / "followed"
    through = Relay(kubectl)
    env = {**os.environ, **through.env(tmp_path), "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    follow = subprocess.Popen([TORCHX, "log", "--tail", handle], stdout=followed.open("w"), env=env)
    until(lambda: " steps (" in followed.read_text(), 60, "nothing is followed")
    through.cut()
    before = len(followed.read_text())
    until(lambda: len(followed.read_text()) > before, 60, "what was cut is not gone on with")
    assert "'name': 'equiav:watched'" in torchx("describe", handle)
    listed = torchx("list", "-s", "kubernetes", env=context(kubectl, NAMESPACE)).splitlines()
    assert any(f"{NAMESPACE}:watched" in line and "RUNNING" in line for line in listed)
    assert "already" in torchx(*arguments, status=1)  # it runs
    torchx("cancel", handle)
    until(lambda: "CANCELLED" in torchx("status", handle), 60, trouble(kubectl, "watched"))
    follow.wait(120)
    lines = [line.partition(" ")[2] for line in followed.read_text().splitlines()]
    assert any("SIGTERM" in line for line in lines)
    steps = [int(line.partition(" ")[0]) for line in lines if " steps (" in line]
    assert steps
    assert steps == sorted(set(steps))  # none twice
    until(lambda: not pods(kubectl, "watched"), 120, trouble(kubectl, "watched"))
    saved = max(
        int(path.parent.name[5:13]) for path in store_folder(kubectl).glob("watched/checkpoints/step-*/manifest.json")
    )
    torchx(*arguments)  # the same command goes on
    until(lambda: f"goes on at step {saved}" in torchx("log", handle), 180, trouble(kubectl, "watched"))
    torchx("cancel", handle)
    until(lambda: not pods(kubectl, "watched"), 120, trouble(kubectl, "watched"))


def context(kubectl, namespace):
    """-> environment, of the same cluster with another namespace"""
    config = yaml.safe_load(Path(kubectl.kubeconfig).read_text())
    config["contexts"][0]["context"]["namespace"] = namespace
    path = Path(kubectl.kubeconfig).with_name(f"{namespace}.kubeconfig")
    path.write_text(yaml.safe_dump(config))
    return {"KUBECONFIG": str(path)}


def test_an_end_for_good_burns_no_restarts(kubectl, launcher):
    """The checkpoints there are of a run with another seed."""
    arguments = ["--nodes", "3", "--cpu", "1", "--memory", "2Gi", "--scratch", "4Gi", "--data", "s3://equiav/clips"]
    arguments += ["--out", "s3://equiav/demo", "--name", "mistaken", "--secret", "equiav-store"]
    torchx(*launcher, "launch/pretrain.py", *arguments, "--", *RUN, "--seed", "5")
    handle = f"kubernetes://torchx/{NAMESPACE}:mistaken"
    until(lambda: "FAILED" in torchx("status", handle), 120, trouble(kubectl, "mistaken"))
    time.sleep(15)  # the first index is tried again
    listed = kubectl.json("-n", NAMESPACE, "get", "pods", "-l", "batch.kubernetes.io/job-name=mistaken")["items"]
    assert len(listed) <= 5  # the first index again; the others have nothing left to do
    told = torchx("status", handle)
    assert "FAILED" in told
    assert "seed is 5, was 0" in " ".join(told.split())
    torchx(
        *launcher, "launch/pretrain.py", *arguments, "--", *RUN, "--seed", "6"
    )  # in its place, though it is tried still
    torchx("cancel", handle)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--secret", "nope"], "there is no Secret nope in namespace equiav"),
        (["--queue", "nope"], "there is no LocalQueue nope in namespace equiav"),
        (["--mounts", "type=volume,src=nope,dst=/data"], "there is no PersistentVolumeClaim nope"),
        (["--memory", "plenty"], "memory is 'plenty'"),
    ],
)
def test_what_is_not_there_is_told_at_once(kubectl, launcher, arguments, told):
    assert told in torchx(*launcher, "launch/pretrain.py", "--name", "wrong", *arguments, status=1)
    assert "wrong" not in kubectl("-n", NAMESPACE, "get", "jobs,services,configmaps")


def test_an_image_that_is_not_there_is_told(kubectl, launcher):
    torchx(*launcher, "launch/pretrain.py", "--name", "no-image", "--image", "localhost/none:1")
    handle = f"kubernetes://torchx/{NAMESPACE}:no-image"
    until(lambda: "localhost/none:1" in torchx("status", handle), 60, trouble(kubectl, "no-image"))
    assert "PENDING" in torchx("status", handle)
    torchx("cancel", handle)


def test_what_others_have_stays(kubectl, launcher):
    kubectl("-n", NAMESPACE, "create", "service", "clusterip", "theirs", "--tcp=80")
    before = kubectl("-n", NAMESPACE, "get", "service", "theirs", "-o", "jsonpath={.metadata.uid}")
    text = torchx(*launcher, "launch/pretrain.py", "--name", "theirs", status=1)
    assert "there is a Service theirs in namespace equiav that is none of ours" in text
    assert kubectl("-n", NAMESPACE, "get", "service", "theirs", "-o", "jsonpath={.metadata.uid}") == before


def test_of_many_that_submit_one_name_one_has_it_whole(kubectl, launcher):
    """Whoever loses takes nothing from the one that wins."""
    command = [TORCHX, *launcher, "launch/pretrain.py", "--name", "race", "--nodes", "1", "--data", "s3://equiav/none"]
    command += ["--out", "s3://equiav/race", "--secret", "equiav-store"]
    tried = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(4)]
    told = [one.communicate()[0] for one in tried]
    assert [one.returncode for one in tried].count(0) == 1, told
    assert all("Traceback" not in text for text in told), told
    job = kubectl.json("-n", NAMESPACE, "get", "job", "race")
    assert not job["spec"].get("suspend")
    for kind in ("configmap", "service"):
        (owner,) = kubectl.json("-n", NAMESPACE, "get", kind, "race")["metadata"]["ownerReferences"]
        assert owner["uid"] == job["metadata"]["uid"]
    until(lambda: any(map(runs, pods(kubectl, "race").values())), 120, trouble(kubectl, "race"))
    torchx("cancel", f"kubernetes://torchx/{NAMESPACE}:race")
    kubectl("-n", NAMESPACE, "delete", "job", "race")


def test_how_a_pod_ended_is_what_kubernetes_says(kubectl, launcher, image):
    """Of memory, of a volume: a program that is killed for these says nothing of it."""
    spec = {"restartPolicy": "Never", "automountServiceAccountToken": False}
    spec["securityContext"] = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    spec["volumes"] = [{"name": "scratch", "emptyDir": {"sizeLimit": "8Mi"}}]
    container = {
        "image": image,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    container |= {"name": "main", "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}]}
    container["resources"] = {"limits": {"cpu": "1", "memory": "256Mi", "ephemeral-storage": "1Gi"}}
    killed = "was killed for its memory (OOMKilled): it took more than 256Mi"
    for name, code, said in (
        ("eats", "x = bytearray(1 << 30); x[::4096] = x[::4096]", killed),
        ("fills", "import time; open('/tmp/x', 'wb').write(bytes(64 << 20)); time.sleep(600)", 'EmptyDir volume "scratch"'),
    ):  # fmt: skip
        main = {**container, "command": ["python", "-c", code]}
        about = {"name": name, "namespace": NAMESPACE, "labels": {"app.kubernetes.io/managed-by": "equiav"}}
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": about}
        template = {"spec": {**spec, "containers": [main]}}
        job["spec"] = {"backoffLimit": 0, "completionMode": "Indexed", "completions": 1, "template": template}
        kubectl("apply", "-f", "-", input=json.dumps(job))
        handle = f"kubernetes://torchx/{NAMESPACE}:{name}"
        until(lambda handle=handle, said=said: said in torchx("status", handle), 240, trouble(kubectl, name))
        kubectl("-n", NAMESPACE, "delete", "job", name)


def test_a_new_release_is_applied_like_the_first(kubectl, applied):
    """Jobs cannot be changed: another image makes others."""
    made = to_yaml(manifests.demo("equiav:another"))
    kubectl("apply", "-f", "-", input=made)
    kubectl("delete", "--wait=false", "-f", "-", input=made)


def test_what_a_guard_of_the_namespace_refuses_is_told(kubectl, launcher):
    arguments = ["launch/pretrain.py", "--name", "refused", "--mounts", "type=bind,src=/tmp,dst=/cache"]
    torchx(*launcher, *arguments)
    handle = f"kubernetes://torchx/{NAMESPACE}:refused"
    until(lambda: "violates PodSecurity" in torchx("status", handle), 60, trouble(kubectl, "refused"))
    torchx("cancel", handle)


def test_what_the_server_refuses_leaves_nothing(kubectl, launcher):
    options = f"{launcher[-1]},priority_class=No_Such!"
    text = torchx(*launcher[:-1], options, "launch/pretrain.py", "--name", "unlikely", status=1)
    assert "priorityClassName" in text
    assert "unlikely" not in kubectl("-n", NAMESPACE, "get", "jobs,services,configmaps")


def test_who_lacks_the_rights_is_told(kubectl, applied):
    token = kubectl("-n", NAMESPACE, "create", "token", "equiav").strip()
    config = yaml.safe_load(Path(kubectl.kubeconfig).read_text())
    config["users"][0]["user"] = {"token": token}
    path = Path(kubectl.kubeconfig).with_name("powerless.kubeconfig")
    path.write_text(yaml.safe_dump(config))
    for arguments in (["list", "-s", "kubernetes"], ["run", "-s", "kubernetes", "launch/pretrain.py"]):
        assert "you lack the rights" in torchx(*arguments, status=1, env={"KUBECONFIG": str(path)})
    may = ("-n", NAMESPACE, "auth", "can-i", "--as=somebody", "--as-group=equiav-launchers")
    assert kubectl(*may, "create", "jobs").strip() == "yes"
    assert kubectl(*may, "get", "secrets", check=False).strip() == "no"
    there = ("-n", SYSTEM, *may[2:])
    for what in ("get pods/log", "patch configmaps", "delete services", "create pods", "get secrets"):
        verb, kind = what.split()
        assert kubectl(*there, verb, *f"{kind} ".replace("/", " --subresource ").split(), check=False).strip() == "no"


OUTSIDE = [  # address, port, whether a job may go there
    ("203.0.113.9", 443, True),
    ("203.0.113.9", 53, False),
    ("172.30.0.99", 443, False),
    ("172.30.0.99", 53, False),
    ("100.64.0.99", 443, False),
]


def test_the_policies_let_through_what_is_needed_and_nothing_else(kubectl, cluster, applied, image):
    def pod(name, namespace, **labels):
        container = {"name": "main", "image": image, "command": ["sleep", "3600"]}
        container["securityContext"] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        safe = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
        spec = {"containers": [container], "securityContext": safe, "terminationGracePeriodSeconds": 0}
        about = {"name": name, "namespace": namespace, "labels": labels}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": spec}

    kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "watching"}})
    kubectl.apply(
        pod("worker", NAMESPACE, **{"app.kubernetes.io/name": "equiav"}),
        pod("other-worker", NAMESPACE, **{"app.kubernetes.io/name": "equiav"}),
        pod("stranger", NAMESPACE),
        pod("prometheus", "watching", **{"app.kubernetes.io/name": "prometheus"}),
        pod("curious", "watching"),
    )
    for name, namespace in (("worker", NAMESPACE), ("other-worker", NAMESPACE), ("stranger", NAMESPACE),
                            ("prometheus", "watching"), ("curious", "watching")):  # fmt: skip
        kubectl("-n", namespace, "wait", "--for=condition=Ready", f"pod/{name}", "--timeout=60s")
    address = kubectl("-n", NAMESPACE, "get", "pod", "other-worker", "-o", "jsonpath={.status.podIP}")
    serve = "import http.server as h, threading as t\n"
    serve += "def serve(port): h.HTTPServer(('', port), h.BaseHTTPRequestHandler).serve_forever()\n"
    serve += "for port in (9108, 40123): t.Thread(target=serve, args=(port,)).start()\n"
    server = subprocess.Popen(
        [
            "kubectl",
            "--kubeconfig",
            str(kubectl.kubeconfig),
            "-n",
            NAMESPACE,
            "exec",
            "other-worker",
            "--",
            "python",
            "-c",
            serve,
        ]
    )

    def reaches(name, namespace, host, port):
        code = f"import socket; socket.create_connection(('{host}', {port}), 3)"
        done = kubectl("-n", namespace, "exec", name, "--", "sh", "-c", f'python -c "{code}" && echo yes', check=False)
        return done.strip().endswith("yes")

    try:
        until(lambda: reaches("worker", NAMESPACE, address, 40123), 60, "workers do not reach each other")
        until(lambda: not reaches("stranger", NAMESPACE, f"store.{SYSTEM}", 9000), 60, "a stranger reaches the store")
        assert reaches("worker", NAMESPACE, f"store.{SYSTEM}", 9000)
        for host, port, may in OUTSIDE:
            subprocess.run(["ip", "address", "replace", f"{host}/32", "dev", "lan"], check=True)
            with socket.create_server((host, port)):
                assert reaches("worker", NAMESPACE, host, port) == may, (host, port)
        assert reaches("prometheus", "watching", address, 9108)
        assert not reaches("prometheus", "watching", address, 40123)
        assert not reaches("curious", "watching", address, 9108)
        assert not reaches("worker", NAMESPACE, "kubernetes.default", 443)
        assert not reaches("stranger", NAMESPACE, address, 40123)
    finally:
        server.kill()
        kubectl("delete", "namespace", "watching", "--wait=false")
        kubectl("-n", NAMESPACE, "delete", "pod", "worker", "other-worker", "stranger", "--wait=false")
