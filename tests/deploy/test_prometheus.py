"""Rules and dashboard: what they ask for is there, and Prometheus answers them with figures."""

import dataclasses
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import promql_parser
import pytest

from inferneo_jax import EngineStats, GenerationOutput
from server.observe.collector import ServerState
from server.observe.metrics import Metrics
from tests.deploy.files import DEPLOY, check, read
from tests.support.fake_engine import FakeEmbedder, FakeEngine, writes
from tests.support.fake_server import CHAT, EMBED, Server, make_tokenizer, models_of, wait_ready
from tests.support.paths import ROOT
from tests.support.programs import program
from tests.support.server_process import free_address
from tests.support.waiting import until

GRAFANA = DEPLOY / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "inferneo.json").read_text(encoding="utf-8"))
ALERTS = read(DEPLOY / "prometheus" / "alerts.yml")
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
QUESTIONS = [
    (f"{panel['title']}: {target['legendFormat'] or 'it'}", target["expr"])
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", ())
]
VARIABLES = {"$__rate_interval": "10s", "$instance": ".*", "$model": ".*"}
TIMEOUT = 10.0
# Prometheus' own, and a figure of how long something has lasted.
OF_PROMETHEUS = {"up"}
_SUFFIXES = ("_bucket", "_count", "_sum")


def filled(expr: str) -> str:
    """As Grafana sends it."""
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    assert "$" not in expr
    return expr


def selectors(node: Any) -> Iterator[Any]:
    """The series that a parsed expression asks for."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for part in ("lhs", "rhs", "expr", "vector_selector", "param"):
        if (inner := getattr(node, part, None)) is not None:
            yield from selectors(inner)
    for inner in getattr(node, "args", ()):
        yield from selectors(inner)


EXPRESSIONS = [*QUESTIONS, *((rule["alert"], rule["expr"]) for rule in RULES)]


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """The labels of each figure that a server gives, by its name."""
    engine = FakeEngine(lambda _: ())
    model = models_of(engine, FakeEmbedder(), make_tokenizer())[CHAT]()
    found: dict[str, set[str]] = {name: set() for name in OF_PROMETHEUS}
    metrics = Metrics(lambda: ServerState(models=[model]))
    for collector in set(metrics.registry._collector_to_names):
        labels = set(getattr(collector, "_labelnames", ()))
        for family in collector.collect():
            names = {family.name}
            if family.type == "counter":
                names = {f"{family.name}_total"}
            if family.type == "histogram":
                names = {family.name + suffix for suffix in _SUFFIXES}
                labels |= {"le"}
            for name in names:
                found[name] = labels | {label for each in family.samples for label in each.labels}
    engine.stop()
    return found


@pytest.mark.parametrize(("title", "expr"), EXPRESSIONS, ids=[each[0] for each in EXPRESSIONS])
def test_every_figure_and_label_is_one_of_the_servers(
    title: str, expr: str, known: dict[str, set[str]]
) -> None:
    asked = list(selectors(promql_parser.parse(filled(expr))))
    assert asked
    for selector in asked:
        assert selector.name in known
        used = {matcher.name for matcher in selector.matchers.matchers}
        assert used <= known[selector.name] | {"job", "instance"}
        assert "job" in used
    for labels in re.findall(r"by \(([\w, ]+)\)", expr):
        for label in labels.split(", "):
            assert any(label in known[each.name] | {"instance"} for each in asked), label


def test_the_dashboard_is_what_its_script_makes() -> None:
    script = "import json, make_dashboard as made; print(json.dumps(made.dashboard()))"
    made = check(sys.executable, "-c", script, cwd=GRAFANA)
    assert json.loads(made) == DASHBOARD, "run docs/deploy/grafana/make_dashboard.py"


def test_panels_lie_side_by_side() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_alerts_say_how_bad_they_are_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_grafana_is_told_of_the_prometheus_and_the_dashboard_of_the_compose_file() -> None:
    compose = read(ROOT / "compose.yaml")
    config = read(DEPLOY / "prometheus" / "prometheus.yml")
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "inferneo"
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    assert "server" in compose["services"]
    (source,) = read(GRAFANA / "provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_alerts_come_when_they_should_and_else_not() -> None:
    command = [program("promtool"), "test", "rules", "alerts_test.yml"]
    check(*command, cwd=DEPLOY / "prometheus")
    cases = read(DEPLOY / "prometheus" / "alerts_test.yml")
    asked = [asked for case in cases["tests"] for asked in case["promql_expr_test"]]
    came = {name for each in asked for name in re.findall(r'"(\w+)"', str(each["exp_samples"]))}
    assert came == {rule["alert"] for rule in RULES}
    assert any(each["exp_samples"] == [] for each in asked)


class BusyEngine(FakeEngine):
    """Its counts grow, and it says when it admitted a request."""

    def stats(self) -> EngineStats:
        plain = super().stats()
        count = 1 + int(10 * time.monotonic())
        grown = {
            each.name: count
            for each in dataclasses.fields(EngineStats)
            if getattr(plain, each.name) == 0
        }
        return dataclasses.replace(plain, **grown)

    def _deliver(self, job: Any, output: GenerationOutput) -> None:
        super()._deliver(job, dataclasses.replace(output, admitted_at=time.monotonic()))


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A real one, which has asked a server under load for its figures a few times."""
    binary = program("prometheus")
    folder, address = tmp_path_factory.mktemp("prometheus"), free_address()
    tokenizer = make_tokenizer()
    engine, embedder = BusyEngine(writes(tokenizer, "some words")), FakeEmbedder()
    models = models_of(engine, embedder, tokenizer)
    with (
        Server(lambda source, *_: models[source.id]()) as server,
        httpx.Client(base_url=server.url, timeout=TIMEOUT) as load,
    ):
        wait_ready(load)
        ask(load)
        config = {
            "global": {"scrape_interval": "200ms", "evaluation_interval": "200ms"},
            "rule_files": [str(DEPLOY / "prometheus" / "alerts.yml")],
            "scrape_configs": [
                {
                    "job_name": "inferneo",
                    "scrape_timeout": "200ms",
                    "static_configs": [{"targets": [server.url.removeprefix("http://")]}],
                }
            ],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))
        command = [binary, f"--config.file={folder}/prometheus.yml"]
        command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            with httpx.Client(base_url=f"http://{address}", timeout=TIMEOUT) as client:
                until(lambda: ask(load) or seen(client), TIMEOUT, (folder / "log").read_text)
                yield client
        finally:
            process.terminate()
            process.wait(TIMEOUT)


def ask(client: httpx.Client) -> None:
    """One request of each kind, and one that is refused."""
    body = {"model": CHAT, "prompt": "abc", "max_tokens": 5}
    assert client.post("/v1/completions", json=body).status_code == 200
    assert client.post("/v1/completions", json=body | {"n": 0}).status_code == 400
    assert client.post("/v1/embeddings", json={"model": EMBED, "input": "a"}).status_code == 200


def seen(client: httpx.Client) -> bool:
    """Whether Prometheus has enough of it to know how fast it changes."""
    try:
        if client.get("/-/ready").status_code != 200:
            return False
    except httpx.TransportError:
        return False
    return bool(answer(client, 'count_over_time(up{job="inferneo"}[10s]) >= 5'))


def answer(client: httpx.Client, expr: str) -> list[float]:
    response = client.get("/api/v1/query", params={"query": expr}).json()
    assert response["status"] == "success", response
    assert response["data"]["resultType"] == "vector"
    return [float(each["value"][1]) for each in response["data"]["result"]]


@pytest.mark.parametrize(("title", "expr"), QUESTIONS, ids=[each[0] for each in QUESTIONS])
def test_every_line_of_the_dashboard_shows_figures(
    title: str, expr: str, prometheus: httpx.Client
) -> None:
    values = answer(prometheus, filled(expr))
    assert values
    assert all(math.isfinite(value) and value >= 0 for value in values)


def test_prometheus_takes_the_rules_and_finds_the_server_up(prometheus: httpx.Client) -> None:
    groups = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    found = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert set(found) == {rule["alert"] for rule in RULES}
    assert {rule["health"] for rule in found.values()} == {"ok"}
    assert found["InferneoDown"]["state"] == "inactive"
    assert found["InferneoNotReady"]["state"] == "inactive"
    assert found["InferneoCompiles"]["state"] == "firing"  # its counts grow
