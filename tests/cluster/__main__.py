"""The tests that need a Kubernetes cluster, on one that is made for them on this machine, and gone afterwards.

    python -m tests.cluster [ARGUMENTS OF PYTEST]
    python -m tests.cluster --shell     a shell, where the tests would run
    python -m tests.cluster --up        says how to enter the cluster from another terminal, and stays until Ctrl-C

Where KUBECONFIG is set, the tests run on the cluster that it names; EQUIAV_IMAGE is then the image that its nodes can pull.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from streaming.processes import end_with_parent
from tests.cluster import binaries, cluster

APART = ["unshare", "--net", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]
PREFIX = "equiav-cluster-"
FOLDERS = Path("/var/tmp")  # on a disk: containerd's layers do not go on top of another container's


def main(arguments):
    if arguments[:1] == ["--inside"]:
        return inside(cluster.Cluster(arguments[1]), arguments[2:])
    if os.environ.get("KUBECONFIG"):
        if os.environ.get("EQUIAV_IMAGE"):
            return subprocess.call(tests(arguments))
        print(
            "KUBECONFIG is set: set EQUIAV_IMAGE too, to the image that this cluster's nodes can pull", file=sys.stderr
        )
        return 2
    binaries.check()
    binaries.build(more="cluster_more" in arguments)
    for folder in FOLDERS.glob(f"{PREFIX}*"):
        if not Path("/proc", folder.name.split("-")[2]).exists():  # whoever made it was killed
            remove(folder)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=FOLDERS))
    try:
        return outside(folder, arguments)
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        remove(folder)


def outside(folder, arguments):
    cluster.make_cgroups(folder.name)
    procs = cluster.PROCESSES / folder.name / "cgroup.procs"

    def begin():
        procs.write_text(str(os.getpid()))
        end_with_parent()

    command = [*APART, sys.executable, "-m", "tests.cluster", "--inside", str(folder), *arguments]
    process = subprocess.Popen(command, cwd=cluster.ROOT, preexec_fn=begin)
    (folder / "pid").write_text(str(process.pid))
    try:
        return process.wait()
    except KeyboardInterrupt:  # it got that too, and has something to say
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(10)
        return 128 + signal.SIGINT


def remove(folder):
    """All that there is of a cluster: its processes, cgroups, files. Network and mounts go with the last process."""
    cluster.kill(cluster.PROCESSES / folder.name)
    cluster.remove_cgroups(folder.name)
    shutil.rmtree(folder, ignore_errors=True)


def inside(made, arguments):
    """The first process of the namespaces."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]  # there is no way out
    variables = {"KUBECONFIG": str(made.kubeconfig), "EQUIAV_IMAGE": made.image, "EQUIAV_CLUSTER": str(made.folder)}
    variables["KUBECACHEDIR"] = str(made.folder / "kubectl")
    variables["PATH"] = f"{binaries.program('kubectl').parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ |= variables
    begun = time.monotonic()
    try:
        made.up()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(f"{len(made.nodes)} nodes are ready after {time.monotonic() - begun:.0f} s", flush=True)
    command = tests(arguments)
    if arguments[:1] == ["--up"]:
        process = f"/proc/{(made.folder / 'pid').read_text()}/ns"
        enter = ["nsenter", f"--net={process}/net", f"--mount={process}/mnt", f"--pid={process}/pid_for_children"]
        enter += ["env", "-C", str(cluster.ROOT), *(f"{name}={value}" for name, value in variables.items())]
        print(f"logs: {made.folder}\nenter: {shlex.join([*enter, 'bash'])}\nstays until Ctrl-C", flush=True)
        command = ["sleep", "infinity"]
    elif arguments[:1] == ["--shell"]:
        command = ["bash"]
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the command
    status = wait(subprocess.Popen(command))
    made.stop()
    return status


def wait(process):
    """What its status is. Meanwhile, here end the processes that others have left."""
    while True:
        pid, status = os.wait()
        if pid == process.pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def tests(arguments):
    """-rs: what was skipped is listed at the end, with the reason."""
    named = any(Path(argument.split("::")[0]).exists() for argument in arguments)
    where = [] if named else ["tests/cluster"]
    return [sys.executable, "-m", "pytest", "-m", "cluster", "-rs", "--timeout", "2400", *where, *arguments]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
