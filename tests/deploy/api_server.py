"""As much of a Kubernetes API server as kubectl needs: it keeps what it is sent if every key is known, and notes every request.

It has no controllers: nothing runs. Two rules that matter are those of the real one: an immutable ConfigMap and the template of a
Job do not change.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import schemas

KINDS = {
    "v1": {
        "configmaps": "ConfigMap",
        "persistentvolumeclaims": "PersistentVolumeClaim",
        "services": "Service",
        "secrets": "Secret",
        "pods": "Pod",
    },
    "batch/v1": {"jobs": "Job"},
    "apps/v1": {"deployments": "Deployment"},
    "jobset.x-k8s.io/v1alpha2": {"jobsets": "JobSet"},
    "trainer.kubeflow.org/v1alpha1": {"trainjobs": "TrainJob", "trainingruntimes": "TrainingRuntime"},
}
VERBS = ["create", "delete", "get", "list", "patch", "watch"]
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


def status(code: int, message: str) -> dict[str, Any]:
    reasons = {404: "NotFound", 422: "Invalid", 400: "BadRequest"}
    failure = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
    return {**failure, "message": message, "reason": reasons[code], "code": code}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: dict[tuple[str, str], dict[str, Any]]  # by resource and name
    requests: list[tuple[str, str]]  # method and path

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, code: int = 200) -> None:
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, code: int, message: str) -> None:
        self.answer(status(code, message), code)

    def place(self) -> tuple[str, str, str]:
        """The version, resource and name that a path names, each empty where it names none."""
        parts = urlsplit(self.path).path.strip("/").split("/")
        version, rest = (parts[1], parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
        rest = rest[2:] if rest[:1] == ["namespaces"] else rest
        return version, *[*rest, "", ""][:2]

    def body(self) -> dict[str, Any]:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def chosen(self, resource: str) -> list[dict[str, Any]]:
        label, _, value = parse_qs(urlsplit(self.path).query).get("labelSelector", ["="])[0].partition("=")
        found = [item for (of, _), item in self.objects.items() if of == resource]
        return [item for item in found if not label or item["metadata"].get("labels", {}).get(label) == value]

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        version, resource, name = self.place() if path.startswith(("/api/v1", "/apis/")) else ("", "", "")
        if path == "/api":
            self.answer({"kind": "APIVersions", "versions": ["v1"]})
        elif path == "/apis":
            named = [(version.partition("/")[0], version) for version in KINDS if "/" in version]
            versions = [{"groupVersion": v, "version": v.partition("/")[2]} for _, v in named]
            groups = [{"name": g, "versions": [v], "preferredVersion": v} for (g, _), v in zip(named, versions, strict=True)]
            self.answer({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        elif path == "/openapi/v3":
            paths = {f"{'apis' if '/' in v else 'api'}/{v}": {"serverRelativeURL": f"/openapi/v3/{v}"} for v in KINDS}
            self.answer({"paths": paths})
        elif path.startswith("/openapi/v3/"):
            self.answer(openapi(path.removeprefix("/openapi/v3/")))
        elif version in KINDS and not resource:
            common = {"singularName": "", "namespaced": True, "verbs": VERBS}
            listed = [{"name": name, "kind": kind, **common} for name, kind in KINDS[version].items()]
            self.answer({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": listed})
        elif path.endswith("/log"):
            self.answer(f"{name} says: step 1\n")
        elif resource and not name:
            self.requests.append(("GET", self.path))
            kind = f"{KINDS[version][resource]}List"
            self.answer({"kind": kind, "apiVersion": version, "metadata": {}, "items": self.chosen(resource)})
        elif (resource, name) in self.objects:
            self.answer(self.objects[resource, name])
        else:
            self.refuse(404, f'{resource} "{name}" not found')

    def do_POST(self) -> None:
        _, resource, _ = self.place()
        item = self.body()
        self.requests.append(("POST", self.path))
        annotations = item["metadata"].pop("annotations", {})
        item["metadata"] = {key: value for key, value in item["metadata"].items() if value is not None}
        try:
            schemas.check(item)
        except ValueError as error:
            self.refuse(400, f"strict decoding error: {error}")
            return
        item["metadata"] |= {"annotations": annotations, "uid": f"{len(self.requests)}", "resourceVersion": "1"}
        self.objects[resource, item["metadata"]["name"]] = item
        if resource == "jobs":
            pod = {"apiVersion": "v1", "kind": "Pod", **item["spec"]["template"]}
            pod["metadata"] = {**pod["metadata"], "name": f"{item['metadata']['name']}-pod", "namespace": "default"}
            self.objects["pods", pod["metadata"]["name"]] = pod
        self.answer(item, 201)

    def do_PATCH(self) -> None:
        _, resource, name = self.place()
        change = self.body()
        self.requests.append(("PATCH", self.path))
        if resource in ("configmaps", "jobs") and change.keys() & {"data", "spec"}:
            self.refuse(422, f'{resource} "{name}" is invalid: field is immutable')
            return
        self.answer(self.objects[resource, name])

    def do_DELETE(self) -> None:
        _, resource, name = self.place()
        self.requests.append(("DELETE", self.path))
        if self.headers.get("Content-Length"):
            self.body()
        self.objects.pop(("pods", f"{name}-pod"), None)
        self.answer(self.objects.pop((resource, name)))


def openapi(version: str) -> dict[str, Any]:
    """The schema of one version, as far as kubectl looks: that a change may be checked strictly."""
    group, _, of = version.rpartition("/")
    paths = {
        f"/apis/{version}/namespaces/{{namespace}}/{resource}/{{name}}": {
            "patch": {
                "x-kubernetes-group-version-kind": {"group": group, "version": of, "kind": kind},
                "parameters": [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}],
                "responses": {},
            }
        }
        for resource, kind in KINDS[version].items()
    }
    return {"openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "1"}, "paths": paths}


@contextmanager
def serving() -> Iterator[SimpleNamespace]:
    """A server for as long as the context lasts: its ``url``, and ``objects`` and ``requests`` as it knows them."""
    handler = type("Handler", (Handler,), {"objects": {}, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", objects=handler.objects, requests=handler.requests)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
