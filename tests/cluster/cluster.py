"""A Kubernetes cluster on this machine: every part is the real one, and each node has a network and processes of its own.

What runs in its pods is this checkout: the test image is an empty root, into which the nodes' container runtime mounts the
machine's /usr, Python and the checkout, read-only. So pods are exactly what the manifests say, and no image of 5 GB is made.
"""

import contextlib
import hashlib
import io
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from importlib.metadata import version
from pathlib import Path

from tests.cluster import binaries

ROOT = Path(__file__).parents[2]
IMAGE, PAUSE = "localhost/equiav:test", "localhost/pause:test"
LAN, SERVICES, PODS = "172.30.0", "10.96.0.0/16", "10.88"
SERVER = f"{LAN}.1"
CGROUPS = Path("/sys/fs/cgroup")
PROXY_HEALTH = 10256
PROCESSES = CGROUPS / "pids"  # the hierarchy by which processes are found
SHARES = 64 << 10  # of the processor, for all of the cluster; any other process has 1024
WHO = {  # what each part of the control plane may do goes by its name
    "admin": ("admin", "system:masters"),
    "manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "proxy": ("system:kube-proxy", ""),
}


class Cluster:
    """Made within the namespaces that `python -m tests.cluster` enters, by `up`; then any process there has it by its folder."""

    def __init__(self, folder, count=3):
        self.folder, self.image = Path(folder), IMAGE
        self.nodes = [f"node-{number}" for number in range(count)]
        self.kubeconfig = self.folder / "admin.kubeconfig"
        self.kubectl = Kubectl(self.kubeconfig)

    def up(self):
        """Returns once every node is ready."""
        self._network()
        # What manifests name that are applied as they are.
        released = [f"docker.io/library/equiav:{version('equiav')}", "docker.io/prom/prometheus:v3.5.0"]
        write_image(self.folder / "equiav.tar", [IMAGE, *released], image_settings())
        write_image(self.folder / "pause.tar", [PAUSE], {"Entrypoint": ["/busybox", "sleep", "1000000000"]})
        self._control_plane()
        for number in range(len(self.nodes)):
            self.start(number)
        for number in range(len(self.nodes)):
            self.until(lambda number=number: self.ready(number), 120, f"node-{number} is not ready")
        taints = ("get", "nodes", "-o", "jsonpath={.items[*].spec.taints}")  # pods go nowhere until they are off
        self.until(lambda: not self.kubectl(*taints), 30, "a node is still tainted")
        self.volumes()

    def stop(self):
        for number in range(len(self.nodes)):
            self.kill(number)
        kill(self._group("control"))
        run("ip", "link", "delete", "lan", check=False)
        for name in (*self.nodes, "control"):
            remove_cgroups(f"{self.folder.name}/{name}")

    def start(self, number):
        """The machine is switched on, for the first time or after `kill`: with the disk that it had, and nothing else."""
        name, address = self.nodes[number], node_address(number)
        remove_cgroups(f"{self.folder.name}/{name}")
        make_cgroups(f"{self.folder.name}/{name}/daemons")
        run("ip", "netns", "add", name)
        run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", name, "master", "lan", "up")
        run("ip", "route", "replace", f"{PODS}.{number}.0/24", "via", address)
        links = ["link set lo up", f"address add {address}/24 dev eth0", "link set eth0 up"]
        links += [f"route add default via {SERVER}"]
        others = (other for other in range(len(self.nodes)) if other != number)
        links += [f"route add {PODS}.{other}.0/24 via {node_address(other)}" for other in others]
        run("ip", "-n", name, "-batch", "-", input="\n".join(links))
        self._node_settings(number)
        apart = ["nsenter", f"--net=/run/netns/{name}", "unshare", "--mount", "--uts", "--pid", "--fork"]
        apart += ["--kill-child", "--mount-proc", "sh", "-eu", "-c", self._node_script(number)]
        self._start(f"{name}/daemons", self.folder / name / "node.log", *apart)

    def kill(self, number):
        """The machine loses its power: its network and all of its processes are gone, unasked."""
        run("ip", "link", "delete", self.nodes[number], check=False)
        kill(self._group(self.nodes[number]))
        run("ip", "netns", "delete", self.nodes[number], check=False)

    def cut(self, number):
        """Off the network; its processes live on."""
        run("ip", "link", "set", self.nodes[number], "down")

    def join(self, number):
        run("ip", "link", "set", self.nodes[number], "up")

    def processes(self, where, words):
        """Of a node, or of `control`: those with these words in their command."""
        group = self._group(where if isinstance(where, str) else self.nodes[where])
        pids = [int(pid) for path in group.rglob("cgroup.procs") for pid in read(path).split()]
        return [pid for pid in pids if words in read_bytes(Path(f"/proc/{pid}/cmdline"))]

    def send(self, where, program, number):
        """A signal to a program, which a node starts again when it has ended."""
        sent = [pid for pid in self.processes(where, b"") if read(Path(f"/proc/{pid}/comm")).strip() == program[:15]]
        assert sent, f"no {program} runs at {where}"
        for pid in sent:
            os.kill(pid, number)

    def ready(self, number):
        path = '{.status.conditions[?(@.type=="Ready")].status}'
        return self.kubectl("get", "node", self.nodes[number], "-o", f"jsonpath={path}", check=False) == "True"

    def until(self, condition, seconds, what):
        """Waits; what it took."""
        begun = time.monotonic()
        while not condition():
            if time.monotonic() - begun > seconds:
                raise TimeoutError(f"{what} after {seconds} s (the logs are in {self.folder})")
            time.sleep(0.3)
        return time.monotonic() - begun

    def volumes(self, count=4):
        """Persistent volumes, empty, that a claim which names no class gets: as an administrator provides them.

        They are one folder of this machine on every node. A volume once claimed is not given to another claim: a test that
        claims some calls this for new ones, when the claims are gone.
        """
        objects = [
            {
                "apiVersion": "storage.k8s.io/v1",
                "kind": "StorageClass",
                "metadata": {"name": "local", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
                "provisioner": "kubernetes.io/no-provisioner",
                "volumeBindingMode": "Immediate",
            }
        ]
        for name in (f"local-{number}" for number in range(count)):
            folder = self.folder / "volumes" / name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            folder.chmod(0o777)  # pods are not root
            spec = {"capacity": {"storage": "20Gi"}, "accessModes": ["ReadWriteOnce", "ReadWriteMany"]}
            spec |= {"storageClassName": "local", "hostPath": {"path": str(folder)}}
            objects.append({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": spec})
        self.kubectl("delete", "pv", "--ignore-not-found", *(f"local-{number}" for number in range(count)))
        self.kubectl.apply(*objects)

    def _group(self, *names):
        return PROCESSES.joinpath(self.folder.name, *names)

    def _start(self, group, log, *command):
        """A process that outlives this one, in the group, by which it is found again."""
        procs = self._group(group) / "cgroup.procs"
        with log.open("ab") as file:
            subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment(self.folder),
                cwd="/",
                start_new_session=True,  # Ctrl-C is for the tests
                preexec_fn=lambda: procs.write_text(str(os.getpid())),
            )

    def _network(self):
        run("mount", "-t", "tmpfs", "none", "/run")  # of this cluster alone
        Path("/run/netns").mkdir()
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "lan", "type", "bridge")
        run("ip", "address", "add", f"{SERVER}/24", "dev", "lan")
        run("ip", "link", "set", "lan", "up")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")

    def _control_plane(self):
        pki, kubeconfig = self.folder / "pki", {name: self.folder / f"{name}.kubeconfig" for name in WHO}
        pki.mkdir()
        run("openssl", "genrsa", "-out", pki / "sa.key", "2048")
        run("openssl", "rsa", "-in", pki / "sa.key", "-pubout", "-out", pki / "sa.pub")
        users = WHO | {name: (f"system:node:{name}", "system:nodes") for name in self.nodes}
        rows = [f'{token(name)},{user},{name},"{group}"' for name, (user, group) in users.items()]
        (pki / "tokens.csv").write_text("\n".join(rows) + "\n")
        for name, path in kubeconfig.items():
            write_kubeconfig(path, name)
        names = f"kubernetes cluster.local in-addr.arpa {{\n  kubeconfig {self.kubeconfig}\n  ttl 2\n }}"
        (self.folder / "Corefile").write_text(f".:53 {{\n bind {SERVER}\n {names}\n cache 2\n}}\n")
        make_cgroups(f"{self.folder.name}/control")
        self._daemon("etcd", "--data-dir", self.folder / "etcd", "--unsafe-no-fsync")
        self._daemon(
            binaries.program("kube-apiserver"),
            *("--etcd-servers", "http://127.0.0.1:2379", "--bind-address", SERVER, "--advertise-address", SERVER),
            *("--cert-dir", pki, "--token-auth-file", pki / "tokens.csv", "--authorization-mode", "Node,RBAC"),
            *("--enable-admission-plugins", "NodeRestriction", "--service-cluster-ip-range", SERVICES),
            *("--service-account-issuer", "https://kubernetes.default.svc"),
            *("--service-account-key-file", pki / "sa.pub", "--service-account-signing-key-file", pki / "sa.key"),
            *("--kubelet-preferred-address-types", "InternalIP", "--allow-privileged=false"),
        )
        self.until(lambda: self.kubectl("get", "--raw", "/readyz", check=False) == "ok", 90, "no API server")
        self._daemon(
            binaries.program("kube-controller-manager"),
            *("--kubeconfig", kubeconfig["manager"], "--leader-elect=false", "--use-service-account-credentials=true"),
            *("--service-account-private-key-file", pki / "sa.key", "--root-ca-file", pki / "apiserver.crt"),
            *("--flex-volume-plugin-dir", self.folder / "volume-plugins"),
            # A node that says nothing is found lost after 8 seconds, instead of 50.
            *("--node-monitor-grace-period", "8s", "--node-monitor-period", "2s"),
        )
        scheduler = ("--kubeconfig", kubeconfig["scheduler"], "--leader-elect=false")
        self._daemon(binaries.program("kube-scheduler"), *scheduler)
        self._daemon(binaries.program("coredns"), "-conf", self.folder / "Corefile")

    def _daemon(self, program, *arguments):
        self._start("control", self.folder / f"{Path(program).name}.log", program, *arguments)

    def _node_settings(self, number):
        folder, name = self.folder / self.nodes[number], self.nodes[number]
        folder.mkdir(exist_ok=True)
        addresses = {
            "type": "host-local",
            "dataDir": "/run/addresses",  # a machine that is switched on has no pods
            "ranges": [[{"subnet": f"{PODS}.{number}.0/24"}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": False, "ipam": addresses}
        ports = {"type": "portmap", "capabilities": {"portMappings": True}}
        (folder / "cni").mkdir(exist_ok=True)
        network = {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge, ports]}
        (folder / "cni" / "10-pods.conflist").write_text(json.dumps(network))
        (folder / "spec.json").write_text(json.dumps(container_settings()))
        (folder / "containerd.toml").write_text(CONTAINERD.format(folder=folder, pause=PAUSE))
        kubelet = KUBELET | {"cgroupRoot": f"/{self.folder.name}/{name}"}
        (folder / "kubelet.json").write_text(json.dumps(kubelet))
        write_kubeconfig(folder / "kubeconfig", name)

    def _node_script(self, number):
        """The first process of a node. Its /run is empty, its /var is its own but for what has to be seen of this machine's."""
        folder, name = self.folder / self.nodes[number], self.nodes[number]
        var = folder / "var"
        shared = [path for path in (self.folder, binaries.CACHE, *mounted()) if path.is_relative_to("/var")]
        kubelet = [binaries.program("kubelet"), "--config", folder / "kubelet.json"]
        kubelet += ["--kubeconfig", folder / "kubeconfig", "--node-ip", node_address(number)]
        kubelet += ["--hostname-override", name, "--node-labels", "topology.kubernetes.io/zone=zone-a"]
        proxy = [binaries.program("kube-proxy"), "--kubeconfig", self.folder / "proxy.kubeconfig"]
        proxy += ["--hostname-override", name, "--cluster-cidr", f"{PODS}.0.0/16"]
        # What the kernel keeps for the machine, not for a network namespace, is not changed.
        proxy += ["--conntrack-max-per-core", "0", "--conntrack-tcp-timeout-established", "0"]
        proxy += ["--conntrack-tcp-timeout-close-wait", "0", "--healthz-bind-address", f"127.0.0.1:{PROXY_HEALTH}"]
        router = [binaries.program("kube-router"), "--run-firewall=true", "--run-router=false"]
        router += ["--run-service-proxy=false", "--kubeconfig", self.kubeconfig, "--hostname-override", name]
        router += ["--service-cluster-ip-range", SERVICES, "--iptables-sync-period", "5s", "--health-port", "0"]
        # The router writes back the rules that it has read: what the proxy wrote between the two would be lost.
        proxied = f"busybox wget -q -O /dev/null http://127.0.0.1:{PROXY_HEALTH}/healthz"
        lines = [
            f"hostname {name}",
            f"mkdir -p {var}/lib {var}/log {var}/tmp",
            f"ln -sfn /run {var}/run",
            *(f"mkdir -p {folder}{path}; mount --rbind {path} {folder}{path}" for path in shared),
            f"mount --rbind {var} /var",
            "mount -t tmpfs none /run",
            "echo 1 > /proc/sys/net/ipv4/ip_forward",
            *(
                f"echo {value} > /run/{Path(key).name}; mount --bind /run/{Path(key).name} {key}"
                for key, value in KERNEL
            ),
            f'keep() {{ while :; do "$@" >> {folder}/$(basename "$1").log 2>&1 || sleep 1; done & }}',
            f"keep containerd -c {folder}/containerd.toml",
            "until ctr version > /dev/null 2>&1; do sleep 0.1; done",
            *(f"ctr -n k8s.io images import {self.folder}/{image}.tar" for image in ("equiav", "pause")),
            *(f"keep {shlex.join(map(str, command))}" for command in (kubelet, proxy)),
            f"export KUBERNETES_SERVICE_HOST={SERVER}",
            f"until {proxied} 2> /dev/null; do sleep 0.3; done",
            f"keep {shlex.join(map(str, router))}",
            "wait",
        ]
        return "\n".join(lines)


class Kubectl:
    """`kubectl` of a cluster: what it prints."""

    def __init__(self, kubeconfig):
        self.kubeconfig = Path(kubeconfig)

    def __call__(self, *arguments, input=None, check=True):
        ours = binaries.program("kubectl")
        command = ours if ours.exists() else "kubectl"
        return run(command, "--kubeconfig", self.kubeconfig, *arguments, input=input, check=check)

    def json(self, *arguments):
        return json.loads(self(*arguments, "-o", "json"))

    def apply(self, *objects):
        self("apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))


def run(*command, check=True, input=None):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, input=input)
    if check and done.returncode:
        what = " ".join(str(word) for word in command)
        raise RuntimeError(f"{what}: status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def environment(folder):
    """Of the cluster's daemons: not of who starts them, whose proxies and settings of Go are for another network."""
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(folder)}


def node_address(number):
    return f"{LAN}.{10 + number}"


def token(name):
    return f"token-of-{name}"


def write_kubeconfig(path, name):
    cluster = {"server": f"https://{SERVER}:6443", "insecure-skip-tls-verify": True}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": name, "user": {"token": token(name)}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
        "current-context": "test",
    }
    path.write_text(json.dumps(config))


def kill(group):
    """Every process in the group and those below it: until none is left, since one may be starting another."""
    deadline = time.monotonic() + 30
    while processes := [pid for path in group.rglob("cgroup.procs") for pid in read(path).split()]:
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {', '.join(processes)} of {group} do not end")
        time.sleep(0.02)


def read(path):
    return read_bytes(path).decode()


def read_bytes(path):
    with contextlib.suppress(OSError):  # a process, a container's group may go meanwhile
        return path.read_bytes()
    return b""


def hierarchies():
    return [path for path in sorted(CGROUPS.iterdir()) if (path / "cgroup.procs").exists()]


def make_cgroups(name):
    """In every hierarchy, with processors and memory: a new group has none, and cannot be entered."""
    for hierarchy in hierarchies():
        (hierarchy / name).mkdir(parents=True, exist_ok=True)
        for group in lineage(name):
            for file in ("cpuset.cpus", "cpuset.mems"):
                if hierarchy.name == "cpuset":
                    (hierarchy / group / file).write_text((hierarchy / file).read_text())
            # Else all of the cluster has the share of one process, and whatever else runs here starves it.
            shares = hierarchy / lineage(name)[0] / "cpu.shares"
            if shares.exists():
                shares.write_text(str(SHARES))


def lineage(path):
    """`a/b/c` -> `a`, `a/b`, `a/b/c`."""
    return [str(parent) for parent in [*reversed(Path(path).parents), Path(path)][1:]]


def remove_cgroups(name):
    """Whose processes have ended."""
    for top in (hierarchy / name for hierarchy in hierarchies()):
        for path in sorted([top, *top.rglob("*/")], reverse=True):
            for _ in range(50):
                try:
                    path.rmdir()
                except FileNotFoundError:
                    pass
                except OSError:  # the last process is still being buried
                    time.sleep(0.02)
                    continue
                break


def mounted():
    """Into every container, read-only, at the path that they have here: the environment refers to the checkout by it."""
    checkout = [ROOT / name for name in ("equiav", "streaming", "launch", "monitoring", "tests")]
    paths = [Path("/usr"), Path(sys.base_prefix), Path(sys.prefix), binaries.program("prometheus").parent, *checkout]
    return [path for path in paths if path.exists() and (path == Path("/usr") or not path.is_relative_to("/usr"))]


def container_settings():
    """What the runtime starts from when it makes a container; a pod's settings come on top."""
    settings = json.loads(run("ctr", "oci", "spec"))
    for path in map(str, mounted()):
        mount = {"destination": seen(path), "type": "bind", "source": path, "options": ["rbind", "ro"]}
        settings["mounts"].append(mount)
    return settings


def seen(path):
    """Where a container has what is here at `path`: not in /tmp, where a pod has a volume of its own."""
    return f"/here{path}" if Path(path).is_relative_to("/tmp") else str(path)


def image_settings():
    ours = f"{seen(sys.prefix)}/bin:{seen(binaries.program('prometheus').parent)}"
    path = f"{ours}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {
        "Env": [f"PATH={path}", "PYTHONDONTWRITEBYTECODE=1", "PYTHONUNBUFFERED=1", f"PYTHONPATH={seen(ROOT)}"],
        "User": "10001:10001",
        "WorkingDir": "/",
    }


def write_image(path, names, settings):
    """As `docker save` would: a root of folders onto which things are mounted, and the few files of /etc that programs read."""
    layer = skeleton()
    about = {"architecture": {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()], "os": "linux"}
    about |= {
        "config": settings,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": names, "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as tar:
        add(tar, "config.json", json.dumps(about).encode())
        add(tar, "manifest.json", json.dumps(manifest).encode())
        add(tar, "layer.tar", layer)


def skeleton():
    layer, made = io.BytesIO(), set()
    folders = ["dev", "etc", "home", "proc", "run", "sys", "tmp", "var/tmp", *(seen(path)[1:] for path in mounted())]
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for folder in folders:
            for name in lineage(folder):
                if name not in made:
                    made.add(name)
                    add(tar, name, kind=tarfile.DIRTYPE, mode=0o1777 if name.endswith("tmp") else 0o755)
        for name in ("bin", "lib", "lib64", "sbin"):
            add(tar, name, kind=tarfile.SYMTYPE, mode=0o777, target=f"usr/{name}")
        add(tar, "etc/passwd", b"root:x:0:0::/root:/bin/sh\nequiav:x:10001:10001::/tmp:/bin/sh\n")
        add(tar, "etc/group", b"root:x:0:\nequiav:x:10001:\n")
        add(tar, "etc/nsswitch.conf", b"hosts: files dns\n")
        add(tar, "etc/hosts")
        add(tar, "etc/resolv.conf")
        # The runtime mounts nothing into the container that holds a pod's network: what runs there is in the image.
        add(tar, "busybox", Path(shutil.which("busybox")).read_bytes(), mode=0o755)
        for path in ("/etc/ld.so.cache", "/etc/ssl/openssl.cnf", "/etc/ssl/certs"):
            if Path(path).exists():
                tar.add(path)
    return layer.getvalue()


def add(tar, name, content=b"", kind=tarfile.REGTYPE, mode=0o644, target=""):
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.size, entry.linkname = kind, mode, len(content), target
    tar.addfile(entry, io.BytesIO(content))


KERNEL = [  # What the kubelet sets for the whole machine: it is shown that all is as it wishes, and leaves it alone.
    ("/proc/sys/vm/overcommit_memory", 1),
    ("/proc/sys/vm/panic_on_oom", 0),
    ("/proc/sys/kernel/panic", 10),
    ("/proc/sys/kernel/panic_on_oops", 1),
    ("/proc/sys/kernel/keys/root_maxkeys", 1000000),
    ("/proc/sys/kernel/keys/root_maxbytes", 25000000),
]
CONTAINERD = """
version = 2
disabled_plugins = ["io.containerd.internal.v1.opt"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    base_runtime_spec = "{folder}/spec.json"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{folder}/cni"
"""
KUBELET = {
    "apiVersion": "kubelet.config.k8s.io/v1beta1",
    "kind": "KubeletConfiguration",
    "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
    "authorization": {"mode": "AlwaysAllow"},  # `kubectl logs` and `exec`
    "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
    "volumePluginDir": "/var/lib/kubelet/volume-plugins",
    "clusterDNS": [SERVER],
    "clusterDomain": "cluster.local",
    "resolvConf": "",
    "nodeStatusUpdateFrequency": "2s",
    "volumeStatsAggPeriod": "5s",  # by which a volume is found to be too full
    "cgroupDriver": "cgroupfs",
    "failCgroupV1": False,
    "enforceNodeAllocatable": [],
    "failSwapOn": False,
    "featureGates": {"KubeletInUserNamespace": True},  # the kernel's settings are not this test's to change
    # The disk of this machine may well be nearly full, and that is not what is tested.
    "evictionHard": {
        "memory.available": "100Mi",
        **dict.fromkeys(("nodefs.available", "imagefs.available", "nodefs.inodesFree", "imagefs.inodesFree"), "1%"),
    },
    "imageGCHighThresholdPercent": 100,
}
