"""A stand-in for a Kubernetes cluster: an HTTP server that keeps Jobs and runs their container as a process here.

It answers the requests that the launcher makes as the API's documentation says: create, read, delete, list pods, log.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from small_run import REPOSITORY


class KubernetesServer(ThreadingHTTPServer):
    """Objects by their path, and the process of each."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.guard = folder, threading.Lock()
        self.objects: dict[str, dict[str, Any]] = {}
        self.processes: dict[str, subprocess.Popen] = {}
        self.created = 0
        self.unschedulable: str | None = None
        """While set, pods wait for this reason and no process starts."""

    def write_kubeconfig(self, path: Path) -> None:
        cluster = {"name": "here", "cluster": {"server": f"http://127.0.0.1:{self.server_port}"}}
        context = {"name": "here", "context": {"cluster": "here", "user": "me"}}
        config = {"clusters": [cluster], "contexts": [context], "users": [{"name": "me", "user": {}}]}
        path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "current-context": "here", **config}))

    def create(self, path: str, body: dict[str, Any]) -> None:
        self.created += 1
        self.objects[path] = body
        (container,) = body["spec"]["template"]["spec"]["containers"]
        variables = {v["name"]: v["value"] for v in container["env"]} | {"PYTHONPATH": str(REPOSITORY)}
        assert container["command"][0] == "python"
        if self.unschedulable is None:
            with (self.folder / "pod.log").open("ab") as log:
                self.processes[path] = subprocess.Popen(
                    [sys.executable, *container["command"][1:]],
                    env={"PATH": os.environ["PATH"], **variables},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )

    def look(self, path: str) -> dict[str, Any] | None:
        """The object with its status."""
        if path in self.objects and path in self.processes:
            code = self.processes[path].poll()
            if code is not None:
                kind = "Failed" if code else "Complete"
                self.objects[path]["status"] = {"conditions": [{"type": kind, "status": "True"}]}
        return self.objects.get(path)

    def delete(self, path: str) -> None:
        if process := self.processes.pop(path, None):
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
        del self.objects[path]

    def pods(self) -> list[dict[str, Any]]:
        spec = {"containers": [{"name": "pytorch"}]}
        scheduled = {"type": "PodScheduled", "status": "True"}
        if self.unschedulable:
            scheduled = {"type": "PodScheduled", "status": "False", "message": self.unschedulable}
        status = {"phase": "Pending" if self.unschedulable else "Running", "conditions": [scheduled]}
        made = {"name": "pod", "creationTimestamp": "2026-01-01T00:00:00Z"}
        return [{"metadata": made, "spec": spec, "status": status} for _ in self.objects]


class _Handler(BaseHTTPRequestHandler):
    server: KubernetesServer

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not printed."""

    def _answer(self, status: int, body: Any) -> None:
        text = body if isinstance(body, str) else json.dumps(body)
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def _missing(self) -> None:
        self._answer(404, {"kind": "Status", "reason": "NotFound", "code": 404})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        with self.server.guard:
            if path.endswith("/pods"):
                self._answer(200, {"kind": "PodList", "apiVersion": "v1", "items": self.server.pods()})
            elif path.endswith("/log"):
                self._answer(200, (self.server.folder / "pod.log").read_text())
            elif found := self.server.look(path):
                self._answer(200, found)
            else:
                self._missing()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path = f"{self.path.partition('?')[0]}/{body['metadata']['name']}"
        with self.server.guard:
            if path in self.server.objects:
                self._answer(409, {"kind": "Status", "reason": "AlreadyExists", "code": 409})
            else:
                self.server.create(path, body)
                self._answer(201, body)

    def do_DELETE(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        with self.server.guard:
            if path in self.server.objects:
                self.server.delete(path)
                self._answer(200, {"kind": "Status", "status": "Success"})
            else:
                self._missing()
