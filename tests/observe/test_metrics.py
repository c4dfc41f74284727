"""``/metrics``: what a scraper reads is what clients saw, and what the manual says."""

import dataclasses
import re
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from inferneo_jax import GenerationOutput
from server.observe.metrics import Metrics
from tests.support.fake_server import CHAT, EMBED, Rig
from tests.support.paths import ROOT


def _read(rig: Rig) -> dict[str, float]:
    response = rig.client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        sample.name + "".join(f" {value}" for _, value in sorted(sample.labels.items())): value
        for family in text_string_to_metric_families(response.text)
        for sample in [*family.samples]
        for value in [sample.value]
    }


def _grown(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after[name] - before.get(name, 0.0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_is_counted_once_everywhere(rig: Rig, stream: bool) -> None:
    before = _read(rig)
    body = {"model": CHAT, "prompt": "abc", "max_tokens": 5, "stream": stream, "n": 2}
    text = rig.client.post("/v1/completions", json=body).text
    assert "finish_reason" in text
    after = _read(rig)
    for name, grown in {
        f"vllm:request_success_total length {CHAT}": 2,
        f"vllm:prompt_tokens_total {CHAT}": 2 * 3,
        f"vllm:request_generation_tokens_sum {CHAT}": 2 * 5,
        f"vllm:time_to_first_token_seconds_count {CHAT}": 2,
        f"vllm:inter_token_latency_seconds_count {CHAT}": 2 * 4,
        f"vllm:e2e_request_latency_seconds_count {CHAT}": 2,
    }.items():
        assert _grown(before, after, name) == grown, name
    answered = [n for n in after if n.startswith("http_requests_total") and "completions" in n]
    assert sum(_grown(before, after, name) for name in answered) == 1


def test_who_leaves_is_an_abort_and_has_no_latency(rig: Rig) -> None:
    before = _read(rig)
    rig.engine.limit = 2
    body = {"model": CHAT, "prompt": "abc", "max_tokens": 9, "stream": True}
    with rig.client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    name = f"vllm:request_success_total abort {CHAT}"
    for _ in range(100):
        after = _read(rig)
        if name in after and _grown(before, after, name):
            break
        time.sleep(0.02)
    assert _grown(before, after, name) == 1
    assert _grown(before, after, f"vllm:e2e_request_latency_seconds_count {CHAT}") == 0


def test_errors_are_counted_from_0(rig: Rig) -> None:
    rig.client.post("/v1/completions", json={"model": CHAT, "prompt": "abc", "max_tokens": 1})
    found = _read(rig)
    for reason in ("stop", "length", "abort", "error"):
        assert f"vllm:request_success_total {reason} {CHAT}" in found


def test_embedded_tokens_are_counted(rig: Rig) -> None:
    before = _read(rig)
    rig.client.post("/v1/embeddings", json={"model": EMBED, "input": ["abc", "de"]})
    assert _grown(before, _read(rig), f"inferneo_embedding_tokens_total {EMBED}") == 5


def test_made_up_methods_and_paths_make_no_series(rig: Rig) -> None:
    rig.client.request("FROB0", "/v1/none0")
    before = _read(rig)
    for number in range(1, 20):
        rig.client.request(f"FROB{number}", f"/v1/none{number}")
    after = _read(rig)
    assert after.keys() == before.keys()
    assert _grown(before, after, "http_requests_total none other 4xx") == 19


def test_times_are_those_of_the_engine() -> None:
    metrics = Metrics()
    meter = metrics.meter("m")
    started = time.monotonic()
    meter.submitted(0, 7)
    for when, count in ((1.0, 1), (1.5, 1), (2.5, 4)):
        output = GenerationOutput(
            token_ids=(0,) * count, admitted_at=started + 0.25, cached_tokens=4
        )
        meter.output(0, output, started + when)
    meter.ended(0, "stop")
    meter.ended(0, "stop")  # twice is once

    def total(name: str) -> float:
        return metrics.registry.get_sample_value(f"vllm:{name}_seconds_sum", {"model_name": "m"})

    expected = {
        "time_to_first_token": 1.0,
        "inter_token_latency": 1.5,
        "request_queue_time": 0.25,
        "request_prefill_time": 0.75,
        "request_decode_time": 1.5,
        "e2e_request_latency": 2.5,
    }
    for name, seconds in expected.items():
        assert total(name) == pytest.approx(seconds, abs=0.01), name
    labels = {"model_name": "m"}
    value = metrics.registry.get_sample_value
    assert value("vllm:inter_token_latency_seconds_count", labels) == 5
    assert value("vllm:prefix_cache_hits_total", labels) == 4
    assert value("vllm:request_success_total", labels | {"finished_reason": "stop"}) == 1


def test_tokens_that_come_with_the_first_have_no_latency_of_their_own() -> None:
    metrics = Metrics()
    meter = metrics.meter("m")
    started = time.monotonic()
    meter.submitted(0, 7)
    for when, count in ((1.0, 3), (1.5, 2)):
        meter.output(0, GenerationOutput(token_ids=(0,) * count), started + when)
    value, labels = metrics.registry.get_sample_value, {"model_name": "m"}
    assert value("vllm:inter_token_latency_seconds_count", labels) == 2
    assert value("vllm:inter_token_latency_seconds_sum", labels) == pytest.approx(0.5)
    below = labels | {"le": "0.2"}
    assert value("vllm:inter_token_latency_seconds_bucket", below) == 0


def test_what_is_served_is_told(rig: Rig) -> None:
    found = _read(rig)
    assert found[f"inferneo_model_info cpu  float32 xla decoder float32 data=1,model=1 {CHAT} none"]
    assert found[f"inferneo_model_info cpu  float32 xla encoder  data=1,model=1 {EMBED} none"]
    assert found[f"inferneo_max_model_len_tokens {CHAT}"] == 512
    assert found[f"inferneo_kv_cache_bytes {EMBED}"] == 0
    assert not [name for name in found if name.startswith("inferneo_device_memory")]


def test_drafts_are_counted_by_method(rig: Rig) -> None:
    stats = dataclasses.replace(
        rig.engine.stats(),
        drafted_tokens=10,
        accepted_tokens=7,
        model_drafted_tokens=6,
        model_accepted_tokens=5,
    )
    rig.engine.stats = lambda: stats  # type: ignore[method-assign]
    try:
        found = _read(rig)
    finally:
        del rig.engine.stats
    for method, drafted, accepted in (("ngram", 4, 2), ("model", 6, 5)):
        # Samples are named by the values of their labels in the order of the labels' names.
        assert found[f"vllm:spec_decode_num_draft_tokens_total {method} {CHAT}"] == drafted
        assert found[f"vllm:spec_decode_num_accepted_tokens_total {method} {CHAT}"] == accepted


def test_places_are_taken_and_given_back(rig: Rig) -> None:
    before = _read(rig)
    rig.engine.limit = 1
    body = {"model": CHAT, "prompt": "abc", "max_tokens": 5, "stream": True, "n": 3}
    with rig.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: without it the response is closed
        next(lines)
        during = _read(rig)
    assert _grown(before, during, "inferneo_request_places_used") == 3
    assert during["inferneo_request_places"] == 32 + 256


@pytest.mark.parametrize("version", ["1.0.0", "1.0.0;escaping=allow-utf-8"])  # Prometheus 2 and 3
def test_names_are_the_same_for_every_prometheus(rig: Rig, version: str) -> None:
    response = rig.client.get(
        "/metrics", headers={"Accept": f"application/openmetrics-text;version={version},*/*;q=0.1"}
    )
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert f'\nvllm:num_requests_running{{model_name="{CHAT}"}} 0.0\n' in response.text


def test_the_manual_names_every_figure_and_no_other(rig: Rig) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([a-z_:0-9]+)`", page, re.MULTILINE))
    families = [*text_string_to_metric_families(rig.client.get("/metrics").text)]
    for family in families:
        assert len(family.documentation) > 8, family.name
    served = {
        f"{family.name}_total" if family.type == "counter" else family.name for family in families
    }
    assert named == {name for name in served if not name.startswith("process_")}


def test_a_router_finds_what_the_manual_tells_it_to_read(rig: Rig) -> None:
    page = (ROOT / "docs" / "deploy" / "README.md").read_text(encoding="utf-8")
    asked = re.findall(r"^ +- (vllm:\w+)$", page, re.MULTILINE)
    assert len(asked) == 4
    text = rig.client.get("/metrics").text
    found = {family.name: family for family in text_string_to_metric_families(text)}
    for name in asked:
        assert found[name].type == "gauge"
        assert [sample.labels["model_name"] for sample in found[name].samples] == [CHAT]
    stats = rig.engine.stats()
    (cache,) = found["vllm:cache_config_info"].samples
    assert cache.value == 1
    assert int(cache.labels["block_size"]) == stats.page_len
    assert int(cache.labels["num_gpu_blocks"]) == stats.pages
