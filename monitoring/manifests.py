"""`python -m monitoring.manifests`: writes what in k8s/ holds the alerts and the dashboards: ConfigMaps of the files here."""

from __future__ import annotations

from pathlib import Path

import yaml

from monitoring import alerts, dashboards

FOLDER = Path(__file__).parents[1] / "k8s"
HEAD = "# Written by `python -m monitoring.manifests` from monitoring/.\n"


def config_map(name: str, data: dict[str, str]) -> dict[str, object]:
    about = {"name": name, "namespace": "equiav-system", "labels": {"app.kubernetes.io/managed-by": "equiav"}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": data}


def texts() -> dict[str, str]:
    """File there -> its content."""
    pages = {f"{uid}.json": (dashboards.FOLDER / f"{uid}.json").read_text() for uid in dashboards.PAGES}
    made = {
        "90-alerts.yaml": config_map("prometheus-alerts", {"alerts.yaml": alerts.text()}),
        "94-dashboards.yaml": config_map("grafana-dashboards", pages),
    }
    return {name: HEAD + yaml.safe_dump(one, sort_keys=False, width=10**6) for name, one in made.items()}


if __name__ == "__main__":
    for name, content in texts().items():
        (FOLDER / name).write_text(content)
