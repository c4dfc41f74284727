"""The manifests of docs/deploy: Kubernetes knows them, and what they say about the server is so."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.app import app
from server.config.replica_settings import ReplicaSettings
from server.config.schema import PREFIX
from server.config.settings import Settings
from server.endpoints import ENDPOINTS
from tests.deploy.files import DEPLOY, GOODBYE_SECONDS, SCRIPTS, check, read_all
from tests.support.paths import ROOT

FILES = sorted(DEPLOY.glob("*.yaml"))
GROUPS = ["gpu-hosts.yaml", "tpu-slice.yaml"]
SECRETS = {"INFERNEO_KEYS_DB": "redis://host:6379/0", "INFERNEO_JOB_TOKEN": 32 * "x"}
OF_LEADER_WORKER_SET = {
    "LWS_LEADER_ADDRESS": "inferneo-0.inferneo.default",
    "LWS_GROUP_SIZE": "2",
    "LWS_WORKER_INDEX": "1",
}
CHIPS = ("google.com/tpu", "nvidia.com/gpu")
# Kinds of operators, whose schemas are their own.
FOREIGN = {"LeaderWorkerSet", "RayService", "ServiceMonitor"}
OBJECTS = {each["kind"]: each for each in read_all(DEPLOY / "server.yaml")}
POD: dict[str, Any] = OBJECTS["Deployment"]["spec"]["template"]
SPEC: dict[str, Any] = POD["spec"]
(SERVER,) = SPEC["containers"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def of_kind(name: str, kind: str) -> dict[str, Any]:
    return next(each for each in read_all(DEPLOY / name) if each["kind"] == kind)


def pods(part: Any) -> Iterator[dict[str, Any]]:
    """What describes pods, below a part of a manifest."""
    if isinstance(part, dict):
        if "containers" in part:
            yield part
        for each in part.values():
            yield from pods(each)
    elif isinstance(part, list):
        for each in part:
            yield from pods(each)


def containers(part: Any) -> Iterator[dict[str, Any]]:
    for pod in pods(part):
        yield from pod["containers"]


def variables(container: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each.get("value", "") for each in container.get("env", ())}


def group(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The template of a group's pods, and the containers of its leader and of the others."""
    template = of_kind(name, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    leader, follower = (
        next(containers(template[part])) for part in ("leaderTemplate", "workerTemplate")
    )
    return template, leader, follower


def test_there_are_manifests() -> None:
    assert {file.name for file in FILES} == {*GROUPS, "replicas.yaml", "server.yaml"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_kubernetes_knows_every_field(file: Path) -> None:
    told = check(SCRIPTS / "kubernetes-validate", "--strict", file)
    unknown = set(re.findall(r"schema for kind (\w+)", told))
    assert unknown <= FOREIGN
    assert told.count(" passed ") == len(read_all(file)) - len(unknown)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_variable_is_a_setting(file: Path) -> None:
    fields = ReplicaSettings if file.name == "replicas.yaml" else Settings
    known = {PREFIX + field.upper() for field in fields.model_fields}
    for container in containers(read_all(file)):
        used = {name for name in variables(container) if name.startswith(PREFIX)}
        assert used <= known
    assert set(re.findall(r"INFERNEO_\w+", file.read_text())) <= known


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_values_are_good(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for container in containers(read_all(file)):
        found = variables(container)
        if not any(name.startswith(PREFIX) for name in found):
            continue
        for name, value in found.items():
            set_by = re.sub(r"\$\((\w+)\)", lambda found: OF_LEADER_WORKER_SET[found[1]], value)
            monkeypatch.setenv(name, set_by or SECRETS.get(name, ""))
        settings = ReplicaSettings.load()
        if "INFERNEO_KEYS_DB" in found:  # of one server the image says where
            assert settings.keys_location() == SECRETS["INFERNEO_KEYS_DB"]
        job = settings.job_config()
        assert (job is not None) == (file.name in GROUPS)
        if job:
            assert job.token == SECRETS["INFERNEO_JOB_TOKEN"]
            assert job.coordinator in (None, "inferneo-0.inferneo.default:8476")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_mounted_and_referred_to_is_there(file: Path) -> None:
    for manifest in read_all(file):
        claims = manifest["spec"].get("volumeClaimTemplates", ())
        for pod in pods(manifest):
            volumes = {each["name"] for each in pod.get("volumes", ())}
            volumes |= {each["metadata"]["name"] for each in claims}
            for container in pod["containers"]:
                assert {each["name"] for each in container["volumeMounts"]} == volumes


@pytest.mark.parametrize("name", [*GROUPS, "server.yaml"])
def test_probes_ask_for_paths_that_need_no_key(name: str) -> None:
    leader, follower = group(name)[1:] if name in GROUPS else (SERVER, {})
    public = {each.path for each in ENDPOINTS if each.access == "public"}
    paths = {kind: leader[kind]["httpGet"]["path"] for kind in leader if kind.endswith("Probe")}
    assert paths == {
        "readinessProbe": "/ready",
        "startupProbe": "/health",
        "livenessProbe": "/health",
    }
    assert set(paths.values()) <= public
    assert not [kind for kind in follower if kind.endswith("Probe")]  # it serves no HTTP


@pytest.mark.parametrize("name", GROUPS)
def test_ports_agree(name: str) -> None:
    _, leader, follower = group(name)
    ports = {each["name"]: each["containerPort"] for each in leader["ports"]}
    assert leader["command"] == [
        "inferneo",
        "serve",
        "--host",
        "0.0.0.0",
        "--port",
        str(ports["http"]),
    ]
    assert follower["command"] == ["inferneo", "follow"]
    assert {leader[kind]["httpGet"]["port"] for kind in leader if kind.endswith("Probe")} == {
        "http"
    }
    service = of_kind(name, "Service")["spec"]
    assert service["ports"] == [{"name": "http", "port": ports["http"], "targetPort": "http"}]
    open_to_all = of_kind(name, "NetworkPolicy")["spec"]["ingress"][0]
    assert open_to_all == {"ports": [{"port": ports["http"]}]}
    coordinator = variables(leader)["INFERNEO_COORDINATOR"]
    if coordinator != "auto":
        assert coordinator == f"$(LWS_LEADER_ADDRESS):{ports['coordinator']}"


@pytest.mark.parametrize("name", GROUPS)
def test_only_the_leader_is_asked(name: str) -> None:
    manifest, service = of_kind(name, "LeaderWorkerSet"), of_kind(name, "Service")
    labels = "leaderworkerset.sigs.k8s.io"
    assert service["spec"]["selector"] == {
        f"{labels}/name": manifest["metadata"]["name"],
        f"{labels}/worker-index": "0",
    }
    # LeaderWorkerSet makes a service of its own name, for the pods' addresses.
    assert service["metadata"]["name"] != manifest["metadata"]["name"]


@pytest.mark.parametrize("name", GROUPS)
def test_the_mesh_is_all_chips_of_the_group(name: str) -> None:
    template, leader, follower = group(name)
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart"
    assert leader["env"] == follower["env"]
    (chips,) = (
        int(count) for kind, count in leader["resources"]["limits"].items() if kind in CHIPS
    )
    axes = dict(axis.split("=") for axis in variables(leader)["INFERNEO_MESH"].split(","))
    assert list(axes) == ["data", "model"]
    assert math.prod(map(int, axes.values())) == template["size"] * chips
    referred = set(re.findall(r"\$\((\w+)\)", str(leader["env"])))
    assert referred == (OF_LEADER_WORKER_SET.keys() if name == "gpu-hosts.yaml" else set())


def slept_by(container: dict[str, Any]) -> float:
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    return float(seconds)


def drained_in(container: dict[str, Any]) -> float:
    drain = float(variables(container)["INFERNEO_DRAIN_SECONDS"])
    return slept_by(container) + drain + GOODBYE_SECONDS


def test_the_pod_has_time_to_drain() -> None:
    assert drained_in(SERVER) < SPEC["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", GROUPS)
def test_the_leader_has_time_to_drain_and_the_others_stay_for_it(name: str) -> None:
    template, leader, follower = group(name)

    grace = {
        part: template[part]["spec"]["terminationGracePeriodSeconds"]
        for part in ("leaderTemplate", "workerTemplate")
    }
    assert (
        drained_in(leader) < slept_by(follower) < grace["leaderTemplate"] < grace["workerTemplate"]
    )


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


def test_a_node_can_be_drained() -> None:
    budget = OBJECTS["PodDisruptionBudget"]["spec"]
    assert budget["maxUnavailable"] >= OBJECTS["Deployment"]["spec"]["replicas"]
    assert SPEC["enableServiceLinks"] is False


def test_replicas_are_as_many_as_machines_for_them() -> None:
    service = of_kind("replicas.yaml", "RayService")["spec"]
    config = yaml.safe_load(service["serveConfigV2"])
    (application,) = config["applications"]
    assert application["import_path"] == "server.replicas:app"
    (workers,) = service["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = containers(workers)
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {"serve": config["http_options"]["port"]}
    found = variables(container)
    assert found["INFERNEO_REPLICAS"] == str(workers["replicas"])
    assert found["INFERNEO_REPLICA_GPUS"] == container["resources"]["limits"]["nvidia.com/gpu"]
