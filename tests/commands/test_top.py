"""`equiav top`: from a run's folder and from what nodes serve, for runs that are well and others."""

import json
import socket
import subprocess
import sys
import time
from threading import Thread

import pytest

from equiav.commands.top import Folder, RunStatus, Served, shown, sparkline, verdicts
from equiav.config import ConfigError
from monitoring import metrics as m
from monitoring.board import SECONDS, Board
from monitoring.exporter import Server, serve

WELL = {"loss": 3.2, "loss_inter": 1.0, "accuracy_inter": 0.5, "similarity_audio": 0.9, "similarity_image": 0.8,
        "gain_audio": 0.1, "gain_image": 0.1, "sensitivity_audio": 0.1, "sensitivity_image": 0.1,
        "effective_rank_audio": 30.0, "effective_rank_image": 30.0}  # fmt: skip
TIMING = {"clips_per_second": 100.0, "saved_step": 20, "save_seconds": 0.1, "failed_saves": 0, "unsaved_seconds": 0.0}


def folder(path, steps=90, timing=(), **changed):
    rows = [{"step": k, **WELL, "loss": k, **changed} for k in range(steps)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"step": k, **TIMING, **dict(timing)} for k in range(steps)]
    (path / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_from_its_folder(tmp_path):
    seen = Folder(folder(tmp_path)).look()
    assert seen.get(m.STEP) == 90
    assert seen.curves[m.LOSS.name, ("total",)] == list(range(30, 90))
    assert verdicts(seen) == []
    text = shown(seen).plain
    assert text.startswith("well\n")
    assert max(map(len, text.splitlines())) <= 80
    assert "similarity audio" in text
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 90, "lo')  # a line that is being written
    assert Folder(tmp_path).look().get(m.STEP) == 90


def test_a_run_that_learns_labels(tmp_path):
    rows = [{"step": k, "loss": 2.0, "loss_class": 2.0, "accuracy_class": 0.25} for k in range(9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = shown(Folder(tmp_path).look()).plain
    assert "accuracy                   25.0%" in text
    assert "gain" not in text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"effective_rank_image": 1.2}, "embeddings of the image fill 1.2 direction(s)"),
        ({"gain_audio": 0.001, "sensitivity_audio": 0.001}, "the predictor of the audio does nothing"),
        ({"timing": {"unsaved_seconds": 1000.0}}, "nothing saved for 1000 s"),
    ],
)
def test_what_is_wrong_is_said_first(changed, said, tmp_path):
    seen = Folder(folder(tmp_path, **changed)).look()
    seen.values[m.STEPS_PLANNED.name, ()] = 1000.0
    assert said in shown(seen).plain.splitlines()[0]
    seen.values[m.STEPS_PLANNED.name, ()] = 10**6  # early in a run it means little, but for the saves
    assert (said in shown(seen).plain.splitlines()[0]) == ("saved" in said)


def test_nodes_are_added_up(tmp_path):
    boards, servers = [], []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        board = Board(tmp_path / str(rank), f"rank-{rank}", rank)
        board.add(m.ROUNDS, 2)
        board.add(m.PHASE, 1.0 + rank, "data")
        board.set(m.LAST_STEP, time.time() - 400)
        board.set(m.STEP, 5 + rank)
        boards.append(board)
    time.sleep(1.5 * SECONDS)
    for rank in range(2):
        server = serve(tmp_path / str(rank), "run", 0)
        assert isinstance(server, Server)
        servers.append(server)
    seen = Served(tuple(f"127.0.0.1:{server.server_address[1]}" for server in servers)).look()
    assert seen.get(m.STEP) == 6
    assert seen.get(m.ROUNDS) == 4
    assert sorted(seen.all(m.PHASE).values()) == [1.0, 2.0]
    assert [said[:11] for said in verdicts(seen)] == ["no step for"]
    for server, board in zip(servers, boards, strict=True):
        server.shutdown()
        server.server_close()
        board.close()


def test_curves():
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert sparkline([3, float("nan"), 3]) == "▁!▁"
    assert sparkline([]) == ""
    assert sparkline([-1e308, 1e308]) == "▁▁"
    assert shown(RunStatus()).plain.startswith("no step yet\n")


@pytest.mark.parametrize(
    ("where", "said"),
    [([], "no run is named"), (["{}"], "has no metrics.jsonl"), (["127.0.0.1:1"], "no node answers at 127.0.0.1:1")],
)
def test_what_is_no_run_is_said(where, said, tmp_path):
    command = [sys.executable, "-m", "equiav", "top", *(one.format(tmp_path) for one in where), "--once"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_young_run_is_not_judged(tmp_path):
    folder(tmp_path, steps=15, effective_rank_image=1.2)
    (tmp_path / "config.yaml").write_text("train: {steps: 1000}\n")
    assert shown(Folder(tmp_path).look()).plain.startswith("well\n")
    (tmp_path / "config.yaml").unlink()  # nobody knows how long it is to be
    assert shown(Folder(tmp_path).look()).plain.startswith("well\n")


def test_an_end_counts_until_it_goes_on(tmp_path):
    seen = Folder(folder(tmp_path)).look()
    seen.values |= {(m.LAST_STEP.name, ()): 100.0, (m.ENDED.name, ("failed",)): 101.0}
    text = shown(seen)
    assert text.plain.startswith("failed\n")
    assert text.spans[0].style == "bold red"
    seen.values[m.ENDED.name, ("failed",)] = 99.0
    assert shown(seen).plain.startswith("well\n")
    (tmp_path / "summary.json").write_text("{")
    assert Folder(tmp_path).look().get(m.STEP) == 90


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.0 200 OK\r\n\r\n<html>", b"HTTP/1.0 200 OK\r\n\r\n\xff"]
)
def test_what_is_no_node_is_said(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answers():
            one, _ = server.accept()
            one.recv(1000)
            one.sendall(answer)
            one.close()

        Thread(target=answers).start()
        with pytest.raises(ConfigError, match=r"no node answers at 127\.0\.0\.1:"):
            Served((f"127.0.0.1:{server.getsockname()[1]}",)).look()


@pytest.mark.parametrize("where", ["foo:bar", "a b:9108", "http://[::1:9108"])
def test_what_is_no_address_is_said(where):
    with pytest.raises(ConfigError, match="there is no such folder, and no node answers at "):
        Served((where,)).look()
