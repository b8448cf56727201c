"""The trainer in Kubernetes: a `batch/v1` Job on one node, Kubeflow's PyTorchJob (training operator, v1) on several.

The object's name says which run it trains, so that a later watcher finds it; an annotation holds the run folder, which
tells apart runs whose names became equal. The run folder is on a volume that the pods and this machine share. Needs
the extra `k8s`, and a kubeconfig or a pod's service account.

The manifests are checked against the published schemas, and the requests against a server that stores objects. No test
runs a cluster, so what its controllers and the operator do with the objects is taken from their documentation.
"""

import os
import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from openlm_pipeline.errors import ClusterError, ConfigError, MissingInputError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.registry import LAUNCHERS
from openlm_pipeline.result import Say
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.launchers import Launcher
from openlm_pipeline.runs.launchers.job import TRAINER_DEFAULTS, torchrun_command
from openlm_pipeline.storage.files import write_text
from openlm_pipeline.storage.home import Home
from openlm_pipeline.strict import Strict

_TRAINER = ("-m", "openlm_pipeline.runs.programs", "train")
"""How a pod starts the trainer: its image knows where that is."""
_QUERY_SECONDS = 5.0
_POLL_SECONDS = 0.5
_DELETE_SECONDS = 120
"""For the cluster to remove pods after their grace."""
_REQUEST_SECONDS = 30
_RUN_LABEL = "openlm-pipeline/run"
_FOLDER_ANNOTATION = "openlm-pipeline/run-folder"
_LOG_LINES = 15


def object_name(experiment: Experiment) -> str:
    """Name of the Job or PyTorchJob: the run's name and version in the letters that Kubernetes allows."""
    name = re.sub(r"[^a-z0-9]+", "-", f"openlm-{experiment.name}-{experiment.version}".lower()).strip("-")
    if len(name) > 52:  # the operator and the Job controller make pods' names of it, of at most 63 letters
        raise ConfigError(
            f"{experiment.name}/{experiment.version} is too long for Kubernetes: {name} has {len(name)}"
            " letters, and 52 are possible; give the recipe a shorter name or version"
        )
    return name


def manifest(experiment: Experiment, home: Home, until: int, allow: Collection[str] = ()) -> str:
    """YAML of the object that trains a run up to `until` tokens, as `kubectl apply -f` takes it."""
    return yaml.safe_dump(job_object(experiment, home, until, allow), sort_keys=False)


def job_object(experiment: Experiment, home: Home, until: int, allow: Collection[str] = ()) -> dict[str, Any]:
    """The Job or PyTorchJob. It names Secrets, and holds nothing of them.

    Raises:
        ConfigError: the recipe has too long a name.
    """
    launcher, name = experiment.launcher, object_name(experiment)
    root = _home_in_pod(experiment, home)
    run_path = Home(root).run(experiment.name, experiment.version)
    metadata = {
        "name": name,
        "namespace": launcher.settings.namespace,
        "labels": {_RUN_LABEL: name},
        "annotations": {_FOLDER_ANNOTATION: str(run_path)},
    }
    rendezvous = ["--standalone"]
    if launcher.nodes > 1:
        # The operator gives each pod the master's address; Kubernetes fills it in.
        rendezvous = [
            f"--nnodes={launcher.nodes}",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=$(MASTER_ADDR):$(MASTER_PORT)",
            f"--rdzv-id={name}",
        ]
    experiment_file = run_path / "experiment.yaml"
    command = torchrun_command(launcher, experiment_file, until, "python", rendezvous, _TRAINER, allow=allow)
    template = {
        "metadata": {"labels": {_RUN_LABEL: name}},
        "spec": _pod_spec(launcher.settings, command, root, launcher.grace_seconds),
    }
    if launcher.nodes == 1:
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": metadata,
            "spec": {
                "backoffLimit": 0,
                # A pod that the cluster takes away is replaced, once it is gone, and is no failure.
                "podReplacementPolicy": "Failed",
                "podFailurePolicy": {
                    "rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
                },
                "template": template,
            },
        }
    replica = {"restartPolicy": "Never", "template": template}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": metadata,
        "spec": {
            "nprocPerNode": str(launcher.processes),
            "runPolicy": {"backoffLimit": 0, "cleanPodPolicy": "None"},
            "pytorchReplicaSpecs": {
                "Master": {"replicas": 1, **replica},
                "Worker": {"replicas": launcher.nodes - 1, **replica},
            },
        },
    }


def _home_in_pod(experiment: Experiment, home: Home) -> Path:
    return Path(experiment.launcher.settings.mount_path or home.root)


def _pod_spec(settings: "Kubernetes.Settings", command: list[str], home: Path, grace_seconds: int) -> dict[str, Any]:
    resources = {"nvidia.com/gpu": settings.gpus, "cpu": settings.cpu, "memory": settings.memory}
    limits = {name: str(value) for name, value in resources.items() if value is not None}
    container = {
        "name": "pytorch",  # by which the operator finds it
        "image": settings.image,
        "command": command,
        "env": [{"name": n, "value": v} for n, v in {**TRAINER_DEFAULTS, "OPENLM_HOME": str(home)}.items()],
        "envFrom": [{"secretRef": {"name": name}} for name in settings.env_from_secrets],
        "resources": {"limits": limits},
        "volumeMounts": [{"name": "home", "mountPath": str(home)}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    return {
        "restartPolicy": "Never",
        # For the step to end and the checkpoint to be written, and for torchrun to end after that.
        "terminationGracePeriodSeconds": grace_seconds + 30,
        **({"serviceAccountName": settings.service_account} if settings.service_account else {}),
        "containers": [container],
        "volumes": [
            {"name": "home", "persistentVolumeClaim": {"claimName": settings.volume_claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # NCCL needs more than the default of 64 MiB
        ],
    }


@LAUNCHERS.register("kubernetes")
class Kubernetes(Launcher):
    """A Kubernetes Job with one pod, or on several nodes Kubeflow's PyTorchJob."""

    class Settings(Strict):
        """The pods of `launcher.kind: kubernetes`."""

        image: str = Field(min_length=1)
        """With this project installed for its `python`."""
        volume_claim: str = Field(min_length=1)
        """PersistentVolumeClaim with `OPENLM_HOME`, which this machine sees as well."""
        mount_path: str | None = None
        """Where the claim is mounted in a pod; by default at this machine's path of `OPENLM_HOME`."""
        namespace: str = "default"
        gpus: int | None = Field(default=None, ge=1)
        """NVIDIA GPUs per pod."""
        cpu: str | None = None
        """Cores per pod, such as `16` or `500m`."""
        memory: str | None = None
        """Memory per pod, such as `256Gi`."""
        service_account: str | None = None
        env_from_secrets: tuple[str, ...] = ()
        """Secrets whose keys become environment variables of the trainer."""
        max_requeues: int = Field(default=100, ge=0)
        """Times that a run whose pods the cluster took away is started again."""

    @property
    def max_requeues(self) -> int:
        return self.settings.max_requeues

    def find(self) -> "KubernetesJob | None":
        """
        Raises:
            ConfigError: its name is taken by the run in another folder.
        """
        job = self._job()
        there = job.read()
        if there is None or job.final_condition(there):
            return None
        self.report(f"{job.description} of this run is there already: it is watched, none is added")
        return job

    def submit(self, until: int) -> "KubernetesJob":
        """Create the object; one of this run that ended is removed first. `launch/kubernetes.yaml` keeps it.

        Raises:
            ConfigError: its name is taken by the run in another folder.
        """
        job = self._job()
        if job.read() is not None:
            job.cancel()
        write_text(self.run.path / "launch" / "kubernetes.yaml", self.show(until))
        job.create(job_object(self.experiment, self.home, until, self.allow))
        self.report(f"{job.description} created")
        return self._job()

    def log_end(self, lines: int) -> str:
        return self._job().log_end(lines)

    def show(self, until: int) -> str:
        return manifest(self.experiment, self.home, until, self.allow)

    def _job(self) -> "KubernetesJob":
        return KubernetesJob(self.experiment, self.home, self.run, self.report)


def _configuration() -> Any:
    """The client's configuration: from a kubeconfig, else from the service account of the pod that this process is in.

    Raises:
        MissingInputError: there is neither.
    """
    from kubernetes import client, config

    made = client.Configuration()
    try:
        config.load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=made)
    except config.ConfigException as no_file:
        try:
            config.load_incluster_config(client_configuration=made)
        except config.ConfigException:
            raise MissingInputError(
                f"launcher.kind is kubernetes, but no cluster is configured ($KUBECONFIG, ~/.kube/config): {no_file}"
            ) from None
    return made


class KubernetesJob:
    """A Job or PyTorchJob; its state is asked for every few seconds."""

    def __init__(self, experiment: Experiment, home: Home, run: RunFolder, report: Say) -> None:
        try:
            from kubernetes import client
        except ModuleNotFoundError:
            raise MissingInputError(
                "launcher.kind is kubernetes, but its client is not installed: pip install 'openlm-pipeline[k8s]'"
            ) from None
        settings = experiment.launcher.settings
        group, version, plural = ("batch", "v1", "jobs")
        if experiment.launcher.nodes > 1:
            group, version, plural = ("kubeflow.org", "v1", "pytorchjobs")
        self._where = {"group": group, "version": version, "namespace": settings.namespace, "plural": plural}
        self._name = object_name(experiment)
        self.description = f"Kubernetes {plural[:-1]} {settings.namespace}/{self._name}"
        self._run, self._report, self._grace_seconds = run, report, experiment.launcher.grace_seconds
        self._folder = str(Home(_home_in_pod(experiment, home)).run(experiment.name, experiment.version))
        api = client.ApiClient(_configuration())
        self._objects, self._pods_api = client.CustomObjectsApi(api), client.CoreV1Api(api)
        self._error = client.ApiException
        self._asked_at, self._is_there, self._said = float("-inf"), True, ""
        self._last: dict[str, Any] | None = None

    def read(self) -> dict[str, Any] | None:
        """The object as it is now; None if there is none.

        Raises:
            ClusterError: the cluster does not answer.
            ConfigError: its name is taken by the run in another folder.
        """
        found = self._ask(self._objects.get_namespaced_custom_object, **self._where, name=self._name)
        if found is not None:
            folder = found["metadata"].get("annotations", {}).get(_FOLDER_ANNOTATION)
            if folder != self._folder:
                raise ConfigError(
                    f"{self.description} trains the run in {folder}, not {self._folder}; give this recipe "
                    "another `version` or namespace"
                )
        return found

    def create(self, body: dict[str, Any]) -> None:
        self._ask(self._objects.create_namespaced_custom_object, **self._where, body=body)

    def _ask(self, request, **arguments: Any) -> Any:
        """The answer to a request; None where what it names is not there."""
        from urllib3.exceptions import HTTPError

        try:
            return request(**arguments, _request_timeout=_REQUEST_SECONDS)
        except self._error as e:
            if e.status == 404 and "name" in arguments:
                return None
            raise ClusterError(f"Kubernetes refused {self.description}: {e.status} {e.reason} {e.body or ''}") from e
        except HTTPError as e:
            raise ClusterError(f"Kubernetes does not answer: {e}") from e

    def final_condition(self, there: dict[str, Any]) -> str | None:
        """How the object ended, None where it did not."""
        for condition in there.get("status", {}).get("conditions") or []:
            if condition["type"] in ("Complete", "Succeeded", "Failed") and condition["status"] == "True":
                return f"{condition['type']} {condition.get('message', '')}".strip()
        return None

    def running(self) -> bool:
        due = time.monotonic() - self._asked_at >= _QUERY_SECONDS
        if self._is_there and (due or self._run.read_outcome() is not None):
            self._asked_at = time.monotonic()
            try:
                self._last = self.read()
                self._is_there = self._last is not None and self.final_condition(self._last) is None
                if self._is_there:
                    self._say(self._pods_state())
            except ClusterError as e:  # an API server that is restarted comes back, and so does the job
                self._say(f"asked for again: {e}")
        return self._is_there

    def _say(self, state: str) -> None:
        if state != self._said:
            self._said = state
            self._report(f"{self.description}: {state}")

    def _pods(self) -> list[Any]:
        """Its pods, oldest first."""
        where = {"namespace": self._where["namespace"], "label_selector": f"{_RUN_LABEL}={self._name}"}
        found = self._ask(self._pods_api.list_namespaced_pod, **where)
        return sorted(found.items, key=lambda pod: pod.metadata.creation_timestamp)

    def _pods_state(self) -> str:
        pods = self._pods()
        for pod in pods:
            for condition in pod.status.conditions or []:
                if condition.type == "PodScheduled" and condition.status == "False":
                    return f"pending: {condition.message or condition.reason}"
        return ", ".join(sorted({pod.status.phase.lower() for pod in pods})) or "pending: no pods yet"

    def cancel(self) -> None:
        """Delete the object: its pods get SIGTERM and `launcher.grace_seconds` to save, then SIGKILL.

        Raises:
            ClusterError: the cluster does not answer, or its pods do not go away.
        """
        self._ask(
            self._objects.delete_namespaced_custom_object,
            **self._where,
            name=self._name,
            body={"propagationPolicy": "Foreground"},
        )
        give_up = time.monotonic() + self._grace_seconds + _DELETE_SECONDS
        while self.read() is not None or self._pods():
            if time.monotonic() > give_up:
                raise ClusterError(f"{self.description} does not go away; look with `kubectl describe`")
            time.sleep(_POLL_SECONDS)
        self._is_there, self._last = False, None

    def interrupted(self) -> bool:
        """Whether its pods were asked to end, or taken away, while the object itself stayed."""
        outcome = self._run.read_outcome()
        if self._last is None:
            return False
        if outcome is not None and outcome["status"] == "preempted":
            return True
        conditions = [c for pod in self._pods() for c in pod.status.conditions or []]
        return any(c.type == "DisruptionTarget" and c.status == "True" for c in conditions)

    def ending(self) -> str:
        how = "was deleted" if self._last is None else self.final_condition(self._last)
        log = self.log_end(_LOG_LINES)
        return f"{self.description} {how}" + (f"\nThe end of the log of {log}" if log else "")

    def log_end(self, lines: int) -> str:
        """The name of its last pod and the end of what that printed; nothing without one."""
        pods = self._pods()
        if not pods:
            return ""
        pod = pods[-1].metadata.name
        arguments = {"namespace": self._where["namespace"], "name": pod, "tail_lines": lines}
        return f"pod {pod}:\n{self._ask(self._pods_api.read_namespaced_pod_log, **arguments) or ''}"
