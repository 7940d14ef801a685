"""New Python processes, forked from one that has imported torch once: an interpreter that imports it takes four seconds.

`install()` puts it under `subprocess` and under multiprocessing's ways to start a process, here and in every process that
is started so. They are processes of their own all the same, children of who asked for them: signals, statuses, pipes, sessions
and memory are real. What has to be a new interpreter (it measures its memory, it may not have imported torch) sets APART in its
environment. /proc shows the environment and the command line of the server: `kind` is what a process calls itself.

A process cannot give a child to another. The server, a child of who asks, forks a process that forks another and ends; the
orphan goes to the nearest ancestor that adopts orphans, which who asks is for that moment.
"""

import array
import ctypes
import fcntl
import gc
import importlib
import os
import pickle
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
from contextlib import suppress
from multiprocessing import util
from pathlib import Path

APART = {"EQUIAV_APART": "1"}
IMPORTED = (
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.elastic.rendezvous.registry",
    "torch.distributed.launcher.api",
    "torch.utils.checkpoint",
    "torchaudio",
    "s3fs",
    "equiav.cli",
    "equiav.api",
    *(f"equiav.commands.{path.stem}" for path in Path("equiav/commands").glob("[a-z]*.py")),
    "monitoring.exporter",
    "safetensors.torch",
)
DEATH_SIGNAL, NAME, ADOPTS = 1, 15, 36  # of prctl
HIGH = 512  # number of a descriptor that is in nobody's way
execute, spawn = subprocess.Popen._execute_child, util.spawnv_passfds
prctl = ctypes.CDLL(None).prctl


def kind(pid):
    """The name of a process, which a new interpreter has in its command line; or nothing: it is gone."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_text()
        return "forkserver" if "forkserver" in line else Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def rank(pid):
    """Of one of torchrun's workers."""
    try:
        words = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return None
    name = next((word.replace("RANK=", "rank-") for word in words if word.startswith("RANK=")), kind(pid))
    return int(name.removeprefix("rank-")) if name.startswith("rank-") else None


# ---- who asks -----------------------------------------------------------------------------------------------------------


class Server:
    def __init__(self, connection=None):
        self.connection, self.lock = connection, threading.Lock()

    def start(self):
        """In this process it has to be a new interpreter: this one has threads."""
        self.connection, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tests.forks", str(theirs.fileno())]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **APART}
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=env)
        theirs.close()

    def ask(self, job):
        """-> the pid of a new child of this process."""
        with self.lock:
            prctl(ADOPTS, 1)
            try:
                send(self.connection, job)
                return receive(self.connection)["pid"]
            finally:
                prctl(ADOPTS, 0)


SERVER = Server()


def install():
    subprocess.Popen._execute_child = execute_child
    util.spawnv_passfds = spawned


ARGUMENTS = (  # of `_execute_child`, behind the command
    *("executable", "preexec_fn", "close_fds", "pass_fds", "cwd", "env", "startupinfo", "creationflags", "shell"),
    *("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite", "restore_signals", "gid", "gids"),
    *("uid", "umask", "start_new_session", "process_group"),
)


def execute_child(self, args, *rest):
    """In the place of that of `subprocess.Popen`."""
    of = dict(zip(ARGUMENTS, rest, strict=True))
    env = dict(os.environ if of["env"] is None else of["env"])
    what = program(args) if isinstance(args, list | tuple) else None
    usual = of["uid"] is of["gid"] is of["gids"] is of["preexec_fn"] is None and not of["shell"]
    if what is None or not usual or of["umask"] != -1 or "EQUIAV_APART" in env:
        return execute(self, args, *rest)
    given = (of["p2cread"], of["c2pwrite"], of["errwrite"])
    streams = [own if one == -1 else one for own, one in enumerate(given)]
    places = {**dict(enumerate(streams)), **{fd: fd for fd in of["pass_fds"]}}
    env = {os.fsdecode(name): os.fsdecode(value) for name, value in env.items()}
    cwd = os.path.abspath(os.fsdecode(of["cwd"] or os.getcwd()))
    self.pid = SERVER.ask({**what, "cwd": cwd, "env": env, "session": of["start_new_session"], "places": places})
    self._child_created = True
    self._close_pipe_fds(*(of[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")))
    return None


def program(command):
    """What a command of Python runs; None: it is another program, or wants options that a fork cannot have."""
    head, *rest = [os.fspath(part) for part in command]
    unbuffered = rest[:1] == ["-u"]
    rest = rest[unbuffered:]
    if head != sys.executable or not rest:
        return None
    if rest[0] in ("-m", "-c") and len(rest) > 1:
        return {"how": rest[0], "what": rest[1], "argv": rest[2:], "unbuffered": unbuffered}
    if rest[0].startswith("-"):
        return None
    return {"how": "script", "what": rest[0], "argv": rest[1:], "unbuffered": unbuffered}


def spawned(path, args, passfds):
    """What multiprocessing starts: its resource tracker, its fork server, a process by `spawn`."""
    args = [os.fsdecode(part) for part in args]
    if "EQUIAV_APART" in os.environ or "-c" not in args:
        return spawn(path, args, passfds)
    at = args.index("-c")
    places = {fd: fd for fd in (0, 1, 2, *passfds)}
    job = {"how": "-c", "what": args[at + 1], "argv": args[at + 2 :], "unbuffered": False, "session": False}
    return SERVER.ask({**job, "cwd": os.getcwd(), "env": dict(os.environ), "places": places})


def send(connection, message):
    """Its descriptors go along."""
    message["mask"] = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    data, fds = pickle.dumps(message), array.array("i", message.get("places", {}).values())
    head = [struct.pack("Q", len(data))]
    connection.sendmsg(head, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else [])
    connection.sendall(data)


def receive(connection):
    """None: nobody asks any more."""
    head, extra, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(256 * 4))
    if not head:
        return None
    fds = array.array("i")
    for _, _, content in extra:
        fds.frombytes(content)
    size, data = struct.unpack("Q", head)[0], b""
    while len(data) < size:
        data += connection.recv(size - len(data))
    message = pickle.loads(data)
    message["fds"] = list(fds)
    return message


# ---- the server ---------------------------------------------------------------------------------------------------------


def serve(connection):
    """-> a job, in the process that is to do it."""
    while (job := receive(connection)) is not None:
        read, write = os.pipe()
        go, gone = os.pipe()
        middle = os.fork()
        if not middle:
            child = os.fork()
            if child:
                os.write(write, str(child).encode())
                os._exit(0)
            os.close(gone)
            os.read(go, 1)  # until its parent is who asked
            connection.close()
            return job
        os.waitpid(middle, 0)
        pid = int(os.read(read, 20))
        for fd in (read, write, go, gone, *job["fds"]):
            os.close(fd)
        send(connection, {"pid": pid})
    os._exit(0)


def become(job):
    """This process is as a new one would be."""
    above = max(job["places"], default=2) + 1
    held = {place: moved(fd, above) for place, fd in zip(job["places"], job["fds"], strict=True)}
    close_all_but(held.values())
    for place in (0, 1, 2):
        if place not in held:
            os.open(os.devnull, os.O_RDWR)
    for place, fd in held.items():
        os.dup2(fd, place)
        os.close(fd)
    if job["session"]:
        os.setsid()
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    tempfile.tempdir = None  # TMPDIR may be another
    multiprocessing = job["how"] == "-c" and job["what"].startswith("from multiprocessing")
    name = job["env"].get("RANK")
    of_python = next(
        (what for what in ("forkserver", "spawn") if multiprocessing and f".{what}" in job["what"]), job["what"]
    )
    name = f"rank-{name}" if name is not None and not multiprocessing else of_python
    prctl(NAME, name.encode()[:15])
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, job["mask"])
    for place, (stream, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        lines = mode == "w" and (
            place == 2 or job["unbuffered"] or os.isatty(place) or "PYTHONUNBUFFERED" in job["env"]
        )
        errors = "backslashreplace" if place == 2 else "strict"
        opened = open(place, mode, buffering=1 if lines else -1, closefd=False, encoding="utf-8", errors=errors)  # noqa: SIM115
        setattr(sys, stream, opened)
        setattr(sys, f"__{stream}__", opened)
    if not multiprocessing:  # those start nothing
        own_server(job)
        install()


def moved(fd, least):
    """The same descriptor under a number that is not below `least`."""
    other = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least)
    os.close(fd)
    return other


def close_all_but(kept):
    for fd in set(map(int, os.listdir("/proc/self/fd"))) - set(kept):
        with suppress(OSError):  # that of the list itself
            os.close(fd)


def own_server(job):
    """What this process starts are its own children: it has a server of its own, forked while it has no threads."""
    connection, theirs = socket.socketpair()
    if not os.fork():
        prctl(DEATH_SIGNAL, signal.SIGKILL)
        prctl(NAME, b"forks")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        kept = moved(theirs.detach(), HIGH)
        close_all_but([kept])
        for _ in range(3):
            os.open(os.devnull, os.O_RDWR)
        work(socket.socket(fileno=kept))
    theirs.close()
    high = moved(connection.detach(), HIGH)
    SERVER.connection, SERVER.lock = socket.socket(fileno=high), threading.Lock()


def work(connection):
    """Serves; in the processes that it makes, does their job and ends as an interpreter does."""
    job = serve(connection)
    become(job)
    how, what = job["how"], job["what"]
    first = {"-m": job["cwd"], "-c": "", "script": os.path.dirname(os.path.abspath(what))}[how]
    sys.path[:] = [first, *filter(None, job["env"].get("PYTHONPATH", "").split(":")), *sys.path[1:]]
    sys.argv = [what if how == "script" else how, *job["argv"]]
    status = 0
    try:
        if how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif how == "script":
            runpy.run_path(what, run_name="__main__")
        else:
            module = types.ModuleType("__main__")
            module.__spec__ = None
            sys.modules["__main__"] = module
            exec(compile(what, "<string>", "exec"), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        skip = 3 if how == "-m" else 2  # frames of this file and of runpy
        trace = error.__traceback__
        for _ in range(skip):
            trace = trace.tb_next if trace and trace.tb_next else trace
        sys.excepthook(type(error), error, trace)
        status = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    sys.exit(status)


def main():
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    prctl(DEATH_SIGNAL, signal.SIGKILL)
    work(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
