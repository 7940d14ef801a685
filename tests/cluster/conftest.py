import os
import uuid

import pytest

from tests.cluster.cluster import Cluster, Kubectl


@pytest.fixture(scope="session")
def kubectl():
    if not os.environ.get("KUBECONFIG"):
        pytest.fail("these tests run by `python -m tests.cluster`, which makes a cluster")
    return Kubectl(os.environ["KUBECONFIG"])


@pytest.fixture(scope="session")
def image():
    return os.environ["EQUIAV_IMAGE"]


@pytest.fixture(scope="session")
def cluster(kubectl):
    """Whose machines a test may kill."""
    if not os.environ.get("EQUIAV_CLUSTER"):
        pytest.skip("needs the project's own cluster")
    return Cluster(os.environ["EQUIAV_CLUSTER"])


@pytest.fixture
def namespace(kubectl):
    """A new one, in which only pods of the `restricted` standard may run."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    yield name
    kubectl("delete", "namespace", name, "--wait=false")
