"""Whatever fits the API's description, or almost does, is answered as the description says."""

import os

import pytest

from tests.support.fake_server import CHAT, Rig
from tests.support.schema_fuzz import Report, run

EXAMPLES = int(os.environ.get("FUZZ_REQUESTS", "20"))
"""Random requests for each operation, beside those that cover its schema."""
CASES = 2000
CHECKS = (
    "allow_header_conformance",
    "content_type_conformance",
    "negative_data_rejection",
    "not_a_server_error",
    "response_headers_conformance",
    "response_schema_conformance",
    "status_code_conformance",
    "unsupported_method",
)


@pytest.fixture(scope="module")
def report(shared_rig: Rig) -> Report:
    return run(shared_rig, EXAMPLES)


def test_no_answer_breaks_the_description(report: Report) -> None:
    found = [f"{' / '.join(where)}\n{what}" for where, what in report.failures.items()]
    assert not found, "\n\n".join(found)


def test_enough_was_asked_and_enough_was_served(report: Report) -> None:
    assert report.cases >= CASES
    for check in CHECKS:
        assert report.checks[check] >= CASES * 0.9, check
    for path, least in (
        ("/v1/completions", 100),
        ("/v1/chat/completions", 100),
        ("/v1/embeddings", 10),
        ("/tokenize", 50),
        ("/detokenize", 20),
    ):
        assert report.accepted(f"POST {path}") >= least, path


def test_the_server_is_as_before(report: Report, rig: Rig) -> None:
    assert report.cases
    assert rig.post("/v1/completions", {"model": CHAT, "prompt": "Hi"}).status_code == 200
