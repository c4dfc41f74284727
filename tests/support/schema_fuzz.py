"""schemathesis against the server: valid and invalid requests from its OpenAPI description."""

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import schemathesis
import schemathesis.engine
from schemathesis import config
from schemathesis.config._checks import NegativeDataRejectionConfig
from schemathesis.engine import events

from server.api.openapi import document
from server.endpoints import ENDPOINTS
from tests.support.fake_server import CHAT, EMBED, Rig

SEED = 20_250_401
"""Makes the requests the same in every run."""
MODELS = (CHAT, "gpt-4o", EMBED)


@dataclass
class Report:
    """What came of a run."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    failures: dict[tuple[str, str, str], str] = field(default_factory=dict)

    @property
    def cases(self) -> int:
        return self.statuses.total()

    def accepted(self, operation: str) -> int:
        return self.statuses[operation, 200]


def known_models() -> dict[str, Any]:
    """The description with the models that there are: a made-up name ends every request early."""
    description = copy.deepcopy(document(ENDPOINTS))
    for name, schema in description["components"]["schemas"].items():
        if schema.get("additionalProperties") is True and "model" in schema["properties"]:
            optional = "anyOf" in schema["properties"]["model"]
            names = [*MODELS, None] if optional else [*MODELS]
            if name == "EmbeddingBody":  # few inputs fit it as it is
                names = [EMBED]
            schema["properties"]["model"] = {"enum": names}
    return description


def run(
    rig: Rig,
    max_examples: int,
    description: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
) -> Report:
    """The requests that cover each schema, and up to ``max_examples`` random ones of each."""
    checks = config.ChecksConfig(
        # Rules that bind several parameters are no part of a schema, so some of what fits it is a
        # 400, and what is large is a 413.
        positive_data_acceptance=config.PositiveDataAcceptanceConfig(enabled=False),
        negative_data_rejection=NegativeDataRejectionConfig(
            expected_statuses=["400", "403", "404", "405", "413", "415"]  # 403: no key, no admin
        ),
    )
    project = config.ProjectConfig(
        base_url=rig.url,
        headers=headers,
        checks=checks,
        continue_on_failure=True,
        generation=config.GenerationConfig(max_examples=max_examples, database="none"),
        phases=config.PhasesConfig(stateful=config.StatefulPhaseConfig(enabled=False)),
    )
    projects = config.ProjectsConfig(default=project)
    settings = config.SchemathesisConfig(seed=SEED, projects=projects)
    schema = schemathesis.openapi.from_dict(description or known_models(), config=settings)
    report = Report()
    for event in schemathesis.engine.from_schema(schema).execute():
        if isinstance(event, events.ScenarioFinished):
            _collect(event.recorder, report)
        elif isinstance(event, events.NonFatalError):
            report.failures[event.label, "error", type(event.value).__name__] = str(event.value)
        elif isinstance(event, events.FatalError):
            raise event.exception
    return report


def _collect(recorder: events.ScenarioRecorder, report: Report) -> None:
    for interaction in recorder.interactions.values():
        status = interaction.response.status_code if interaction.response else 0
        report.statuses[recorder.label, status] += 1
    for checks in recorder.checks.values():
        for check in checks:
            report.checks[check.name] += 1
            if (found := check.failure_info) is not None:
                key = (recorder.label, check.name, found.failure.title)
                report.failures[key] = f"{found.failure.message}\n{found.code_sample}"
