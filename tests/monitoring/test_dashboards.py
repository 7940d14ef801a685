"""The pages, and that Prometheus has something to show for each of their panels."""

import json
import os
import re
import subprocess

import pytest
import yaml

from monitoring import dashboards, manifests
from monitoring.alerts import ALERTS, RECORDS
from monitoring.dashboards import PAGES, panels
from monitoring.metrics import METRICS, series


def names(expressions):
    return {name for expr in expressions for name in re.findall(r"\bequiav_[a-z_]+", expr)}


@pytest.mark.parametrize("uid", PAGES)
def test_the_files_are_what_the_code_makes(uid):
    written = (dashboards.FOLDER / f"{uid}.json").read_text()
    assert written == dashboards.text(uid), "run `python -m monitoring.dashboards`"
    page = json.loads(written)
    assert page["uid"] == uid
    assert len(written) < 200_000  # `kubectl apply` keeps a copy of a ConfigMap in an annotation of 256 KiB
    shown = [panel for panel in page["panels"] if panel["type"] != "row"]
    assert len(shown) == sum(one == uid for one, _, _ in panels())
    for panel in shown:
        assert panel["description"].endswith(".")
        assert panel["datasource"]["uid"] == "${datasource}"
        assert "{}" not in panel["targets"][0]["expr"]


@pytest.mark.parametrize("uid", PAGES)
def test_a_page_has_the_variables_that_it_uses(uid):
    page = json.loads((dashboards.FOLDER / f"{uid}.json").read_text())
    there = {variable["name"]: variable for variable in page["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]+)", json.dumps([page["panels"], page["annotations"]])))
    assert used == set(there)
    for (
        name,
        variable,
    ) in there.items():  # Grafana escapes a value for a regular expression only where there may be several
        assert bool(variable.get("multi")) == (f'{name}=~\\"${name}' in json.dumps(page))


def test_every_metric_is_to_be_seen_and_nothing_else():
    known = {name for metric in METRICS for name in series(metric)}
    shown = names(query.expr for _, _, panel in panels() for query in panel.queries)
    assert shown <= known
    called = names([*RECORDS.values(), *(alert.expr for alert in ALERTS)])
    unseen = [metric.full_name for metric in METRICS if not {*series(metric)} & (shown | called)]
    assert unseen == []


@pytest.mark.parametrize("name", manifests.texts())
def test_the_manifests_have_them(name):
    assert (manifests.FOLDER / name).read_text() == manifests.texts()[name], "run `python -m monitoring.manifests`"


@pytest.mark.parametrize("given", [{}, {"PASSWORD": "mine $x"}])
def test_grafana_has_a_password_of_its_own(given, tmp_path):
    """What its container does before Grafana's own program, whose place `env` takes here."""
    objects = yaml.safe_load_all((manifests.FOLDER / "95-grafana.yaml").read_text())
    (deployment,) = (one for one in objects if one["kind"] == "Deployment")
    *shell, script = deployment["spec"]["template"]["spec"]["containers"][0]["command"]
    script = script.replace("/var/lib/grafana", str(tmp_path)).replace("/run.sh", "env")
    told = []
    for _ in range(2):  # the second time, the container has begun again
        done = subprocess.run(
            [*shell, script], env={"PATH": os.environ["PATH"], **given}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        variables = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        told += re.findall("^password of admin: (.*)$", done.stdout, re.MULTILINE)
        assert variables["GF_SECURITY_ADMIN_PASSWORD"] == (given.get("PASSWORD") or told[0])
    assert len(set(told)) == (0 if given else 1)
    assert given or len(told[0]) == 20
