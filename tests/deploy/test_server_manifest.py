"""Kubernetes: manifests of the cluster's own kinds are valid, and the plain server's is whole."""

import re
from pathlib import Path
from typing import Any

import pytest

from server.app import app
from tests.deploy.files import DEPLOY, SCRIPTS, check, read_all
from tests.support.paths import ROOT

MANIFESTS = sorted(DEPLOY.glob("*.yaml"))
OBJECTS = {each["kind"]: each for each in read_all(DEPLOY / "server.yaml")}
POD: dict[str, Any] = OBJECTS["Deployment"]["spec"]["template"]
SPEC: dict[str, Any] = POD["spec"]
(SERVER,) = SPEC["containers"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
GOODBYE_SECONDS = 2
# Kinds of operators, whose schemas are their own.
FOREIGN = {"LeaderWorkerSet", "RayService", "ServiceMonitor"}


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_kubernetes_knows_every_field(file: Path) -> None:
    told = check(SCRIPTS / "kubernetes-validate", "--strict", file)
    unknown = set(re.findall(r"schema for kind (\w+)", told))
    assert unknown <= FOREIGN
    assert told.count(" passed ") == len(read_all(file)) - len(unknown)


def test_the_pod_is_held_to_the_restricted_profile() -> None:
    whole, own = SPEC["securityContext"], SERVER["securityContext"]
    assert whole["runAsNonRoot"] is True
    assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert own["readOnlyRootFilesystem"] is True
    assert SPEC["automountServiceAccountToken"] is False


def test_the_pod_is_the_images_user_and_has_its_folders() -> None:
    (user,) = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    context = SPEC["securityContext"]
    assert (str(context["runAsUser"]), str(context["runAsGroup"])) == user
    assert context["fsGroup"] == context["runAsGroup"]
    (volumes,) = re.findall(r"^VOLUME \[(.*)\]$", DOCKERFILE, re.MULTILINE)
    mounted = {each["mountPath"] for each in SERVER["volumeMounts"]}
    assert mounted == {*re.findall(r'"(/\w+)"', volumes), "/tmp"}


def test_the_pod_starts_what_the_image_starts() -> None:
    (words,) = re.findall(r"^CMD \[(.*)\]$", DOCKERFILE, re.MULTILINE)
    assert SERVER["args"] == re.findall(r'"([^"]+)"', words)
    (port,) = re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.MULTILINE)
    assert [each["containerPort"] for each in SERVER["ports"]] == [int(port)]


def test_all_of_it_is_about_the_same_pod_and_port() -> None:
    labels = POD["metadata"]["labels"]
    service = OBJECTS["Service"]
    selectors = [
        OBJECTS["Deployment"]["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        OBJECTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(each == labels for each in selectors)
    monitor = OBJECTS["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"] == service["metadata"]["labels"]
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "inferneo"
    assert monitor["endpoints"][0]["path"] in {rule.rule for rule in app.url_map.iter_rules()}
    (port,) = SERVER["ports"]
    assert monitor["endpoints"][0]["port"] == port["name"]
    assert service["spec"]["ports"] == [
        {"name": port["name"], "port": port["containerPort"], "targetPort": port["name"]}
    ]
    assert OBJECTS["NetworkPolicy"]["spec"]["ingress"] == [
        {"ports": [{"port": port["containerPort"]}]}
    ]
    claims = [each["persistentVolumeClaim"] for each in SPEC["volumes"][:1]]
    assert claims == [{"claimName": OBJECTS["PersistentVolumeClaim"]["metadata"]["name"]}]


def test_probes_ask_for_paths_that_need_no_key() -> None:
    paths = {k: SERVER[k]["httpGet"]["path"] for k in SERVER if k.endswith("Probe")}
    assert paths == {
        "startupProbe": "/health",
        "readinessProbe": "/ready",
        "livenessProbe": "/health",
    }


def test_the_pod_has_time_to_drain() -> None:
    command, seconds = SERVER["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    drain = next(e["value"] for e in SERVER["env"] if e["name"] == "INFERNEO_DRAIN_SECONDS")
    needed = float(seconds) + float(drain) + GOODBYE_SECONDS
    assert needed < SPEC["terminationGracePeriodSeconds"]


def test_a_node_can_be_drained() -> None:
    budget = OBJECTS["PodDisruptionBudget"]["spec"]
    assert budget["maxUnavailable"] >= OBJECTS["Deployment"]["spec"]["replicas"]
    assert SPEC["enableServiceLinks"] is False
