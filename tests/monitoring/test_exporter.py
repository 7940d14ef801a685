"""Processes that tell, die and come back; scrapes of all kinds."""

import copy
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from monitoring import exporter
from monitoring import metrics as m
from monitoring.board import SECONDS, Board, started
from monitoring.exporter import KEPT, Exporter, Server, serve

TELLS = """
import sys, time
from pathlib import Path
from monitoring import metrics as m
from monitoring.board import Board
board = Board(Path(sys.argv[1]), f"rank-{sys.argv[2]}", int(sys.argv[2]))
board.add(m.CLIPS, 10)
board.add(m.PHASE, 2.0, "data")
board.observe(m.STEP_TIME, 0.3)
board.set(m.STEP, 5)
board.set(m.MEMORY, 100)
time.sleep(0.1)
if sys.argv[3] == "ends":
    board.close()
else:
    time.sleep(1.5)
    print("told", flush=True)
    time.sleep(600)
"""


def process(folder, rank=0, how="stays"):
    started = subprocess.Popen([sys.executable, "-c", TELLS, str(folder), str(rank), how], stdout=subprocess.PIPE)
    if how == "stays":
        started.stdout.readline()
    else:
        started.wait()
    return started


def kill(one):
    one.send_signal(signal.SIGKILL)
    one.wait()


def value(exporter, metric, *labels):
    return exporter.values().get((metric.name, labels))


def test_counters_go_on_over_processes_and_the_rest_is_of_those_that_live(tmp_path):
    exporter = Exporter(tmp_path, "run")
    first = process(tmp_path)
    assert value(exporter, m.CLIPS) == 10
    assert value(exporter, m.PHASE, "data", "0") == 2
    assert value(exporter, m.STEP) == 5
    kill(first)
    assert value(exporter, m.CLIPS) == 10  # it happened
    assert value(exporter, m.STEP) is None  # nobody says so any more
    assert value(exporter, m.PHASE, "data", "0") is None
    assert not exporter.alive()
    second = process(tmp_path)
    assert value(exporter, m.CLIPS) == 20
    assert value(exporter, m.PHASE, "data", "0") == 4
    assert value(exporter, m.STEP_TIME)[0] == pytest.approx(0.6)
    assert [k for k, count in enumerate(value(exporter, m.STEP_TIME)[1:]) if count] == [m.STEP_SECONDS.index(0.35)]
    third = process(tmp_path, rank=1)
    assert value(exporter, m.MEMORY, "1") == 100
    kill(third)
    assert value(exporter, m.MEMORY, "1") is None
    assert value(exporter, m.MEMORY, "0") == 100
    kill(second)


def test_what_has_ended_stays_to_be_seen_until_another_begins(tmp_path):
    exporter = Exporter(tmp_path, "run")
    process(tmp_path, how="ends")
    assert not exporter.alive()
    assert value(exporter, m.STEP) == 5
    assert value(exporter, m.MEMORY, "0") == 100
    other = process(tmp_path, rank=1)
    assert value(exporter, m.MEMORY, "0") is None
    assert value(exporter, m.CLIPS) == 20
    kill(other)


def test_a_process_whose_number_is_used_again_is_another(tmp_path):
    board = Board(tmp_path, "rank-0", 0)
    board.set(m.STEP, 5)
    board.add(m.CLIPS, 10)
    time.sleep(1.5 * SECONDS)
    exporter = Exporter(tmp_path, "run")
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert content["start"] == started(os.getpid()) > 0
    board.close()
    path.write_text(json.dumps({**content, "start": content["start"] - 1}))
    assert value(exporter, m.STEP) is None
    assert value(exporter, m.CLIPS) == 10
    assert started(2**22 + 1) == 0


def test_many_that_have_ended_are_one_file_and_none_counts_twice(tmp_path):
    exporter = Exporter(tmp_path, "run")
    for number in range(3 * KEPT):
        content = {"pid": 1, "start": number, "began": number, "ended": number + 0.5}
        values = [["clips_total", [], 1], ["phase_seconds_total", ["data", "0"], 1.0], ["step", [], 9]]
        values.append(["step_seconds", [], [0.5, *[1] * 15]])
        (tmp_path / f"rank-0-1-{number}.json").write_text(json.dumps({**content, "values": values}))
        if number % 5 == 0:
            assert value(exporter, m.CLIPS) == number + 1
    assert value(exporter, m.CLIPS) == 3 * KEPT
    assert value(exporter, m.STEP_TIME) == [0.5 * 3 * KEPT, *[3 * KEPT] * 15]
    left = list(tmp_path.glob("rank-*.json"))
    assert len(left) <= KEPT + 1
    # Killed between the one file and the removal of those that are in it: they are there again.
    again = json.loads((tmp_path / "before.json").read_text())["names"][0]
    (tmp_path / again).write_text(json.dumps({**content, "values": values}))
    assert value(Exporter(tmp_path, "run"), m.CLIPS) == 3 * KEPT


def test_a_folder_that_cannot_be_written_is_told_once_and_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    said = []
    board = Board(tmp_path / "file", "rank-0", 0, said.append)
    board.set(m.STEP, 5)
    time.sleep(2.5 * SECONDS)
    board.close()
    assert len(said) == 1
    assert "metrics cannot be written to" in said[0]


def test_odd_names_are_escaped_and_short(tmp_path):
    board = Board(tmp_path, "rank-0", 0)
    for number in range(200):
        board.set(m.QUARANTINED, 1, f'rea"son\\{number}\n' + "x" * 1000)
    board.close()
    text = Exporter(tmp_path, 'a "run"\\ \n äöü' + "y" * 1000).answer().decode()
    lines = [line for line in text.splitlines() if line.startswith("equiav_")]
    assert 1 < len(lines) <= 20
    assert max(map(len, lines)) < 400
    assert r'run="a \"run\"\\ ? ???' in lines[0]
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- scrapes


@pytest.fixture
def server(tmp_path):
    board = Board(tmp_path, "rank-0", 0)
    board.set(m.STEP, 5)
    time.sleep(1.5 * SECONDS)
    server = serve(tmp_path, "run", 0)
    assert isinstance(server, Server)
    yield server
    server.shutdown()
    server.server_close()
    board.close()


def get(server, path="/metrics"):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_a_scrape_and_what_is_none(server):
    assert 'equiav_step{run="run"} 5.0' in get(server)[1]
    assert get(server, "/metrics?x=1")[0] == 200
    for path in ("/", "/../etc/passwd", "/metricsx"):
        status, text = get(server, path)
        assert status == 404
        assert "/tmp" not in text
    for rubbish in (b"\x16\x03\x01\x02\x00\x01\x00\x01", b"GET\r\n\r\n", b"POST /metrics HTTP/1.0\r\n\r\n", b""):
        with socket.create_connection(("127.0.0.1", server.server_address[1])) as one:
            one.sendall(rubbish)
    assert get(server)[0] == 200
    with socket.create_connection(("::1", server.server_address[1])) as one:
        one.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert one.recv(100).startswith(b"HTTP/1.0 200")


def test_who_is_slow_holds_up_nobody(server):
    slow = [socket.create_connection(("127.0.0.1", server.server_address[1])) for _ in range(12)]
    for one in slow:
        one.sendall(b"GET /met")
    begun = time.monotonic()
    assert get(server)[0] == 200
    assert time.monotonic() - begun < 4  # the others are given five seconds
    for one in slow:
        one.close()


def test_two_hundred_who_wait_keep_prometheus_from_nothing(server):
    """They come back as soon as they are left. They ask from another address than it does."""
    stop, address = threading.Event(), ("127.0.0.1", server.server_address[1])

    def wait():
        while not stop.is_set():
            with suppress(OSError), socket.create_connection(address, source_address=("127.0.0.2", 0)) as one:
                one.settimeout(1)
                one.sendall(b"GET /met")
                one.recv(1)

    clients = [threading.Thread(target=wait) for _ in range(200)]
    for one in clients:
        one.start()
    try:
        assert [get(server)[0] for _ in range(8)] == [200] * 8
    finally:
        stop.set()
        for one in clients:
            one.join()


@pytest.mark.parametrize(("seconds", "waits"), [(30, True), (59, True), (100, False), (8 * 3600, False)])
def test_who_asks_seldom_is_not_waited_for_and_nobody_for_long(server, seconds, waits, monkeypatch):
    """A clock on which the seconds between two scrapes have passed."""
    get(server)
    while not server.scrapes:  # it counts after it has answered
        time.sleep(0.01)
    ((who, asked),) = server.scrapes.items()
    server.scrapes[who] = asked._replace(number=2, last=time.monotonic() - 1, interval=seconds)
    slept = []
    monkeypatch.setattr(exporter.time, "sleep", slept.append)
    real, begun = time.monotonic, time.monotonic()
    monkeypatch.setattr(exporter.time, "monotonic", lambda: real() + sum(slept))
    server.linger()
    assert (exporter.time.monotonic() - begun > 10) == waits
    assert exporter.time.monotonic() - begun < 80


WRONG = (None, True, [], {}, "", "x", -1, 1.5, 10**400, float("nan"), float("inf"), [[]], [["equiav", 1]], "\ud800")


def test_no_file_of_a_process_costs_the_others_theirs(tmp_path):
    """Each value in it is replaced by each of what it cannot be."""
    board = Board(tmp_path, "rank-0", 0)
    board.set(m.STEP, 5)
    board.add(m.PHASE, 2.0, "data")
    board.observe(m.STEP_TIME, 0.3)
    time.sleep(1.5 * SECONDS)
    (path,) = tmp_path.glob("rank-0-*.json")
    content, shown, tried = json.loads(path.read_text()), Exporter(tmp_path, "run"), 0
    board.set(m.EPOCH, 3)  # of the one alone
    time.sleep(1.5 * SECONDS)
    own = f'{m.EPOCH.full_name}{{run="run"}} 3.0'.encode()

    def places(of, way=()):
        yield way
        for key in of if isinstance(of, dict) else range(len(of)) if isinstance(of, list) else ():
            yield from places(of[key], (*way, key))

    for way in places(content):
        for wrong in WRONG:
            spoiled = copy.deepcopy(content)
            if way:
                inner = spoiled
                for key in way[:-1]:
                    inner = inner[key]
                inner[way[-1]] = wrong
            else:
                spoiled = wrong
            (tmp_path / "rank-1-1-1.json").write_text(json.dumps(spoiled))
            shown._until = 0.0
            assert own in shown.answer(), (way, wrong)
            tried += 1
    assert tried > 200
    for text in (b"", b"\xff\xfe", b"{", b"[" * 100_000, b'{"values": ' + b"9" * 5000 + b"}"):
        (tmp_path / "rank-1-1-1.json").write_bytes(text)
        shown._until = 0.0
        assert own in shown.answer(), text[:20]
    board.close()


def test_a_thousand_scrapes_at_once_are_answered_or_refused(server):
    def scrape(_):
        try:
            return get(server)[0]
        except OSError:  # refused while it says so
            return 503

    with ThreadPoolExecutor(1000) as pool:
        statuses = list(pool.map(scrape, range(1000)))
    assert set(statuses) <= {200, 503}
    assert statuses.count(200) > 10
    assert get(server)[0] == 200


def test_a_port_in_use_is_said(server, tmp_path):
    said = serve(tmp_path, "run", server.server_address[1])
    assert isinstance(said, str)
    assert "is in use: no metrics are served" in said


def test_the_end_waits_for_two_scrapes_of_who_asks(server):
    begun = time.monotonic()
    server.linger()
    assert time.monotonic() - begun < 5  # nobody has ever asked
    get(server)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.linger)
        get(server)  # of what was there before the end
        time.sleep(1.5)
        assert not waiting.done()
        get(server)
        time.sleep(0.5)
        assert not waiting.done()
        get(server)
        waiting.result(timeout=5)


UNCACHED = """
import sys, time
from pathlib import Path
from monitoring import exporter
exporter.FRESH = 0
print(exporter.serve(Path(sys.argv[1]), "run", 0).server_address[1], flush=True)
time.sleep(600)
"""


def test_hours_of_scrapes_leave_it_as_it_is(tmp_path):
    """Of a run that restarts now and then: as many series, as much memory."""
    exporter = subprocess.Popen([sys.executable, "-c", UNCACHED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    port = int(exporter.stdout.readline())
    series, memory = set(), []
    for start in range(20):
        boards = [Board(tmp_path, f"rank-{rank}-{start}", rank) for rank in range(2)]
        for board in boards:
            for metric in m.METRICS:
                for labels in set(metric.logged.values()) or {tuple("x" for name in metric.labels if name != "rank")}:
                    board.observe(metric, 0.3) if metric.kind == m.HISTOGRAM else board.set(metric, start, *labels)
            board.close()
        for _ in range(60):  # a quarter of an hour
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
            series.add(tuple(line.rpartition(" ")[0] for line in lines if not line.startswith("#")))
        memory.append(int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{exporter.pid}/status").read_text())[1]))
    kill(exporter)
    assert len(series) == 1
    assert 50 < len(series.pop()) < 150
    assert memory[-1] - memory[3] < 1024, memory  # kB, after the first hour


def test_a_file_that_is_none_of_ours_costs_nobody_the_others(tmp_path):
    exporter = Exporter(tmp_path, "run")
    board = Board(tmp_path, "rank-0", 0)
    board.set(m.STEP, 5)
    for name, content in {"x-1.json": '{"pid": 1', "y-2-3.json": "[]", "z-4.json": '{"pid": 1, "values": 3}'}.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "u-1.json").write_bytes(b"\xff\xfe")
    (tmp_path / "folder-1.json").mkdir()
    (tmp_path / "before.json").write_text("{")
    time.sleep(1.5 * SECONDS)
    assert value(exporter, m.STEP) == 5
    assert exporter.alive()
    board.close()


def test_a_start_that_was_superseded_is_not_seen_beside_the_one_that_goes_on(tmp_path):
    exporter = Exporter(tmp_path, "run")
    old = Board(tmp_path, "rank-0", 0)
    old.set(m.STEP, 5)
    old.set(m.ENDED, 1.0, "failed")
    living = process(tmp_path)  # begins later, and the old one ends after that
    old.close()
    (path,) = (path for path in tmp_path.glob("rank-0-*.json") if f"-{os.getpid()}-" in path.name)
    assert json.loads(path.read_text())["ended"]
    assert value(exporter, m.ENDED, "failed") is None
    assert value(exporter, m.MEMORY, "0") == 100
    kill(living)


def test_everybody_who_asks_has_the_end(server):
    """Prometheus beside somebody who looks every second."""

    def ask(who):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
        connection.request("GET", "/metrics", headers={"User-Agent": who})
        connection.getresponse().read()

    ask("prometheus")
    time.sleep(2)
    ask("prometheus")
    ask("top")
    ask("top")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.linger)
        time.sleep(1.5)
        for _ in range(3):
            ask("top")
        ask("prometheus")
        time.sleep(0.5)
        assert not waiting.done()
        ask("prometheus")
        waiting.result(timeout=2)


@pytest.mark.slow
def test_who_asks_drop_by_drop_is_left(server):
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.server_address[1])) as one:
        try:
            while time.monotonic() < begun + 30:
                one.sendall(b"G")
                time.sleep(0.5)
        except OSError:
            return
    raise AssertionError("it is served for ever")
