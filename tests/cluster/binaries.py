"""The programs that a Kubernetes cluster consists of: Debian's are asked for, the others are built once, into a cache.

    python -m tests.cluster.binaries [more]     `more`: those too that only some tests want

A program's folder in the cache is named by its version: a new version is built beside the old one.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

KUBERNETES = "1.34.4"  # the last that takes cgroup v1 without being told to, and Debian 12's containerd 1.6
COMMANDS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl")
MODULES = {  # program -> its module, the package in it, the version
    "coredns": ("github.com/coredns/coredns", "", "1.12.4"),  # of the time of Kubernetes 1.34
    # Others that enforce network policies want the kernel to queue packets to a program: not every kernel can.
    "kube-router": ("github.com/cloudnativelabs/kube-router/v2", "/cmd/kube-router", "2.1.0"),
    "kube-score": ("github.com/zegl/kube-score", "/cmd/kube-score", "1.20.0"),  # a linter of manifests
    "prometheus": ("github.com/prometheus/prometheus", "/cmd/prometheus", "0.305.0"),  # 3.5.0; Debian's finds no pods
}
MORE = {
    "kwok": ("sigs.k8s.io/kwok", "/cmd/kwok", "0.8.0"),  # thousands of simulated nodes
    "kube-state-metrics": ("k8s.io/kube-state-metrics/v2", "", "2.18.0"),
    "kueue": ("sigs.k8s.io/kueue", "/cmd/kueue", "0.17.0"),  # older ones do not build as a module
    "jobset": ("sigs.k8s.io/jobset", "", "0.11.1"),  # what Trainer makes of a TrainJob, as its go.mod says
    "trainer-controller-manager": ("github.com/kubeflow/trainer/v2", "/cmd/trainer-controller-manager", "2.2.0"),
}
FILES = {  # of a program's module, to be kept beside it
    "kwok": [
        "kustomize/stage/node/fast/node-initialize.yaml",
        "kustomize/stage/node/heartbeat-with-lease/node-heartbeat-with-lease.yaml",
        "kustomize/stage/pod/fast/pod-ready.yaml",
        "kustomize/stage/pod/fast/pod-delete.yaml",
    ],
    "kueue": ["config/components/crd/bases", "config/components/webhook/manifests.yaml"],
    "jobset": ["config/components/crd/bases", "config/components/webhook/manifests.yaml"],
    "trainer-controller-manager": ["manifests/base/crds", "manifests/base/webhook/manifests.yaml"],
}
PACKAGES = {  # of Debian: a program -> the package that has it. Any version from Debian 12 on will do.
    "etcd": "etcd-server",
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "busybox": "busybox-static",
    "iptables": "iptables",
    "ipset": "ipset",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "openssl": "openssl",
}
CACHE = Path(os.environ.get("EQUIAV_CLUSTER_CACHE") or "~/.cache/equiav/cluster").expanduser()


def program(name):
    """Where it is once it is built."""
    if name in COMMANDS:
        return CACHE / f"kubernetes-{KUBERNETES}" / name
    return CACHE / f"{name}-{(MODULES | MORE)[name][2]}" / name


def missing():
    """What has to be done before a cluster can be made here: a list, empty if nothing has to."""
    said = []
    if packages := sorted({package for name, package in PACKAGES.items() if not shutil.which(name)}):
        said.append(f"apt-get install -y --no-install-recommends {' '.join(packages)}")
    if not shutil.which("go") and not all(program(name).exists() for name in (*COMMANDS, *MODULES)):
        said.append("install Go, 1.24 or newer")
    if os.geteuid():
        said.append("be root: the nodes are network namespaces and cgroups of this machine")
    if not Path("/sys/fs/cgroup/pids").exists():
        said.append("boot with cgroup v1 (systemd.unified_cgroup_hierarchy=0): it is the one that is tried")
    return said


def check():
    if problems := missing():
        print("\n  ".join(["To make a Kubernetes cluster on this machine, first:", *problems]), file=sys.stderr)
        sys.exit(2)


def build(more=False):
    CACHE.mkdir(parents=True, exist_ok=True)
    if not all(program(name).exists() for name in COMMANDS):
        _build(f"kubernetes-{KUBERNETES}", kubernetes)
    for name, (module, package, version) in (MODULES | (MORE if more else {})).items():
        if not program(name).exists():
            _build(program(name).parent.name, partial(install, name, module, package, f"v{version}"))


def _build(name, make):
    """Under a temporary name first: what has its name in the cache is whole."""
    print(f"building {name} ...", end=" ", flush=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=CACHE) as folder:
        work, into = Path(folder, "work"), Path(folder, "into")
        work.mkdir()
        into.mkdir()
        make(work, into)
        shutil.rmtree(CACHE / name, ignore_errors=True)  # of a list of programs that was shorter
        into.rename(CACHE / name)
    print(f"{time.monotonic() - begun:.0f} s", flush=True)


def install(name, module, package, version, work, into):
    source = Path(json.loads(go(work, "mod", "download", "-json", f"{module}@{version}"))["Dir"])
    go(source, "build", "-o", f"{into}/", f".{package}")
    for wanted in FILES.get(name, []):
        for path in [source / wanted] if (source / wanted).is_file() else (source / wanted).iterdir():
            (into / path.name).write_bytes(path.read_bytes())


def go(folder, *arguments, **environment):
    flags = {"CGO_ENABLED": "0", "GOFLAGS": "-trimpath", "GOWORK": "off"}
    done = subprocess.run(
        ["go", *arguments], cwd=folder, env=os.environ | flags | environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"failed\ngo {' '.join(arguments)}: {done.stderr[-3000:]}")
    return done.stdout


def kubernetes(work, into):
    """Its modules ask for each other in version 0.0.0, which nobody has: a module of our own says which ones are meant."""
    name, commands = "k8s.io/kubernetes", [f"k8s.io/kubernetes/cmd/{command}" for command in COMMANDS]
    go(work, "mod", "init", "equiav.invalid/cluster")
    go(work, "mod", "edit", "-godebug=default=go1.24", f"-require={name}@v{KUBERNETES}")  # what it is released with
    path = go(work, "mod", "download", "-json", f"{name}@v{KUBERNETES}").split('"GoMod": "')[1].split('"')[0]
    lines = [line.split() for line in Path(path).read_text().splitlines()]
    parts = sorted({line[0] for line in lines if len(line) >= 2 and line[1] == "v0.0.0"})
    go(work, "mod", "edit", *(f"-replace={part}={part}@v0.{KUBERNETES.removeprefix('1.')}" for part in parts))
    imports = "".join(f'import _ "{command}"\n' for command in commands)
    (work / "commands.go").write_text(f"//go:build never\n\npackage cluster\n\n{imports}")  # `tidy` keeps what is named
    go(work, "mod", "tidy")
    stamp = {"gitVersion": f"v{KUBERNETES}", "gitMajor": "1", "gitMinor": KUBERNETES.split(".")[1]}
    flags = "".join(f" -X k8s.io/component-base/version.{key}={value}" for key, value in stamp.items())
    go(work, "build", "-ldflags", f"-s -w{flags}", "-o", f"{into}/", *commands)


if __name__ == "__main__":
    check()
    build("more" in sys.argv[1:])
