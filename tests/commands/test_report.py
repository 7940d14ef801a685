"""`equiav report`: a page of its own, that says what the files say."""

import base64
import json
import os
import queue
import re
import shutil
import signal
import subprocess
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import numpy as np
import pytest

from equiav import cli
from equiav.evaluate import examples
from equiav.evaluate.page import SCRIPT, page, ticks
from equiav.evaluate.report import gather
from tests.videos import photo

STEPS = 900


class Seen(HTMLParser):
    """What a browser would go for, and what is shown."""

    def __init__(self):
        super().__init__()
        self.wanted, self.tags, self.shown, self._open = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.wanted += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        self.wanted += re.findall(r"url\(([^)]*)\)", dict(attributes).get("style") or "")
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" in self._open:
            self.wanted += re.findall(r"url\(([^)]*)\)|@import[^;]*", data)
        else:
            self.shown.append(data)


def written(folder, name="one", starts=1, clips=6):
    run = folder / name
    (run / "eval").mkdir(parents=True)
    rows = [{"step": k, "loss": 10 / (k + 1), "loss_inter": 3.0, "similarity_audio": 0.9, "gain_audio": 0.001 * k, "lr": 1e-3,
             "loss_intra_audio": float("nan") if k == 5 else 1.0} for k in range(STEPS)]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 900, "lo')
    begun = [{"step": 300 * k, "ranks": k + 1, "equiav": "0.1.0", "code": "<b>"} for k in range(starts)]
    (run / "starts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in begun))
    (run / "config.yaml").write_text(f"seed: 3\ntrain:\n  steps: {STEPS}\n  batch_size: 8\n")
    times = {"equiav_run_began_time_seconds": 10.0, "equiav_run_ended_time_seconds": {"finished": 70.5}}
    (run / "summary.json").write_text(json.dumps({"equiav_step": STEPS, **times}))
    about = {"clips": 50, "of": 50, "model": str(run), "dataset": "clips"}
    recalled = {f"{way} {at}": {"mean": 12.5, "half spread": 0.5} for way in ("image to audio", "audio to image")
                for at in ("R@1", "R@5", "R@10", "median rank")}  # fmt: skip
    (run / "eval" / "retrieval.json").write_text(json.dumps({**about, **recalled, "benchmark": "VGGSound"}))
    rng = np.random.default_rng(0)
    one = {
        "picture": examples.picture(photo(0, (224, 224))),
        "spectrogram": examples.picture(rng.integers(0, 255, (128, 256, 3), np.uint8)),
        "sound": examples.sound((3000 * rng.standard_normal(160_000)).astype(np.int16), 16000),
        "heat": examples.warm(rng.standard_normal((14, 14))),
        "score": 0.5,
        "place of the picture": 1,
        "place of the sound": 7,
    }
    one |= {"nearest to centroid": one["picture"], "its heat": one["heat"]}
    thumb = examples.picture(rng.integers(0, 255, (64, 64, 3), np.uint8))
    told = []
    for k in range(clips):
        hits = [{"name": f"clip {k + n}</div><script>", "score": 0.5, "picture": thumb} for n in range(3)]
        told.append(one | {"name": f"clip {k}</div><script>", "pictures found": hits, "sounds found": hits})
    spots = rng.standard_normal((50, 2)).tolist()
    found = {"examples": told, "map": {"audio": spots, "image": spots, "names": ["<x>"] * 50}}
    (run / "eval" / "examples.json").write_text(json.dumps(found | about))
    return run


def told_of(html):
    learning = html[html.index("<h2>Learning") :]
    return re.findall("<figcaption>", learning[: learning.index("<h2>", 4)])


def test_a_page_asks_for_nothing_and_runs_nothing(tmp_path, capsys):
    run = written(tmp_path, starts=3)
    assert cli.main(["report", str(run)]) == 0
    html = (run / "report.html").read_text()
    seen = Seen()
    seen.feed(html)
    assert all(address.startswith("data:") for address in seen.wanted), [x[:50] for x in seen.wanted]
    assert seen.tags.count("script") == 1
    assert html.count("<script") == 1
    assert f"<script>{SCRIPT}</script>" in html  # our own, in which nothing of the data is
    assert seen.tags.count("audio") == 6
    shown = " ".join(seen.shown)
    assert "finished" in seen.shown
    paper = ("EquiAV, the paper (Table 4, VGGSound), image to audio", "28.5")
    for said in ("clip 3</div><script>", *paper, "12.5 ± 0.5", "900 of 900"):
        assert said in shown, said
    assert html.count('class="mark"') == 2 * len(
        told_of(html)
    )  # two starts beside the first, in every chart of learning
    data = json.loads((run / "report.data.json").read_text())
    (told,) = data["runs"]
    assert told["seconds"] == 60.5
    assert told["verdict"] == ["finished"]
    assert re.search(
        r'<p class="lead">R@10 among [\d,]+ clips: image to audio \d+ %, audio to image \d+ %, chance', html
    )
    assert told["last"]["loss"] == pytest.approx(np.mean([10 / (k + 1) for k in range(STEPS - STEPS // 20, STEPS)]))
    curve = np.array(told["curves"]["gain_ratio"]["audio"])
    assert len(curve) <= 200
    assert np.allclose(curve[:, 1], 0.001 * curve[:, 0])  # means of steps, at the mean of their numbers
    assert curve[:, 1].mean() == pytest.approx(0.001 * (STEPS - 1) / 2)


HOSTILE = {
    "picture": "http://evil.example/x.png",
    "sound": 'x" onerror="alert(1)',
    "heat": 'x" onerror="alert(2)',
    "spectrogram": "javascript:alert(3)",
    "nearest to centroid": "data:image/jpeg;base64,AAAA) ; background: url(http://evil.example/",
}


def test_what_somebody_else_wrote_is_not_fetched_and_not_run(tmp_path):
    run = written(tmp_path)
    said = json.loads((run / "eval" / "examples.json").read_text())
    for one in said["examples"]:
        one |= HOSTILE
        one["pictures found"][0]["picture"] = '"><script>alert(4)</script>'
    (run / "eval" / "examples.json").write_text(json.dumps(said))
    (run / "config.yaml").write_text("stream:\n  url: s3://me:hunter2@host/clips?X-Amz-Signature=abcdef\n")
    assert cli.main(["report", str(run)]) == 0
    html = (run / "report.html").read_text()
    seen = Seen()
    seen.feed(html)
    assert all(address.startswith("data:") for address in seen.wanted)
    assert seen.tags.count("script") == 1
    assert html.count("<script") == 1
    assert f"<script>{SCRIPT}</script>" in html  # our own, in which nothing of the data is
    assert not any(word in html for word in ("evil.example", "onerror", "alert(4)</script>", "hunter2", "abcdef"))
    assert "hunter2" not in (run / "report.data.json").read_text()


ODD = [
    ("eval/examples.json", '{"clips": 3}', "the files on examples"),
    ("eval/similarity.json", '{"clips": 3}', "similarity"),
    ("eval/retrieval.json", '{"clips": "many"}', "retrieval"),
    ("results.json", '{"accuracy": 0.3, "accuracy 95%": 0.3}', "classes"),
    ("eval/centroid.json", '{"clips": NaN}', "NaN is no finite number"),
    ("eval/centroid.json", '{"clips": 1e999}', "1e999 is no finite number"),
]


@pytest.mark.parametrize(("name", "content", "said"), ODD)
def test_odd_files_are_named(tmp_path, capsys, name, content, said):
    run = written(tmp_path, clips=1)
    (run / name).write_text(content)
    assert cli.main(["report", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (run / "report.html").exists()
    assert not (run / "report.data.json").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("summary.json", "[1]"), ("summary.json", '{"equiav_run_ended_time_seconds": {}, "equiav_run_began_time_seconds": 1}'),
     ("config.yaml", "train: null"), ("config.yaml", "[1, 2]"), ("starts.jsonl", "[1]\n{}\n"), ("summary.json", '{"a')],
)  # fmt: skip
def test_what_a_run_wrote_in_part_is_left_out(tmp_path, name, content):
    run = written(tmp_path, clips=1)
    (run / name).write_text(content)
    assert cli.main(["report", str(run)]) == 0


def test_a_report_takes_no_file_of_the_run(tmp_path):
    run = written(tmp_path, clips=1)
    before = (run / "summary.json").read_text()
    assert cli.main(["report", str(run), "--out", str(run / "summary.html")]) == 0
    assert (run / "summary.json").read_text() == before


def test_a_run_that_goes_on_is_not_called_bad(tmp_path):
    run = written(tmp_path, clips=1)
    (run / "summary.json").unlink()
    html = page([gather(str(run))], "x")
    assert '<span class="soft">not ended' in html


def test_several_runs_stand_beside_each_other(tmp_path):
    runs = [written(tmp_path, name, clips=1) for name in ("left", "right")]
    assert cli.main(["report", *map(str, runs), "--out", str(tmp_path / "both.html"), "--title", "A & B"]) == 0
    seen = Seen()
    seen.feed((tmp_path / "both.html").read_text())
    shown = " ".join(seen.shown)
    assert "A & B" in shown
    assert "left, image to audio, 50 clips" in shown
    assert "right, image to audio, 50 clips" in shown
    assert "Predictor similarity audio" in shown


def test_fifty_examples_are_below_ten_megabytes(tmp_path):
    run = written(tmp_path, clips=50)
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.html").stat().st_size < 10 * 2**20


def test_classification_stands_beside_the_paper(tmp_path):
    run = written(tmp_path, clips=1)
    (run / "model").mkdir()
    said = {"accuracy": 0.5, "accuracy 95%": [0.4, 0.6], "clips": 40, "of": 40, "dataset": "x", "parts": ""}
    (run / "model" / "results.json").write_text(json.dumps(said))
    (run / "config.yaml").write_text("tune:\n  benchmark: ESC-50\n  modality: audio\n")
    html = page([gather(str(run))], "x")
    for cell in ("50.0", "40.0 to 60.0", "EquiAV, the paper (Table 2, ESC-50)", "96.0"):
        assert f"<td>{cell}</td>" in html
    probed = {"linear": {"accuracy": 0.75, "clips": 40}, "nearest": {"accuracy": 0.25, "clips": 40}}
    (run / "model" / "results.json").write_text(json.dumps(probed))
    html = page([gather(str(run))], "x")
    assert "<td>one linear</td><td>accuracy</td><td>75.0</td>" in html
    assert "<td>one nearest</td><td>accuracy</td><td>25.0</td>" in html


def test_names_that_begin_alike_are_told_apart(tmp_path):
    run = written(tmp_path, clips=3)
    path = run / "eval" / "examples.json"
    said = json.loads(path.read_text())
    for one in said["examples"]:
        for what in ("pictures found", "sounds found"):
            for k, hit in enumerate(one[what]):
                hit["name"] = f"a/very/long/beginning/of/all/names-{k}<"
    path.write_text(json.dumps(said))
    html = page([gather(str(run))], "x")
    found = set(re.findall(r'<div class="cut" title="[^"]*">([^<]*)</div>', html))
    assert found == {f"…{k}&lt;" for k in range(len(said["examples"][0]["sounds found"]))}


def test_what_is_not_there_is_not_shown(tmp_path, capsys):
    run = written(tmp_path, clips=1)
    for name in ("config.yaml", "starts.jsonl", "summary.json", "eval/retrieval.json", "eval/examples.json"):
        (run / name).unlink()
    (told,) = [gather(str(run))]
    html = page([told], "x")
    assert "Zero-shot" not in html
    assert re.search(r'<p class="lead">loss [\d.]+ after [\d,]+ steps; not evaluated yet', html)
    assert "<h2>Learning" in html
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", str(tmp_path / "empty")]) == 2
    assert "no run has written there" in capsys.readouterr().err
    (run / "eval" / "retrieval.json").write_text("[1]")
    assert cli.main(["report", str(run)]) == 2
    assert "retrieval.json: expected results, found list" in capsys.readouterr().err
    assert cli.main(["report"]) == 2
    assert cli.main(["report", str(run), "--out", str(tmp_path / "x.txt")]) == 2


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7.9), (1e-6, 3e-6), (0.87, 0.92), (0, 12345), (5, 5)])
def test_ticks_are_round_and_few(low, high):
    found = ticks(low, high)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-9 <= x <= high + 1e-9 for x in found)


CHROMIUM = shutil.which("chromium")


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here (Debian's package)")
@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_opens_it_without_a_word(tmp_path, width):
    """Nothing on the console, nothing asked of a network; nothing wider than the window; a sound that plays."""
    run = written(tmp_path, starts=2)
    assert cli.main(["report", str(run)]) == 0
    html = (run / "report.html").read_text()
    # The page itself has no script: this one looks at it.
    probe = """<script>addEventListener("load", async () => {
      const wide = document.documentElement.scrollWidth, audio = document.querySelector("audio");
      audio.muted = true; audio.preload = "auto";
      const plays = await new Promise(done => { audio.oncanplaythrough = () => done("plays " + audio.duration.toFixed(0));
        audio.onerror = () => done("error " + audio.error.message); audio.load(); });
      const broken = [...document.images].filter(image => !image.naturalWidth).length;
      const asked = performance.getEntriesByType("resource").filter(one => !one.name.startsWith("data:")).length;
      fetch("http://127.0.0.1:PORT/" + encodeURIComponent(JSON.stringify({wide, plays, broken, asked})), {mode: "no-cors"});
    });</script></body>"""
    said = queue.SimpleQueue()

    class Ear(BaseHTTPRequestHandler):
        def do_GET(self):
            said.put(json.loads(unquote(self.path[1:])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars",
               f"--window-size={width},900", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    environment = os.environ | {"HOME": str(tmp_path)}
    with HTTPServer(("127.0.0.1", 0), Ear) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        (tmp_path / "probed.html").write_text(html.replace("</body>", probe.replace("PORT", str(server.server_port))))
        looking = subprocess.Popen(
            [*browser, "--remote-debugging-port=0", f"file://{tmp_path / 'probed.html'}"],
            stderr=subprocess.DEVNULL, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            found = said.get(timeout=120)
        finally:
            os.killpg(looking.pid, signal.SIGKILL)
            looking.wait()
            server.shutdown()
    assert found["wide"] <= max(width, 500)  # a headless window is no narrower
    assert found["plays"] == "plays 10"
    assert (found["broken"], found["asked"]) == (0, 0)
    shot = tmp_path / "page.png"
    done = subprocess.run(
        [*browser, f"--screenshot={shot}", f"file://{run / 'report.html'}"],
        capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    assert shot.stat().st_size > 10_000


def test_pictures_and_sounds_are_what_they_were(tmp_path):
    wave = (8000 * np.sin(np.arange(32000) * 0.3)).astype(np.int16)
    for rate in (16000, 22050):
        content = base64.b64decode(examples.sound(wave, rate).partition("base64,")[2])
        Path(tmp_path, "x.mp3").write_bytes(content)
        import soundfile

        heard, at = soundfile.read(tmp_path / "x.mp3")
        assert at == 16000
        assert len(heard) / at == pytest.approx(len(wave) / rate, abs=0.15)
        assert 0.15 < np.abs(heard).max() < 0.35
