"""Training in Kubernetes: manifests against the published schemas, and a job's life against a stand-in of the API."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from kubernetes_server import KubernetesServer
from small_run import BATCH, SmallRun

from openlm_pipeline.errors import ClusterError, ConfigError, MissingInputError, TrainingError
from openlm_pipeline.pipeline import training as training_stage
from openlm_pipeline.runs.launch import Measured, MilestoneReached, launcher_of
from openlm_pipeline.runs.launchers.kubernetes import manifest

pytest.importorskip("kubernetes", reason="the extra k8s is not installed")
ONE_NODE = (
    "launcher.kind=kubernetes",
    "launcher.grace_seconds=60",
    "launcher.kubernetes={image: registry/openlm:1, volume_claim: home, namespace: research}",
)
FULL = (
    "launcher.kubernetes.mount_path=/mnt/openlm",
    "launcher.kubernetes.gpus=8",
    "launcher.kubernetes.cpu=500m",
    "launcher.kubernetes.memory=8Gi",
    "launcher.kubernetes.service_account=trainer",
    "launcher.kubernetes.env_from_secrets=[wandb, s3]",
    "launcher.processes=8",
)


def test_the_job_is_valid_for_the_published_schema(tmp_path: Path):
    schemas = pytest.importorskip("kubernetes_validate", reason="the schemas' package is not installed")
    small = SmallRun(tmp_path, (2,))
    for overrides in (ONE_NODE, (*ONE_NODE, *FULL)):
        job = yaml.safe_load(manifest(small.experiment(*overrides), small.home, 512))
        for version in ("1.29", "1.37"):
            schemas.validate(job, version, strict=True)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "cpu": "500m", "memory": "8Gi"}
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}, {"secretRef": {"name": "s3"}}]
    assert "/mnt/openlm/runs/small/v1/experiment.yaml" in container["command"]
    assert pod["serviceAccountName"] == "trainer"
    job["spec"]["backofLimit"] = 1
    with pytest.raises(schemas.ValidationError):
        schemas.validate(job, "1.37", strict=True)


def test_the_pytorchjob_is_valid_for_its_operators_models(tmp_path: Path):
    training = pytest.importorskip("kubeflow.training", reason="Kubeflow's models are not installed")
    small = SmallRun(tmp_path, (2,))
    job = yaml.safe_load(manifest(small.experiment(*ONE_NODE, *FULL, "launcher.nodes=4"), small.home, 512))
    client = training.ApiClient()
    # What the models do not know is lost on the way, and what they require is missed.
    read = client.deserialize(SimpleNamespace(data=json.dumps(job)), "KubeflowOrgV1PyTorchJob")
    assert client.sanitize_for_serialization(read) == job
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {name: r["replicas"] for name, r in replicas.items()} == {"Master": 1, "Worker": 3}
    assert "--nnodes=4" in replicas["Worker"]["template"]["spec"]["containers"][0]["command"]


def test_names_that_kubernetes_cannot_have_are_refused(tmp_path: Path):
    small = SmallRun(tmp_path, (2,))
    with pytest.raises(ConfigError, match="too long for Kubernetes"):
        manifest(small.experiment(*ONE_NODE, f"name={'a' * 60}"), small.home, 512)
    with pytest.raises(ConfigError, match="needs 'kubernetes"):
        small.experiment("launcher.kind=kubernetes")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    with KubernetesServer(tmp_path) as server:
        server.write_kubeconfig(tmp_path / "kubeconfig")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        for path in list(server.objects):
            server.delete(path)
        server.shutdown()
        thread.join()


def watch(small: SmallRun, reports: list[str], *overrides: str):
    experiment = small.experiment(*ONE_NODE, *overrides)
    return training_stage.train(
        experiment, small.home, experiment.milestones[-1], reports.append, allow={"repeat_data"}
    )


@pytest.mark.drill
def test_a_job_is_created_found_again_and_deleted(tmp_path: Path, cluster: KubernetesServer):
    small = SmallRun(tmp_path, (4, 100_000))
    reports: list[str] = []
    first = watch(small, reports)
    while not isinstance(next(first), MilestoneReached):
        pass
    assert any(r.endswith("research/openlm-small-v1 created") for r in reports)
    experiment = small.experiment(*ONE_NODE)
    assert launcher_of(experiment, small.home, small.run, reports.append).find() is not None
    assert "it is watched" in reports[-1]
    first.close()
    assert cluster.objects == {}
    assert small.run.read_outcome()["status"] == "preempted"
    assert small.run.read_outcome()["step"] in small.steps_on_disk()
    assert cluster.created == 1


@pytest.mark.drill
def test_a_failed_job_shows_its_log_and_the_next_takes_its_place(tmp_path: Path, cluster: KubernetesServer):
    small = SmallRun(tmp_path, (2,))
    with pytest.raises(TrainingError, match=r"embedding has 100 rows[\s\S]*`openlm logs"):
        list(watch(small, [], "model.vocab_size=100"))
    assert len(cluster.objects) == 1
    events = list(watch(small, []))
    assert [e.label for e in events if isinstance(e, MilestoneReached)] == [f"t0{2 * BATCH}"]
    assert [e.record["step"] for e in events if isinstance(e, Measured) and "loss" in e.record] == [1, 2]
    assert cluster.created == 2


@pytest.mark.drill
def test_why_pods_wait_is_told_and_waiting_ones_are_deleted(tmp_path: Path, cluster: KubernetesServer):
    cluster.unschedulable = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    small = SmallRun(tmp_path, (2,))
    told: list[str] = []

    def report(line: str) -> None:
        told.append(line)
        if "Insufficient" in line:
            raise KeyboardInterrupt

    experiment = small.experiment(*ONE_NODE)
    with pytest.raises(KeyboardInterrupt):
        list(training_stage.train(experiment, small.home, 512, report))
    assert told[-1].endswith("pending: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    assert cluster.objects == {}


def test_a_cluster_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = SmallRun(tmp_path, (2,))
    server = KubernetesServer(tmp_path)
    server.write_kubeconfig(tmp_path / "kubeconfig")
    server.server_close()
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with pytest.raises(ClusterError, match="does not answer"):
        list(watch(small, []))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(MissingInputError, match="no cluster is configured"):
        list(watch(small, []))
