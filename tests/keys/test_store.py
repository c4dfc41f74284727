"""Laws of every store: what is admitted, what is charged, what is kept."""

import itertools
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.keys.key import Limits, encode_fields, new_key
from server.keys.store.open import open_store
from server.keys.store.store import LEASE_SECONDS, Reservation, Store, StoreError, Usage
from tests.keys.reference import ReferenceStore
from tests.support.paths import ROOT

NOON = 1_700_000_000.0 // 86400 * 86400 + 43200
IDS = itertools.count()


def call(prompt: int = 1, completion: int = 0, model: str = "m|x") -> Reservation:
    return Reservation(id=f"call{next(IDS)}", model=model, prompt=prompt, completion=completion)


def test_a_minute_never_holds_more_than_the_limit(store: Store) -> None:
    limits = Limits(requests=3, tokens=None, day_requests=None)
    for second in (0, 10, 20):
        assert store.reserve("k", limits, call(), NOON + second).refusal is None
    refused = store.reserve("k", limits, call(), NOON + 59)
    assert (refused.refusal, refused.retry, refused.requests) == ("requests", 1, 3)
    assert refused.reset == NOON + 80
    assert store.reserve("other", limits, call(), NOON + 59).refusal is None
    assert store.reserve("k", limits, call(), NOON + 60).refusal is None
    assert store.reserve("k", limits, call(), NOON + 69.5).retry == 0.5


def test_tokens_are_reserved_at_most_and_settled_as_spent(store: Store) -> None:
    limits = Limits(requests=None, tokens=100, day_requests=None)
    first = call(30, 1000)
    assert store.reserve("k", limits, first, NOON).tokens == 100  # capped: else never admitted
    refused = store.reserve("k", limits, call(1), NOON + 6)
    assert (refused.refusal, refused.retry) == ("tokens", 54)
    store.settle("k", first.id, Usage(prompt=30, completion=10, cached=16), NOON + 6)
    store.settle("k", first.id, Usage(prompt=99, completion=99), NOON + 6)
    assert store.reserve("k", limits, call(60), NOON + 7).tokens == 100
    (row,) = store.usage("k")
    assert (row.requests, row.prompt, row.completion, row.cached) == (2, 30, 10, 16)
    assert (row.day, row.model) == (NOON // 86400, "m|x")


def test_a_day_ends_at_midnight(store: Store) -> None:
    limits = Limits(requests=None, tokens=None, day_requests=2)
    for _ in range(2):
        assert store.reserve("k", limits, call(), NOON).refusal is None
    refused = store.reserve("k", limits, call(), NOON + 3600)
    assert (refused.refusal, refused.retry) == ("day", 39_600)
    assert store.reserve("k", limits, call(), NOON + 43_200).refusal is None


def test_what_never_ran_is_forgotten(store: Store) -> None:
    limits = Limits(requests=1, tokens=10, day_requests=1, concurrent=1)
    for _ in range(3):
        refused = call(5)
        assert store.reserve("k", limits, refused, NOON).refusal is None
        store.settle("k", refused.id, None, NOON)
    status = store.quota_status("k", NOON)
    assert (
        status.requests,
        status.tokens,
        status.day_requests,
        status.running,
    ) == (0,) * 4
    assert store.usage("k") == []


def test_concurrent_requests_are_bounded_until_they_end(store: Store) -> None:
    limits = Limits(concurrent=1)
    first = call()
    assert store.reserve("k", limits, first, NOON).running == 1
    assert store.reserve("k", limits, call(), NOON).refusal == "concurrent"
    store.settle("k", first.id, Usage(), NOON)
    assert store.reserve("k", limits, call(), NOON).refusal is None


def test_a_renewed_lease_lasts_and_another_is_charged_as_reserved(store: Store) -> None:
    key, _ = new_key(store.pepper(), name="n", created=NOON)
    store.add_key(key)
    limits = Limits(concurrent=2)
    kept, lost = call(3, 40), call(5, 60)
    for each in (kept, lost):
        store.reserve(key.id, limits, each, NOON)
    store.renew([(key.id, kept.id), (key.id, "unknown")], NOON + 30)
    assert store.quota_status(key.id, NOON + LEASE_SECONDS).running == 1
    assert store.reserve(key.id, limits, call(0), NOON + LEASE_SECONDS).refusal is None
    store.settle(key.id, lost.id, Usage(prompt=1), NOON + LEASE_SECONDS)
    store.settle(key.id, kept.id, Usage(prompt=3, completion=4), NOON + 80)
    (row,) = store.usage(key.id)
    assert (row.requests, row.prompt, row.completion) == (3, 8, 64)


@pytest.mark.parametrize("times", [1, 2])
def test_a_killed_process_frees_its_slot_and_its_usage_is_kept(
    store: Store, location: str, times: int
) -> None:
    key, _ = new_key(store.pepper(), name="n", created=NOON)
    store.add_key(key)
    code = (
        "import sys, time\n"
        "from server.keys.key import Limits\n"
        "from server.keys.store.open import open_store\n"
        "from server.keys.store.store import Reservation\n"
        "store = open_store(sys.argv[1])\n"
        "for i in range(int(sys.argv[4])):\n"
        "    call = Reservation(id=str(i), model='m', prompt=7, completion=100)\n"
        "    store.reserve(sys.argv[2], Limits(), call, float(sys.argv[3]))\n"
        "print('reserved', flush=True)\n"
        "time.sleep(600)\n"
    )
    arguments = [location, key.id, str(NOON), str(times)]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reserved\n"
        process.send_signal(signal.SIGKILL)
    assert store.quota_status(key.id, NOON + 59).running == times
    store.sweep(NOON + LEASE_SECONDS)
    assert store.quota_status(key.id, NOON + LEASE_SECONDS).running == 0
    (row,) = store.usage(key.id)
    assert (row.requests, row.prompt, row.completion) == (times, 7 * times, 100 * times)


ADMIT = """
import sys
from concurrent.futures import ThreadPoolExecutor
from server.keys.key import Limits
from server.keys.store.open import open_store
from server.keys.store.store import Reservation
store = open_store(sys.argv[1])
def admit(i):
    call = Reservation(id=f"{sys.argv[2]}-{i}", model="m", prompt=1, completion=1)
    return store.reserve("k", Limits(), call, None).refusal
store.has_keys()
print("up", flush=True)
sys.stdin.readline()
with ThreadPoolExecutor(32) as pool:
    print(sum(refusal is None for refusal in pool.map(admit, range(200))), flush=True)
"""


def test_four_processes_admit_exactly_the_limit(store: Store, location: str) -> None:
    store.pepper()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ADMIT, location, str(i)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=50)[0] for process in processes]
    assert sum(map(int, answers)) == 60
    assert sum(row.requests for row in store.usage("k")) == 60
    assert store.quota_status("k", None).requests == 60


def test_keys_are_kept_and_changed(store: Store) -> None:
    assert not store.has_keys()
    key, text = new_key(store.pepper(), name="ünï", created=NOON, models=("a/b",), expires=NOON + 1)
    store.add_key(key)
    assert store.has_keys()
    found = store.find_key(key.id)
    assert found == key
    assert found is not None
    assert found.matches(store.pepper(), text)
    assert not found.matches(store.pepper(), text[:-1] + "~")
    changes = {"revoked": NOON, "limits": Limits(requests=None)}
    store.change_key(key.id, encode_fields(changes))
    (changed,) = store.list_keys()
    assert (changed.revoked, changed.limits, changed.name) == (NOON, Limits(requests=None), "ünï")
    assert store.find_key("' OR 1=1 --") is None
    assert store.has_keys()


def test_a_ticket_is_good_once_and_for_a_while(store: Store) -> None:
    for ticket in ("one", "two"):
        assert store.add_ticket(ticket, "k", NOON, NOON + 30, 2) is None
    assert store.take_ticket("one", NOON + 29) == "k"
    assert store.take_ticket("one", NOON + 29) is None
    assert store.take_ticket("two", NOON + 30) is None
    assert store.take_ticket("none", NOON) is None


def test_a_key_has_so_many_unused_tickets_at_most(store: Store) -> None:
    for i in range(3):
        assert store.add_ticket(f"{i}", "k", NOON + i, NOON + i + 30, 3) is None
    assert store.add_ticket("more", "k", NOON + 10, NOON + 40, 3) == 20
    assert store.take_ticket("more", NOON + 10) is None
    assert store.add_ticket("another's", "j", NOON + 10, NOON + 40, 3) is None
    assert store.take_ticket("1", NOON + 10) == "k"  # a used one makes room,
    assert store.add_ticket("more", "k", NOON + 10, NOON + 40, 3) is None
    assert store.add_ticket("late", "k", NOON + 11, NOON + 41, 3) == 19
    assert store.add_ticket("late", "k", NOON + 30, NOON + 60, 3) is None  # and so does time
    assert store.take_ticket("late", NOON + 30) == "k"


def test_expired_tickets_are_swept(location: str, store: Store) -> None:
    for i in range(5):
        store.add_ticket(f"{i}", "k", NOON, NOON + 30, 5)
    store.add_ticket("later", "j", NOON + 30, NOON + 60, 5)
    if not location.startswith("redis"):
        with closing(sqlite3.connect(location)) as database:
            assert database.execute("SELECT digest FROM tickets").fetchall() == [("later",)]
        return
    with redis.Redis.from_url(location, decode_responses=True) as client:
        names = client.keys("*ticket*")
        assert len(names) == 5 + 1 + 2
        assert all(0 < client.ttl(name) <= 90 for name in names)


def test_a_database_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys.db"
    for _ in range(2):
        store = open_store(path)
        store.pepper()
        for file in path.parent.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
        store.close()
        path.chmod(0o644)


def test_a_store_that_cannot_be_used_says_so_without_secrets(tmp_path: Path) -> None:
    (tmp_path / "keys.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(StoreError, match=r"keys\.db cannot be used"):
        open_store(tmp_path / "keys.db").has_keys()
    unreachable = open_store("redis://:hunter2@127.0.0.1:1/0")
    with pytest.raises(StoreError, match="cannot be used") as caught:
        unreachable.has_keys()
    assert "hunter2" not in str(caught.value)
    unreachable.close()


ACTIONS = st.one_of(
    st.tuples(st.just("reserve"), st.sampled_from("ab"), st.integers(0, 60), st.integers(0, 60)),
    st.tuples(st.just("settle"), st.integers(0, 30), st.integers(0, 80), st.booleans()),
    st.tuples(st.just("renew"), st.integers(0, 30)),
    st.tuples(st.just("sleep"), st.sampled_from([0.25, 1, 7, 29.5, 60, 20_000])),
    st.tuples(st.just("sweep")),
)
BOUNDS = st.builds(
    Limits,
    requests=st.none() | st.integers(0, 4),
    tokens=st.none() | st.integers(1, 100),
    day_requests=st.none() | st.integers(1, 8),
    concurrent=st.none() | st.integers(1, 3),
)


def empty(store: Store, location: str) -> None:
    """Without calls of earlier histories, which a sweep would look at again."""
    store.close()
    if "://" in location:
        with redis.Redis.from_url(location) as client:
            client.flushdb()
    else:
        Path(location).unlink(missing_ok=True)


@settings(
    max_examples=int(os.environ.get("STORE_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(limits=BOUNDS, actions=st.lists(ACTIONS, max_size=30))
def test_every_history_is_that_of_the_reference(
    store: Store, location: str, limits: Limits, actions: list[tuple]
) -> None:
    empty(store, location)
    run, reference, now = next(IDS), ReferenceStore(), NOON
    keys = {name: new_key(b"", name=name, created=NOON)[0] for name in "ab"}
    for key in keys.values():
        store.add_key(key)
    calls: list[tuple[str, Reservation]] = []
    for action, *details in actions:
        if action == "sleep":
            now += details[0]
        elif action == "sweep":
            store.sweep(now)
            reference.sweep(now)
        elif action == "reserve":
            name, prompt, completion = details
            wanted = Reservation(
                id=f"{run}-{len(calls)}", model="m", prompt=prompt, completion=completion
            )
            calls.append((keys[name].id, wanted))
            ours = store.reserve(keys[name].id, limits, wanted, now)
            assert ours == reference.reserve(keys[name].id, limits, wanted, now)
        elif calls:
            key_id, known = calls[details[0] % len(calls)]
            if action == "renew":
                store.renew([(key_id, known.id)], now)
                reference.renew([(key_id, known.id)], now)
            else:
                usage = Usage(prompt=known.prompt, completion=details[1]) if details[2] else None
                store.settle(key_id, known.id, usage, now)
                reference.settle(key_id, known.id, usage, now)
        for key in keys.values():
            assert store.quota_status(key.id, now) == reference.quota_status(key.id, now)
    store.sweep(now)
    reference.sweep(now)
    for key in keys.values():
        assert store.usage(key.id) == reference.usage(key.id)
