"""A store that answers late, wrongly, in part or not at all: the right bytes come back, or one clear error."""

import asyncio
import base64
import gc
import itertools
import os
import random
import re
import resource
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from equiav.data.local_s3 import LocalS3
from streaming import Store
from streaming.store import Denied, Missing, NoAnswer, NoStore, Short, StoreError, TooLarge
from tests.streaming.fault_proxy import FaultProxy
from tests.streaming.toys import make_dataset, open_loader, take

BIG = random.Random(0).randbytes(300_000)


@pytest.fixture(scope="module")
def bucket(s3):
    """A bucket with one object, `big`, which came there as a file."""
    (s3.folder / "store").mkdir(exist_ok=True)  # whoever takes over tests of this file comes back to it
    (s3.folder / "store" / "big").write_bytes(BIG)
    store, end = Store("s3://store", patience=10, options=s3.options), time.monotonic() + 20
    while not store.exists("big"):
        assert time.monotonic() < end, "the server does not see its own folder"
        time.sleep(0.05)
    return "s3://store"


@pytest.fixture(scope="module")
def the_proxy(s3):
    return FaultProxy(s3.port)  # its thread ends with the process, stalled answers and all


@pytest.fixture
def proxy(the_proxy, bucket):
    """It behaves, until a test wants otherwise, and has seen nothing."""
    the_proxy.shares, the_proxy.next, the_proxy.only, the_proxy.down = {}, [], re.compile(""), False
    the_proxy.random.seed(0)
    the_proxy.log.clear()
    return the_proxy


@pytest.fixture(params=["local", "s3"])
def store(request, s3, bucket, tmp_path):
    """An empty folder."""
    if request.param == "local":
        return Store(str(tmp_path / "folder"), patience=5)
    return Store(f"{bucket}/{tmp_path.name}", patience=5, options=s3.options)


@pytest.fixture(params=["local", "s3"])
def with_big(request, s3, bucket):
    """A folder with `big` in it."""
    if request.param == "local":
        return Store(str(s3.folder / "store"), patience=5)
    return Store(bucket, patience=5, options=s3.options)


def faults(proxy):
    return sum(request.answer != "whole" for request in proxy.log)


def operations(store, source):
    """Everything that one can ask of a store about one object."""
    return {
        "read a range": lambda: store.read("big", 0, 10),
        "read": lambda: store.read("big"),
        "size": lambda: store.size("big"),
        "exists": lambda: store.exists("big"),
        "list": lambda: store.list(),
        "write": lambda: store.write("new", b"new"),
        "upload": lambda: store.upload("new", source),
    }


ABOUT_BIG = ("read a range", "read", "size", "exists")


# ---- what passes by waiting


@pytest.mark.parametrize("fault", ["503", "reset", "truncate", "stall"])
def test_what_fails_is_retried_until_the_right_bytes_come(proxy, bucket, fault):
    store = Store(bucket, patience=30, options=proxy.options() | {"config_kwargs": {"read_timeout": 0.5}})
    proxy.shares = {fault: 0.5}
    reads = 0
    while store.counts["retries"] < 3:
        start = 30_000 * (reads % 9)
        assert store.read("big", start, start + 50_000) == BIG[start : start + 50_000]
        reads += 1
        assert reads < 60, "something else retries, unseen"
    count = store.counts["retries"]
    assert dict(store.counts) == {"requests": reads + count, "retries": count, "bytes": 50_000 * reads}
    if fault == "reset":  # the client itself asks once more after a reset, unseen
        assert count < faults(proxy) <= 2 * count + reads
    else:
        assert count == faults(proxy)


def test_a_whole_object_that_was_cut_is_read_again(proxy, bucket):
    store = Store(bucket, patience=30, options=proxy.options())
    proxy.shares = {"truncate": 0.5}
    for _ in range(8):
        assert store.read("big") == BIG
    assert store.counts["retries"] > 0


def test_every_operation_outlasts_a_store_that_often_fails(proxy, bucket, tmp_path):
    store = Store(f"{bucket}/often", patience=60, options=proxy.options())
    (tmp_path / "source").write_bytes(BIG)
    proxy.shares = {"503": 0.5, "reset": 0.1}
    for k in range(5):
        store.write(f"parts/{k}", b"%d" % k)
    store.upload("whole", tmp_path / "source")
    assert store.list() == ["parts", "whole"]
    assert store.list("parts") == ["0", "1", "2", "3", "4"]
    assert [store.read(f"parts/{k}") for k in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
    assert store.read("whole") == BIG
    assert store.size("whole") == len(BIG)
    assert store.exists("whole")
    assert not store.exists("nothing")
    store.remove("parts")
    assert store.list() == ["whole"]
    assert 5 < store.counts["retries"] <= faults(proxy)


def test_a_removal_whose_answer_is_lost_is_done(proxy, bucket):
    store = Store(f"{bucket}/lost", patience=5, options=proxy.options())
    store.write("parts/0", b"0")
    proxy.shares, proxy.only = {"truncate": 1.0}, re.compile("^DELETE ")
    store.remove("parts")
    assert faults(proxy) == 1
    assert store.list("parts") == []


def test_while_the_store_is_down_it_waits_and_then_goes_on(proxy, bucket):
    store = Store(bucket, patience=60, options=proxy.options())
    proxy.down = True
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(store.read, "big")
        while store.counts["retries"] < 3:
            time.sleep(0.05)
        proxy.down = False
        assert reading.result() == BIG


def test_a_server_that_was_killed_and_started_again_is_found_again(s3, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "big").write_bytes(BIG)
    with LocalS3(tmp_path) as server, ThreadPoolExecutor(1) as pool:
        store = Store("s3://store", patience=60, options=server.options)
        assert store.read("big", 0, 1000) == BIG[:1000]
        assert store.counts["retries"] == 0
        server.stop()
        reading = pool.submit(store.read, "big", 1000, 2000)
        while not store.counts["retries"]:
            time.sleep(0.05)
        server.start()
        assert reading.result() == BIG[1000:2000]


def test_when_patience_is_over_the_error_names_the_url_and_the_last_trouble(proxy, bucket, tmp_path):
    (tmp_path / "source").write_bytes(b"new")
    store = Store(bucket, patience=10, options=proxy.options())
    store.read("big", 0, 10)
    store.patience = 0.2
    proxy.down = True
    for what, ask in operations(store, tmp_path / "source").items():
        store.counts.clear()
        with pytest.raises(StoreError, match=r"no answer for \d+ s \(patience\); the last was \w+") as caught:
            ask()
        assert type(caught.value) is NoAnswer, what
        assert str(caught.value).startswith(f"{bucket}/big:" if what in ABOUT_BIG else bucket)
        assert store.counts["requests"] == store.counts["retries"] + 1


# ---- slow and silent


def test_a_read_that_takes_far_longer_than_others_is_asked_for_again_beside_the_first(proxy, bucket):
    """The first request would take a minute."""
    store = Store(bucket, patience=120, options=proxy.options())
    for start in range(0, 60_000, 10_000):
        store.read("big", start, start + 10_000)
    assert dict(store.counts) == {"requests": 6, "bytes": 60_000}
    proxy.next = ["slow"]
    assert store.read("big", 100_000, 160_000) == BIG[100_000:160_000]
    assert dict(store.counts) == {"requests": 8, "hedged": 1, "bytes": 120_000}
    assert [(request.start, request.answer) for request in proxy.log[-2:]] == [(100_000, "slow"), (100_000, "whole")]


def test_of_three_requests_for_the_same_bytes_one_may_arrive_and_the_others_fail(proxy, bucket):
    store = Store(bucket, patience=120, options=proxy.options())
    for start in range(0, 60_000, 10_000):
        store.read("big", start, start + 10_000)
    proxy.next = ["stall", "503"]
    assert store.read("big", 100_000, 160_000) == BIG[100_000:160_000]
    assert dict(store.counts) == {"requests": 9, "hedged": 2, "bytes": 120_000}


@pytest.mark.parametrize("what", ["write", "upload", "read a range", "size", "list"])
def test_a_store_that_takes_a_request_and_never_answers_is_an_error_when_patience_is_over(
    proxy, bucket, tmp_path, what
):
    (tmp_path / "source").write_bytes(BIG)
    options = proxy.options() | {"config_kwargs": {"read_timeout": 3600}}
    Store(bucket, options=options).list()  # the client is made, which may take longer than the patience below
    store = Store(bucket, patience=4, options=options)
    proxy.shares = {"stall": 1.0}
    ask = operations(store, tmp_path / "source")[what]
    with pytest.raises(StoreError, match=rf"{bucket}.*no answer for \d+ s \(patience\)"):
        ask()
    assert faults(proxy) == 1
    proxy.shares = {}
    ask()
    store.write("silent", b"and then not")
    assert store.read("silent") == b"and then not"
    store.remove("new")


def test_an_attempt_has_its_own_limit_and_the_next_a_longer_one(proxy, bucket, monkeypatch):
    monkeypatch.setattr("streaming.store.ATTEMPT", 0.5)
    store = Store(bucket, patience=60, options=proxy.options())
    proxy.next, limits, wait = ["stall", "stall"], [], store._wait

    def told(limit, what, *of, **more):
        limits.append(limit) if what == "pipe_file" else None
        return wait(limit, what, *of, **more)

    monkeypatch.setattr(store, "_wait", told)
    store.write("late", b"late")
    assert store.counts["retries"] >= 2
    assert limits[1:3] == [2 * limits[0], 4 * limits[0]]
    assert proxy.next == []
    assert store.read("late") == b"late"


class Stuck(MemoryFileSystem):
    """A file system of the kind that is called in threads; its first answer never comes."""

    protocol = "stuck"
    store: ClassVar[dict] = {}
    calls = itertools.count()

    def pipe_file(self, path, value, **kwargs):
        if next(self.calls) == 0:
            threading.Event().wait()
        return super().pipe_file(path, value, **kwargs)


def test_a_file_system_that_is_not_asynchronous_is_left_alone_in_its_thread(tmp_path):
    fsspec.register_implementation("stuck", Stuck)
    (tmp_path / "source").write_bytes(BIG)
    store = Store("stuck://folder", patience=1)
    with pytest.raises(StoreError, match="stuck://folder/new: no answer"):
        store.write("new", b"new")
    store.write("new", b"new")
    store.upload("parts/big", tmp_path / "source")
    assert store.list() == ["new", "parts"]
    assert (store.read("new"), store.read("parts/big", 5, 50), store.size("new")) == (b"new", BIG[5:50], 3)
    with pytest.raises(Short, match="ends at byte 300000"):
        store.read("parts/big", 5, 300_001)
    store.remove("parts")
    assert not store.exists("parts/big")


# ---- many at once


def test_threads_share_a_store_and_each_gets_its_own_bytes(proxy, bucket):
    store = Store(bucket, patience=60, options=proxy.options())
    proxy.shares = {"503": 0.1, "reset": 0.1}

    def read(seed):
        rng = random.Random(seed)
        for _ in range(15):
            start = rng.randrange(len(BIG) - 1)
            stop = rng.randrange(start + 1, len(BIG))
            assert store.read("big", start, stop) == BIG[start:stop]
            lengths.append(stop - start)

    lengths = []
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(read, range(16)))
    assert len(lengths) == 16 * 15
    assert store.counts["bytes"] == sum(lengths)
    assert store.counts["retries"] > 0
    assert store.counts["requests"] == len(lengths) + store.counts["retries"]


# ---- what does not pass by waiting


REFUSED = {
    "wrong secret": ({"secret": "w" * 40}, Denied, "AWS_SECRET_ACCESS_KEY"),
    "wrong key": ({"key": "AKIAWRONGWRONGWRONG0"}, Denied, "AWS_ACCESS_KEY_ID"),
    # this server's word for a request without a signature is 400
    "anonymous": ({"anon": True}, StoreError, "rejects"),
}


@pytest.mark.parametrize("who", REFUSED)
def test_who_is_refused_is_told_at_once_whatever_is_asked(s3, bucket, tmp_path, who):
    options, kind, hint = REFUSED[who]
    (tmp_path / "source").write_bytes(b"new")
    store = Store(bucket, patience=5, options=s3.options | options)
    asked = operations(store, tmp_path / "source")
    for ask in asked.values():
        with pytest.raises(StoreError, match=hint) as caught:
            ask()
        assert type(caught.value) is kind
        assert bucket in str(caught.value)
    assert dict(store.counts) == {"requests": len(asked)}


def test_a_refusal_is_one_request_to_the_server(s3, proxy, bucket):
    store = Store(bucket, patience=5, options=proxy.options() | {"key": s3.key, "secret": "w" * 40})
    with pytest.raises(Denied):
        store.read("big", 0, 10)
    assert len(proxy.log) == 1


@pytest.fixture
def stranger(monkeypatch, tmp_path):
    """A user with no credentials anywhere."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def test_without_credentials_the_error_says_what_to_set(proxy, bucket, stranger):
    # options that no test before used: clients of the same options are shared, and keep the credentials they found
    store = Store(bucket, patience=5, options=proxy.options() | {"config_kwargs": {"user_agent_extra": "stranger"}})
    for ask in (lambda: store.read("big", 0, 10), lambda: store.size("big"), lambda: store.list()):
        with pytest.raises(Denied, match=r"no credentials were found.*AWS_ACCESS_KEY_ID.*AWS_NO_SIGN_REQUEST"):
            ask()
    assert dict(store.counts) == {"requests": 3}
    assert proxy.log == []


@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_public_bucket_is_read_without_credentials(s3, bucket, stranger, monkeypatch, how):
    with LocalS3(s3.folder, public=True) as server:
        options = {"endpoint_url": server.options["endpoint_url"]}
        if how == "option":
            options["anon"] = True
        else:
            monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "1")
        store = Store(bucket, patience=5, options=options)
        assert store.read("big", 5, 50) == BIG[5:50]


def test_a_missing_bucket_is_named_at_once(s3, tmp_path):
    (tmp_path / "source").write_bytes(b"new")
    store = Store("s3://no-such-bucket/folder", patience=5, options=s3.options)
    asked = operations(store, tmp_path / "source")
    for what in ("read a range", "read", "size", "write", "upload"):
        with pytest.raises(Missing, match="s3://no-such-bucket/folder"):
            asked[what]()
    assert dict(store.counts) == {"requests": 5}


def test_a_missing_object_is_named_at_once(with_big):
    for ask in (lambda: with_big.read("none", 0, 10), lambda: with_big.read("none"), lambda: with_big.size("none")):
        with pytest.raises(Missing, match=f"{with_big.url}/none does not exist"):
            ask()
    assert not with_big.exists("none")
    assert with_big.exists("big")
    assert with_big.list("none") == []
    assert with_big.counts["retries"] == 0


@pytest.mark.parametrize("protocol", ["nonsense", "gopher"])
def test_an_unknown_protocol_is_an_error_of_the_store(protocol):
    with pytest.raises(StoreError, match=f"{protocol}://somewhere"):
        Store(f"{protocol}://somewhere")


@pytest.mark.parametrize(
    ("url", "options"), [("s3://Not a bucket!/x", {}), ("s3://store", {"profile": "no-such-profile"})]
)
def test_a_setting_that_no_waiting_will_mend_is_an_error_at_once(s3, url, options):
    store = Store(url, patience=10, options=s3.options | options)
    with pytest.raises(StoreError, match=re.escape(url)):
        store.read("big", 0, 10)
    assert store.counts["retries"] == 0


IN_THE_WAY = {
    "a folder": lambda path: path.mkdir(),
    "a link loop": lambda path: path.symlink_to(path),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a file in the place of a folder": lambda path: path.parent.rmdir() or path.parent.write_text(""),
}


@pytest.mark.parametrize("what", IN_THE_WAY)
def test_what_is_not_a_file_is_missing(tmp_path, what):
    (tmp_path / "folder").mkdir()
    IN_THE_WAY[what](tmp_path / "folder" / "object")
    store = Store(str(tmp_path), patience=0.3)
    says = "does not exist" if what == "a link to nowhere" else "is not a file"
    for ask in (
        lambda: store.read("folder/object"),
        lambda: store.read("folder/object", 0, 5),
        lambda: store.size("folder/object"),
    ):
        with pytest.raises(Missing, match=f"{tmp_path}/folder/object {says}"):
            ask()
    assert not store.exists("folder/object")
    assert store.counts["retries"] == 0


def test_a_folder_of_a_bucket_is_no_object(s3, bucket):
    store = Store(bucket, patience=5, options=s3.options)
    store.write("folder/object", b"text")
    assert store.exists("folder/object")
    assert not store.exists("folder")


SECRET = "secretpw"


@pytest.fixture(params=["404", "401", "503", "refused", "unknown"])
def address(request):
    """A URL with a password, at a server that says no."""
    if request.param == "unknown":
        yield f"nonsense://user:{SECRET}@127.0.0.1/folder"
        return

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(int(request.param), f"of {self.path} by user:{SECRET} {SECRET}")

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        url = f"http://user:{SECRET}@127.0.0.1:{server.server_port}/folder"
        if request.param == "refused":
            server.server_close()
            yield url
            return
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield url
        server.shutdown()


def test_no_message_shows_the_password_of_the_address(address):
    def ask():
        store = Store(address, patience=0.2)
        assert store.address == address
        assert store.url == address.replace(f"user:{SECRET}@", "***@")
        store.read("object", 0, 10)

    with pytest.raises(StoreError) as caught:
        ask()
    said = str(caught.value) + "".join(traceback.format_exception(caught.value))
    assert "://***@127.0.0.1" in said
    assert SECRET not in said


def test_processes_are_given_the_address_with_its_password(tmp_path):
    """From a server that wants it."""
    make_dataset(str(tmp_path / "data"), 20)

    class Asks(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            self.answer(body=True)

        def do_HEAD(self):
            self.answer(body=False)

        def answer(self, body):
            if self.headers["Authorization"] != "Basic " + base64.b64encode(f"user:{SECRET}".encode()).decode():
                self.send_error(401)
                return
            content = (tmp_path / "data" / self.path[1:]).read_bytes()
            first, last = re.fullmatch(
                r"bytes=(\d+)-(\d+)", self.headers.get("Range", f"bytes=0-{len(content)}")
            ).groups()
            part = content[int(first) : int(last) + 1]
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if body:
                self.wfile.write(part)

    with ThreadingHTTPServer(("127.0.0.1", 0), Asks) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with open_loader(f"http://user:{SECRET}@127.0.0.1:{server.server_port}", tmp_path / "cache") as loader:
            assert [batch.valid.sum() for batch in take(loader, 3)] == [8, 8, 4]
        with pytest.raises(Denied, match="access is refused"):
            Store(f"http://user:wrong@127.0.0.1:{server.server_port}", patience=5).read("index")
        server.shutdown()


def test_errors_of_the_program_are_raised_as_they_are(store):
    store.write("old", b"old")
    for call in (lambda: store.read("old", "0", "2"), lambda: store.write("new", 5)):
        with pytest.raises(TypeError):
            call()
    assert store.counts["retries"] == 0
    assert not store.exists("new")


# ---- ranges


@pytest.mark.parametrize(("start", "stop"), [(299_990, 300_001), (0, 300_001), (300_000, 300_010), (400_000, 400_010)])
def test_a_range_past_the_end_says_where_the_end_is(with_big, start, stop):
    with pytest.raises(Short, match=f"{with_big.url}/big ends at byte 300000, expected {stop}") as caught:
        with_big.read("big", start, stop)
    assert caught.value.size == 300_000
    assert dict(with_big.counts) == {"requests": 1}


@pytest.mark.parametrize(("start", "stop"), [(0, 300_000), (299_999, 300_000), (0, 1), (7, 7), (300_000, 300_000)])
def test_a_range_up_to_the_end_is_all_there(with_big, start, stop):
    assert with_big.read("big", start, stop) == BIG[start:stop]
    assert dict(with_big.counts) == {"requests": 1, "bytes": stop - start}


def test_a_range_of_an_object_that_was_written_here_comes_back(s3, bucket):
    store = Store(f"{bucket}/own", patience=10, options=s3.options)
    store.write("object", BIG)
    assert store.read("object") == BIG
    assert store.read("object", 10, 20) == BIG[10:20]


# ---- writing


def test_what_is_written_and_uploaded_can_be_listed_read_and_removed(store, tmp_path):
    (tmp_path / "source").write_bytes(BIG)
    assert store.list() == []
    store.write("b", b"")
    store.write("a", b"text")
    store.write("parts/2/deep", b"2")
    store.upload("parts/1", tmp_path / "source")
    assert store.list() == ["a", "b", "parts"]
    assert store.list("parts") == ["1", "2"]
    assert store.list("parts/2") == ["deep"]
    assert (store.read("a"), store.read("b"), store.read("parts/1")) == (b"text", b"", BIG)
    assert (store.size("a"), store.size("b"), store.size("parts/1")) == (4, 0, len(BIG))
    store.remove("parts")
    assert store.list() == ["a", "b"]
    assert store.list("parts") == []
    assert not store.exists("parts/1")
    store.remove("parts")  # nothing there is no error
    assert store.read("a") == b"text"


def test_what_is_written_again_replaces_what_was_there(store, tmp_path):
    (tmp_path / "source").write_bytes(b"the third")
    store.write("a", b"first")
    assert (store.list(), store.size("a")) == (["a"], 5)
    store.write("a", b"the second")
    assert (store.read("a"), store.size("a")) == (b"the second", 10)
    store.upload("a", tmp_path / "source")
    assert (store.read("a"), store.size("a")) == (b"the third", 9)
    assert store.list() == ["a"]


def test_what_another_process_wrote_is_seen_though_the_folder_was_listed_before(store, proxy):
    other = Store(store.url, patience=5, options=None if store.local else proxy.options())  # a client of its own
    store.write("a", b"first")
    assert store.list() == ["a"]
    other.write("a", b"the second")
    other.write("b", b"new")
    assert store.list() == ["a", "b"]
    other.write("a", b"the third one")
    assert (store.size("a"), store.read("a", 0, 10), store.exists("b")) == (13, b"the third ", True)


def test_a_slash_at_the_end_of_the_url_means_nothing(with_big):
    same = Store(with_big.url + "/", options=with_big.options)
    assert same.url == with_big.url
    assert same.size("big") == len(BIG)


def write_too_much(store, name, source: Path):
    """As on a full disk: half of it is written when the system refuses the rest."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(BIG) // 2, old[1]))
    try:
        with pytest.raises(OSError):
            store.upload(name, source) if source else store.write(name, BIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("upload", [False, True])
def test_a_local_write_that_fails_leaves_what_was_there(tmp_path, upload):
    (tmp_path / "source").write_bytes(BIG)
    store = Store(str(tmp_path / "folder"), patience=1)
    store.write("old", b"old")
    write_too_much(store, "old", tmp_path / "source" if upload else None)
    write_too_much(store, "new", tmp_path / "source" if upload else None)
    assert store.read("old") == b"old"
    assert not store.exists("new")
    store.write("new", BIG)
    assert store.read("new") == BIG


def test_a_local_write_that_fails_leaves_nothing_to_be_listed(tmp_path):
    store = Store(str(tmp_path / "folder"), patience=1)
    write_too_much(store, "new", None)
    assert store.list() == []


# ---- what a store holds is what was sent to it


@pytest.mark.parametrize("size", [0, 1, 300_000])
def test_a_write_counts_when_the_store_holds_the_bytes(proxy, bucket, tmp_path, size):
    """One bit of each upload is another: the store says so itself, by its checksum."""
    content = BIG[:size]
    (tmp_path / "source").write_bytes(content)
    store = Store(f"{bucket}/verified", patience=20, options=proxy.options())
    for put in (lambda: store.write("one", content), lambda: store.upload("one", tmp_path / "source")):
        proxy.flips, proxy.flips_left = re.compile("^PUT "), 2 if size else 0
        put()
        assert proxy.flips_left == 0
        assert store.read("one") == content
    proxy.flips, proxy.flips_left, store.patience = re.compile("^PUT "), 1 << 30, 3.0
    if size:
        with pytest.raises(NoAnswer, match="the store holds other bytes than were written"):
            store.write("two", content)
    proxy.flips = None


def test_a_store_without_checksums_is_asked_for_the_bytes(tmp_path, monkeypatch):
    """What stands there is read back, whatever the protocol; on a disk, too."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    put = MemoryFileSystem.pipe_file

    def halved(self, path, value, **kwargs):
        put(self, path, value[: len(value) // 2] if left.pop() else value, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", halved)
    left = [False, True]
    store = Store("memory://there", patience=20)
    store.write("one", b"abcdef")
    assert store.read("one") == b"abcdef"
    assert left == []


def test_an_overwrite_that_shows_late_is_waited_for(proxy, bucket, monkeypatch):
    """The first looks at it find what stood there before."""
    store = Store(bucket, patience=20, options=proxy.options())
    store.write("late-owner", b"before")
    vouches, read, looks, reads = store._vouches, store._read, itertools.count(), itertools.count()
    monkeypatch.setattr(store, "_vouches", lambda *of: next(looks) > 2 and vouches(*of))
    monkeypatch.setattr(store, "_read", lambda *of, **part: b"before" if next(reads) < 2 else read(*of, **part))
    store.write("late-owner", b"behind")
    assert store.read("late-owner") == b"behind"


# ---- whole objects


def test_a_whole_object_comes_in_pieces_of_which_none_is_asked_for_again(proxy, bucket, monkeypatch):
    monkeypatch.setattr("streaming.store.FIRST_PIECE", 50_000)
    monkeypatch.setattr("streaming.store.LARGEST_PIECE", 100_000)
    store = Store(bucket, patience=30, options=proxy.options())
    proxy.next = ["whole", "whole", "whole", "truncate"]  # of the second: its size
    assert store.read("big") == BIG
    got = [(r.start, r.stop) for r in proxy.log if r.method == "GET"]
    assert got == [(0, 50_000), (50_000, 100_000), (100_000, 200_000), (100_000, 200_000), (200_000, 300_000)]
    assert store.counts["retries"] == 1
    assert store.counts["bytes"] == 300_000


def test_a_small_object_is_one_request(proxy, bucket):
    store = Store(bucket, patience=30, options=proxy.options())
    assert store.read("big") == BIG
    assert [r.method for r in proxy.log] == ["GET"]


def test_what_is_larger_than_it_can_be_is_not_read(with_big):
    with pytest.raises(TooLarge, match="big has 300000 bytes, expected 1000 at most"):
        with_big.read("big", most=1000)
    assert with_big.read("big", most=300_000) == BIG


def test_an_empty_object_is_empty(store):
    store.write("empty", b"")
    assert store.read("empty") == b""


# ---- names


@pytest.mark.parametrize("name", ["r[1]", "a*", "what?", "[", "r[!a]"])
def test_names_are_no_patterns(s3, bucket, tmp_path, name):
    store = Store(f"{bucket}/{tmp_path.name}/{name}", patience=5, options=s3.options)
    other = Store(f"{bucket}/{tmp_path.name}", patience=5, options=s3.options)
    other.write("r1/one", b"x")
    other.write("a-b/one", b"x")
    for part in ("one", "folder/two", "folder/three", "folder2/four"):
        store.write(part, b"x")
    store.remove("folder")
    assert store.list() == ["folder2", "one"]
    store.remove("one")
    store.remove("folder2")
    assert store.list() == []
    assert other.list("r1") == other.list("a-b") == ["one"]


@pytest.mark.parametrize("url", ["a::b", "simplecache::s3://bucket/x", "zip://x::/tmp/y.zip"])
def test_chains_of_file_systems_are_refused(url):
    with pytest.raises(NoStore, match="expected one URL or folder"):
        Store(url)


def test_nodes_that_write_one_name_do_not_share_a_file(tmp_path):
    """On a volume: each writes the whole of its own, and the last one stays."""
    stores = [Store(str(tmp_path)) for _ in range(8)]
    contents = [bytes([k]) * 200_000 for k in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: [stores[k].write("ended", contents[k]) for _ in range(20)], range(8)))
    assert (tmp_path / "ended").read_bytes() in contents
    assert os.listdir(tmp_path) == ["ended"]


def test_what_a_given_up_request_says_later_is_no_traceback(caplog):
    """asyncio would print it when it collects the task; what is no broken connection, it prints still."""
    loop = Store("s3://bucket/a").fs.loop

    async def fail(error):
        raise error

    def said(error):
        caplog.clear()
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()
        loop.call_soon_threadsafe(loop.create_task, fail(error))
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), loop).result()
        gc.collect()
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), loop).result()
        return caplog.text

    assert said(ConnectionResetError("Cannot write to closing transport")) == ""
    assert "never retrieved" in said(ValueError("another"))
