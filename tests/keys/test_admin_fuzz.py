"""Whatever fits the description of ``/admin``, or almost does, asked by one who may."""

import copy
from typing import Any

import pytest

from server.api.openapi import document
from server.endpoints import ENDPOINTS
from server.keys.key import Key
from tests.support.keyed_server import KeyRig, bearer
from tests.support.schema_fuzz import Report, run


def of_admin(kept: list[Key], ended: list[Key]) -> dict[str, Any]:
    """The description of ``/admin``, with ids that there are.

    ``ended`` are those to end, so that others are left to be read and changed; the id of the key
    that asks is in neither.
    """
    description = copy.deepcopy(document(ENDPOINTS))
    paths = {path: item for path, item in description["paths"].items() if path.startswith("/admin")}
    description["paths"] = paths
    for item in paths.values():
        for method, operation in item.items():
            for parameter in operation["parameters"]:
                if parameter.get("name") == "key_id":
                    keys = ended if method == "delete" else kept
                    parameter["schema"] = {"enum": [key.id for key in keys] + ["0000000000"]}
    return description


@pytest.fixture(scope="module")
def asking(served: KeyRig) -> tuple[Key, str]:
    return served.key(scopes=frozenset({"admin"}))


@pytest.fixture(scope="module")
def report(served: KeyRig, asking: tuple[Key, str]) -> Report:
    kept, ended = ([served.key()[0] for _ in range(3)] for _ in range(2))
    return run(served.rig, 40, of_admin(kept, ended), bearer(asking[1]))


def test_no_answer_breaks_the_description(report: Report) -> None:
    found = [f"{' / '.join(where)}\n{what}" for where, what in report.failures.items()]
    assert not found, "\n\n".join(found)


def test_enough_was_asked_and_enough_was_served(report: Report) -> None:
    for operation, status, least in (
        ("GET /admin/keys", 200, 1),
        ("POST /admin/keys", 201, 20),
        ("POST /admin/keys", 400, 20),
        ("GET /admin/keys/{key_id}", 200, 2),
        ("GET /admin/keys/{key_id}", 404, 1),
        ("PATCH /admin/keys/{key_id}", 200, 20),
        ("PATCH /admin/keys/{key_id}", 400, 20),
        ("DELETE /admin/keys/{key_id}", 200, 2),
        ("POST /admin/keys/{key_id}/rotate", 200, 2),
        ("GET /admin/keys/{key_id}/usage", 200, 5),
        ("GET /admin/keys/{key_id}/usage", 400, 2),
        ("GET /admin/usage", 200, 5),
        ("GET /admin/usage", 400, 2),
    ):
        assert report.statuses[operation, status] >= least, (operation, status, report.statuses)
    assert not [status for _, status in report.statuses if status in (0, 401, 403)]


def test_who_asked_may_still_ask(report: Report, rig: KeyRig, asking: tuple[Key, str]) -> None:
    assert report.cases
    assert rig.client.get("/admin/keys", headers=bearer(asking[1])).status_code == 200
