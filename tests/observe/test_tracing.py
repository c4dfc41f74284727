"""Traces: one span a request, with its times below it, and nothing of what was said."""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import structlog
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode
from websockets.sync.client import connect
from werkzeug.datastructures import Headers

from inferneo_jax import EngineFailedError, GenerationOutput, Tokenizer
from server.observe.metrics import Metrics
from server.observe.tracing import open_tracing
from tests.observe.collector import Kept, collecting
from tests.support.fake_server import CHAT, EMBED, REPLY, Rig, as_new, running
from tests.support.machine_speed import Machine

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
UNSAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
BODY = {"model": CHAT, "prompt": "my secret prompt", "max_tokens": 4}
MESSAGES = [{"role": "user", "content": "my secret prompt"}]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENDPOINT", "TRACES_ENDPOINT", "PROTOCOL", "TRACES_PROTOCOL"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)
    for name in ("OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def _traced(tokenizer: Tokenizer) -> Iterator[tuple[Rig, Kept]]:
    kept = Kept()
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("server.application.open_tracing", kept.tracing)
            rig = stack.enter_context(running(tokenizer))
        yield rig, kept
    assert kept.closed


@pytest.fixture
def traced(_traced: tuple[Rig, Kept], tokenizer: Tokenizer) -> Iterator[Rig]:
    """A server with its engine as new, and none of its spans kept yet."""
    rig, kept = _traced
    kept.clear()
    with as_new(rig.engine, tokenizer):
        yield rig


@pytest.fixture
def kept(_traced: tuple[Rig, Kept]) -> Kept:
    """The spans of the test's requests."""
    return _traced[1]


def _seconds(span: ReadableSpan) -> float:
    return (span.end_time - span.start_time) / 1e9


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_span_with_its_facts(traced: Rig, kept: Kept, stream: bool) -> None:
    before = time.time_ns()
    body = BODY | {"stream": stream, "n": 2, "temperature": 0.5, "user": "alice"}
    headers = {"X-Request-Id": "mine"} | SAMPLED
    response = traced.post("/v1/completions", body, headers=headers)
    assert response.status_code == 200
    (span,) = kept.requests()
    assert span.name == "POST /v1/completions"
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.parent.is_remote
    assert before <= span.start_time < span.end_time <= time.time_ns()
    assert span.status.status_code is StatusCode.UNSET
    facts = dict(span.attributes)
    assert facts.pop("gen_ai.response.id").startswith("cmpl-")
    assert 0 <= facts.pop("gen_ai.server.time_to_first_token") < _seconds(span)
    assert facts == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "url.path": "/v1/completions",
        "inferneo.request_id": "mine",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "inferneo",
        "gen_ai.request.model": CHAT,
        "gen_ai.request.stream": stream,
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.model": CHAT,
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.input_tokens": 16,
        "gen_ai.usage.cache_read.input_tokens": 8,
        "gen_ai.usage.output_tokens": 8,
    }
    parts = kept.below(span)
    assert [part.name for part in parts] == ["prefill", "decode"] * 2  # no slots: no queue
    for part in parts:
        assert span.start_time <= part.start_time <= part.end_time <= span.end_time
    assert parts[1].attributes["gen_ai.usage.output_tokens"] == 4


def test_parts_are_cut_where_the_figures_are() -> None:
    kept, metrics = Kept(), Metrics()
    trace = kept.tracing({}, ()).begin("POST", "/v1/completions", Headers(), "id")
    meter = metrics.meter("m", trace)
    for index in range(20):
        meter.submitted(index, 7)
    started = time.monotonic()
    for index in range(20):
        for when in (1.0, 1.5, 2.5):
            output = GenerationOutput(token_ids=(0,), admitted_at=started + 0.25)
            meter.output(index, output, started + when)
        meter.ended(index, "stop")
    trace.end({"route": "/v1/completions"}, failed=False)
    (span,) = kept.requests()
    assert span.attributes["gen_ai.server.time_to_first_token"] == pytest.approx(1.0, abs=0.01)
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",) * 20
    parts = kept.below(span)
    assert len(parts) == 3 * 16  # and no more, however many sequences
    assert [part.name for part in parts[:3]] == ["queue", "prefill", "decode"]
    assert [_seconds(part) for part in parts[:3]] == pytest.approx([0.25, 0.75, 1.5], abs=0.01)
    assert parts[0].end_time == parts[1].start_time
    assert parts[1].end_time == parts[2].start_time


def test_nothing_of_what_was_said_is_in_a_span(traced: Rig, kept: Kept) -> None:
    key = "Bearer sk-inferneo-not-a-key"
    traced.post("/v1/chat/completions", {"model": CHAT, "messages": MESSAGES})
    traced.post("/v1/embeddings?token=ticket", {"model": EMBED, "input": "my secret prompt"})
    traced.post("/v1/completions", BODY | {"stop": ["secret stop"], "user": "secret user"})
    traced.post("/v1/completions", {"prompt": "my secret prompt", "secret": 1})
    traced.post("/v1/nothing", BODY, headers={"Authorization": key})
    kept.requests(5)
    written = " ".join(span.to_json() for span in kept.spans)
    for said in ("secret", REPLY[:8], "ticket", "sk-inferneo"):
        assert said not in written


@pytest.mark.parametrize(("headers", "number"), [(SAMPLED, 1), (UNSAMPLED, 0)])
def test_the_client_decides_what_is_sampled(
    traced: Rig, kept: Kept, headers: dict[str, str], number: int
) -> None:
    traced.post("/v1/completions", BODY, headers=headers)
    traced.post("/v1/completions", BODY)
    assert len(kept.requests(number + 1)) == number + 1


def test_a_wrong_traceparent_begins_a_trace(traced: Rig, kept: Kept) -> None:
    traced.post("/v1/completions", BODY, headers={"traceparent": "00-zz-1-01"})
    assert kept.requests()[0].parent is None


def test_embeddings_have_spans(traced: Rig, kept: Kept) -> None:
    traced.post("/v1/embeddings", {"model": EMBED, "input": ["abc", "de"]}, headers=SAMPLED)
    (span,) = kept.requests()
    facts = span.attributes
    assert (span.name, facts["gen_ai.operation.name"]) == ("POST /v1/embeddings", "embeddings")
    assert (facts["gen_ai.request.model"], facts["gen_ai.usage.input_tokens"]) == (EMBED, 5)
    assert f"{span.context.trace_id:032x}" == TRACE


def test_every_request_on_a_socket_has_a_span(traced: Rig, kept: Kept) -> None:
    with connect(traced.ws + "/v1/chat/completions", additional_headers=SAMPLED) as socket:
        for name in ("a", "b"):
            body = {"model": CHAT, "messages": MESSAGES}
            socket.send(json.dumps({"type": "request", "id": name, "body": body}))
        for _ in range(2):
            assert json.loads(socket.recv())["choices"][0]["message"]["content"] == REPLY
        spans = kept.requests(2)
    assert {f"{span.parent.span_id:016x}" for span in spans} == {PARENT}
    for span in spans:
        assert span.name == "WEBSOCKET /v1/chat/completions"
        assert span.attributes["network.protocol.name"] == "websocket"
        assert span.attributes["gen_ai.operation.name"] == "chat"
        assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",)
        assert len(kept.below(span)) == 2


@pytest.mark.parametrize("way", ["plain", "stream", "socket"])
def test_the_servers_faults_are_errors(traced: Rig, kept: Kept, way: str) -> None:
    traced.engine.limit, traced.engine.failure = 2, EngineFailedError("a step failed")
    body = BODY | {"stream": way == "stream"}
    if way == "socket":
        with connect(traced.ws + "/v1/completions") as socket:
            socket.send(json.dumps(body))
            assert json.loads(socket.recv())["error"]["code"] == "engine_failed"
    else:
        status = traced.post("/v1/completions", body).status_code
        assert status == (200 if way == "stream" else 500)
    (span,) = kept.requests()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "engine_failed"
    assert span.attributes["gen_ai.response.finish_reasons"] == ("error",)


def test_the_clients_faults_are_none_of_the_servers(traced: Rig, kept: Kept) -> None:
    traced.post("/v1/completions", BODY | {"model": "none"})
    traced.post("/v1/nothing", {})
    first, second = kept.requests(2)
    for span in (first, second):
        assert span.status.status_code is StatusCode.UNSET
        assert span.attributes["http.response.status_code"] == 404
    assert first.attributes["error.type"] == "model_not_found"
    assert (second.name, second.attributes.get("http.route")) == ("POST", None)


def test_who_leaves_has_an_aborted_span(traced: Rig, kept: Kept) -> None:
    traced.engine.limit = 2
    body = BODY | {"stream": True}
    with traced.client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    (span,) = kept.requests()
    assert span.attributes["gen_ai.response.finish_reasons"] == ("abort",)
    assert span.attributes["inferneo.disconnected"] is True


def test_probes_and_scrapes_have_none(traced: Rig, kept: Kept) -> None:
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        assert traced.client.get(path).status_code == 200
    assert kept.requests()[0].name == "GET /v1/models"


def test_log_lines_name_the_trace(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("server.application.open_tracing", Kept().tracing)
    with running(tokenizer) as rig:
        rig.post("/v1/completions", BODY, headers=SAMPLED)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (line,) = [each for each in lines if each["event"] == "request"]
    assert line["trace_id"] == TRACE
    assert len(line["span_id"]) == 16


def test_nothing_is_traced_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_tracing({}, ()) is None
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    assert open_tracing({}, ()) is None
    monkeypatch.delenv("OTEL_TRACES_EXPORTER")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert open_tracing({}, ()) is None


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("OTEL_TRACES_EXPORTER", "otlp,zipkin", "names zipkin; there are otlp, console and none"),
        (
            "OTEL_EXPORTER_OTLP_PROTOCOL",
            "grpc",
            "PROTOCOL is grpc; this server sends http/protobuf",
        ),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "max_queue_size must be a positive integer"),
        ("", "", "pip install 'inferneo-jax[otel]'"),
    ],
)
def test_what_cannot_be_done_is_one_warning(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    if name:
        monkeypatch.setenv(name, value)
    else:  # as if it were not installed
        monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
        module = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
        monkeypatch.setitem(sys.modules, module, None)
    with structlog.testing.capture_logs() as lines:
        assert open_tracing({}, ()) is None
    (line,) = lines
    assert (line["event"], line["log_level"]) == ("traces_off", "warning")
    assert said in line["reason"]


def test_a_collector_is_sent_everything_before_the_end(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting(lambda: 200) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=us")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        with running(tokenizer) as rig:
            rig.post("/v1/completions", BODY, headers=SAMPLED)
    (sent,) = collector.received
    assert collector.headers[0]["X-Tenant"] == "us"
    (resource,) = sent.resource_spans
    about = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert about["service.name"] == "inferneo"
    assert about["deployment.environment"] == "test"
    (scope,) = resource.scope_spans
    assert {span.trace_id.hex() for span in scope.spans} == {TRACE}
    assert [span.name for span in scope.spans] == ["prefill", "decode", "POST /v1/completions"]


def test_a_collector_that_hangs_holds_up_nothing(
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    machine: Machine,
) -> None:
    over = threading.Event()

    def hang() -> int:
        over.wait(10)
        return 503

    monkeypatch.setattr("server.observe.tracing.CLOSE_SECONDS", 0.2)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    with collecting(hang) as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        with running(tokenizer) as rig:
            for _ in range(5):
                assert rig.post("/v1/completions", BODY).status_code == 200
            began = time.monotonic()
        assert time.monotonic() - began < machine.seconds(5)
        over.set()
    assert "traces_lost" in capsys.readouterr().err
