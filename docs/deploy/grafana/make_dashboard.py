"""Writes ``dashboards/inferneo.json``: what the dashboard shows is said here, once, in PromQL.

``python docs/deploy/grafana/make_dashboard.py``; a test holds the file to what this makes. The
figures are those of docs/metrics.md.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "dashboards" / "inferneo.json"

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_SERVER = 'job="inferneo", instance=~"$instance"'
_MODEL = f'{_SERVER}, model_name=~"$model"'
_COLUMNS = 24


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: what it shows.
        lines: PromQL by legend.
        unit: a unit of Grafana's.
        words: what the reader should make of it.
        stat: one large number, not a plot.
        most: the end of its axis; None: as large as the values are.
        good: for a number: ``low``: green at 0, red above; ``high``: red at 0, green above.
    """

    title: str
    lines: dict[str, str]
    unit: str = "short"
    words: str = ""
    stat: bool = False
    most: float | None = None
    good: str = ""


def _total(name: str, by: str = "") -> str:
    return f"sum{_by(by)} ({name}{{{_MODEL}}})"


def _rate(name: str, labels: str = _MODEL, by: str = "") -> str:
    return f"sum{_by(by)} (rate({name}{{{labels}}}[$__rate_interval]))"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


def _part(part: str, whole: str) -> str:
    return f"{_rate(part)} / {_rate(whole)}"


def _percentiles(name: str) -> dict[str, str]:
    return {
        f"p{percent}": f"histogram_quantile({percent / 100}, {_rate(name + '_bucket', by='le')})"
        for percent in (50, 95, 99)
    }


def _mean(name: str) -> str:
    return f"{_rate(name + '_sum')} / {_rate(name + '_count')}"


_HELD = f"sum(vllm:kv_cache_usage_perc{{{_MODEL}}} * inferneo_kv_cache_pages{{{_MODEL}}})"

ROWS: dict[str, list[Panel]] = {
    "Now": [
        Panel(
            "Engines ready",
            {"": f"min(inferneo_engine_ready{{{_MODEL}}})"},
            words="1 while all engines take requests, 0 if one does not.",
            stat=True,
            good="high",
        ),
        Panel("Running", {"": _total("vllm:num_requests_running")}, stat=True),
        Panel("Waiting", {"": _total("vllm:num_requests_waiting")}, stat=True),
        Panel("Tokens/s", {"": _rate("vllm:generation_tokens_total")}, stat=True),
        Panel("Requests/s", {"": _rate("http_requests_total", _SERVER)}, stat=True),
        Panel(
            "Compiled after ready",
            {"": _total("inferneo_compiles_after_ready_total")},
            words="There should be none.",
            stat=True,
            good="low",
        ),
    ],
    "Load": [
        Panel(
            "Tokens/s",
            {
                "generated": _rate("vllm:generation_tokens_total"),
                "prompts, computed": _rate("inferneo_prefill_tokens_total"),
                "prompts, with what the prefix cache had": _rate("vllm:prompt_tokens_total"),
                "embedded": _rate("inferneo_embedding_tokens_total"),
            },
        ),
        Panel(
            "Sequences and slots",
            {
                "running": _total("vllm:num_requests_running"),
                "waiting": _total("vllm:num_requests_waiting"),
                "slots": _total("inferneo_slots"),
            },
            words="Those that wait have no slot: a queue that stays needs more slots or replicas.",
        ),
        Panel(
            "Pages of the KV cache",
            {
                "held by sequences": _HELD,
                "kept for their prefixes": _total("inferneo_kv_cache_pages_cached"),
                "all": _total("inferneo_kv_cache_pages"),
            },
        ),
        Panel(
            "Requests/s by route",
            {"{{method}} {{handler}}": _rate("http_requests_total", _SERVER, "method, handler")},
            unit="reqps",
        ),
    ],
    "What users feel": [
        Panel("Time to first token", _percentiles("vllm:time_to_first_token_seconds"), "s"),
        Panel("Time between tokens", _percentiles("vllm:inter_token_latency_seconds"), "s"),
        Panel("Whole requests", _percentiles("vllm:e2e_request_latency_seconds"), "s"),
    ],
    "Where time goes": [
        Panel(
            "Mean times of a request",
            {
                "in the queue": _mean("vllm:request_queue_time_seconds"),
                "prefill": _mean("vllm:request_prefill_time_seconds"),
                "decode": _mean("vllm:request_decode_time_seconds"),
            },
            "s",
        ),
        Panel("Steps/s of the engine", {"steps": _rate("inferneo_engine_steps_total")}),
        Panel(
            "Mean tokens of a request",
            {
                "prompt": _mean("vllm:request_prompt_tokens"),
                "generated": _mean("vllm:request_generation_tokens"),
            },
        ),
    ],
    "What helps": [
        Panel(
            "Prompt tokens found in the prefix cache",
            {"found": _part("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")},
            "percentunit",
            most=1,
        ),
        Panel(
            "Drafted tokens that were accepted",
            {
                "accepted": _part(
                    "vllm:spec_decode_num_accepted_tokens_total",
                    "vllm:spec_decode_num_draft_tokens_total",
                )
            },
            "percentunit",
            "Empty while nothing is drafted.",
            most=1,
        ),
        Panel(
            "Preemptions/s",
            {"preemptions": _rate("vllm:num_preemptions_total")},
            words="Sequences that gave up their pages to others, and are computed again.",
        ),
    ],
    "Trouble": [
        Panel(
            "Requests/s that were refused or failed",
            {
                "{{status}} {{handler}}": _rate(
                    "http_requests_total", f'{_SERVER}, status=~"[45]xx"', "status, handler"
                )
            },
            "reqps",
        ),
        Panel(
            "Sequences/s by how they ended",
            {"{{finished_reason}}": _rate("vllm:request_success_total", by="finished_reason")},
            words="abort: the reader left.",
        ),
        Panel(
            "Compiled after ready",
            {"{{instance}}": _total("inferneo_compiles_after_ready_total", by="instance")},
            words="There should be none.",
        ),
        Panel(
            "Memory",
            {"{{instance}}": f"process_resident_memory_bytes{{{_SERVER}}}"},
            "bytes",
            "Of the server's process; not of a GPU or TPU.",
        ),
        Panel(
            "Cores in use",
            {"{{instance}}": _rate("process_cpu_seconds_total", _SERVER, "instance")},
        ),
        Panel("Open files", {"{{instance}}": f"process_open_fds{{{_SERVER}}}"}),
    ],
}


def dashboard() -> dict[str, Any]:
    """As Grafana reads it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(_row(title, top))
        top += 1
        per_line = 6 if row[0].stat else 2 if len(row) == 4 else 3
        width, height = _COLUMNS // per_line, 4 if row[0].stat else 8
        for index, panel in enumerate(row):
            left, line = width * (index % per_line), index // per_line
            place = {"x": left, "y": top + line * height, "w": width, "h": height}
            panels.append(_panel(panel) | {"gridPos": place})
        top += height * -(-len(row) // per_line)
    for number, each in enumerate(panels, start=1):
        each["id"] = number
    return {
        "uid": "inferneo",
        "title": "Inferneo-JAX",
        "description": "Made by docs/deploy/grafana/make_dashboard.py.",
        "tags": ["inferneo"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def _row(title: str, top: int) -> dict[str, Any]:
    place = {"x": 0, "y": top, "w": _COLUMNS, "h": 1}
    return {"type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _panel(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.good:
        colours = ("green", "red") if panel.good == "low" else ("red", "green")
        steps = [{"color": colours[0], "value": None}, {"color": colours[1], "value": 1}]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    else:
        defaults["color"] = {"mode": "fixed" if panel.stat else "palette-classic"}
        if panel.stat:
            defaults["color"]["fixedColor"] = "text"
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": _SOURCE,
            "expr": expr,
            "legendFormat": legend,
        }
        for index, (legend, expr) in enumerate(panel.lines.items())
    ]
    shown: dict[str, Any] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area"}
    if not panel.stat:
        shown = {"legend": {"displayMode": "list"}, "tooltip": {"mode": "multi", "sort": "desc"}}
    return {
        "type": "stat" if panel.stat else "timeseries",
        "title": panel.title,
        "description": panel.words,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": shown,
        "targets": targets,
    }


def _variables() -> list[dict[str, Any]]:
    source = {"type": "datasource", "name": "datasource", "label": "Source", "query": "prometheus"}

    def of_label(name: str, label: str, metric: str) -> dict[str, Any]:
        return {
            "type": "query",
            "name": name,
            "label": name.capitalize(),
            "datasource": _SOURCE,
            "query": {"query": f"label_values({metric}, {label})", "refId": name},
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
        }

    return [
        source,
        of_label("instance", "instance", 'inferneo_build_info{job="inferneo"}'),
        of_label("model", "model_name", 'inferneo_engine_ready{instance=~"$instance"}'),
    ]


if __name__ == "__main__":
    FILE.write_text(json.dumps(dashboard(), indent=2) + "\n", encoding="utf-8")
