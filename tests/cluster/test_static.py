"""A linter's opinion of the manifests. What it is told to pass over has its reason here."""

import subprocess
from pathlib import Path

import pytest

from tests.cluster import binaries

pytestmark = pytest.mark.cluster

PASSED_OVER = {
    # An image is named by a tag that is never moved, or a digest: to ask the registry again at each start would make a
    # restart depend on it.
    "container-image-pull-policy",
    # The demonstration's store has one volume, which is at one node at a time.
    "deployment-replicas",
    "deployment-strategy",
}


def test_the_linter_has_nothing_to_say():
    command = [binaries.program("kube-score"), "score", "--output-format", "ci", "--exit-one-on-warning"]
    for name in sorted(PASSED_OVER):
        command += ["--ignore-test", name]
    done = subprocess.run([*command, *sorted(Path("k8s").glob("*.yaml"))], capture_output=True, text=True)
    told = [line for line in done.stdout.splitlines() if not line.startswith(("[OK]", "[SKIPPED]"))]
    assert done.returncode == 0, "\n".join([*told, done.stderr])
    assert "[OK]" in done.stdout
