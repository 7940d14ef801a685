"""A real Prometheus on this machine."""

import json
import subprocess
import time
import urllib.parse
import urllib.request

import yaml

from tests.train.ranks import free_port


class Prometheus:
    def __init__(self, folder, ports, rules):
        self.port, self.ports = free_port(), ports
        self.url = f"http://127.0.0.1:{self.port}"
        (folder / "alerts.yaml").write_text(rules.replace("interval: 15s", "interval: 1s"))
        targets = [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
        jobs = [{"job_name": "equiav", "static_configs": targets}]
        settings = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(folder / "alerts.yaml")],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump({**settings, "scrape_configs": jobs}))
        command = ["prometheus", f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
        log = (folder / "prometheus.log").open("wb")
        self.process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{self.port}"], stdout=log, stderr=log
        )
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/-/ready", timeout=10).close()
                return
            except OSError:
                assert time.monotonic() < deadline, (folder / "prometheus.log").read_text()
                time.sleep(0.1)

    def ask(self, query, at=None):
        values = {"query": query, **({"time": at} if at else {})}
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{urllib.parse.urlencode(values)}", timeout=10) as answer:
            return json.load(answer)["data"]["result"]

    def end(self):
        self.process.terminate()
        self.process.wait()
