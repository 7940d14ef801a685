"""`make dashboards`: a smoke run that a Prometheus of this machine watches, and the dashboards drawn from what that has seen."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from monitoring import alerts
from monitoring.dashboards import PAGES
from monitoring.exporter import PORT
from monitoring.picture import draw

OUT, ADDRESS = Path("runs/dashboards"), "127.0.0.1:9090"
SETTINGS = f"""\
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{alerts.FILE}]
scrape_configs:
  - job_name: equiav
    static_configs: [{{targets: ["127.0.0.1:{PORT}"]}}]
"""


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="equiav-prometheus-") as folder:
        Path(folder, "prometheus.yml").write_text(SETTINGS)
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        log = Path(folder, "log")
        with log.open("wb") as file:
            try:
                prometheus = subprocess.Popen([*command, f"--web.listen-address={ADDRESS}"], stdout=file, stderr=file)
            except FileNotFoundError:
                sys.exit("make dashboards runs Prometheus: apt-get install prometheus")
        print(f"Prometheus: http://{ADDRESS} while the run lives", flush=True)
        begun = time.time()
        try:
            run = [sys.executable, "-m", "equiav", "smoke", "--out", str(OUT), "--metrics.port", str(PORT)]
            status = subprocess.run(run).returncode
            if prometheus.poll() is not None:
                sys.exit(f"Prometheus has ended: {log.read_text()[-1000:]}")
            for uid in PAGES:
                path = OUT / f"{uid}.png"
                empty = draw(f"http://{ADDRESS}", uid, OUT.name, begun, time.time(), str(path))
                print(f"{path}; empty: {', '.join(empty) or 'none'}")
        finally:
            prometheus.terminate()
            prometheus.wait()
    return status


if __name__ == "__main__":
    sys.exit(main())
