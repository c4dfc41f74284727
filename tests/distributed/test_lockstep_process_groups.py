"""What the processes of a job agree on, and how one that is lost is noticed."""

import threading
import time

import pytest

from inferneo_jax.distributed.process_group import TcpProcessGroup, agree
from inferneo_jax.distributed.transport import Channel, Kind
from inferneo_jax.errors import JobError
from tests.distributed.process_groups import CONFIG, SOON, Threads, connected, process_groups


def test_all_learn_what_each_says(threads: Threads) -> None:
    with process_groups(3) as made:
        work = [lambda n=n: made.all[n].exchange("numbers", [n, "x"]) for n in range(4)]
        assert threads.all(*work) == [[[n, "x"] for n in range(4)]] * 4


def test_what_differs_is_named_on_every_side(threads: Threads) -> None:
    told: set[int] = set()
    with process_groups(2, lost_seconds=20) as made:  # a busy machine's process is not lost

        def compare(number: int) -> str:
            fields = {"slots": 8 if number == 2 else 4, "mesh": (1, 2)}
            with pytest.raises(JobError) as caught:
                agree(made.all[number], "settings", fields)
            if number == 0:  # it goes last: without it the others could not say why they end
                assert told == {1, 2}
            told.add(number)
            made.all[number].close()
            return str(caught.value)

        for problem in threads.all(*(lambda n=n: compare(n) for n in range(3))):
            assert "slots is 8 in process 2 and 4 in process 0. Give" in problem


def test_who_is_elsewhere_or_late_is_named(threads: Threads) -> None:
    with process_groups() as made:
        leader, follower = made.all
        threads.start(lambda: follower.exchange("weights", 1)).add_done_callback(
            lambda done: done.exception()
        )
        with pytest.raises(JobError, match="process 1 is at 'weights' and process 0 at 'programs'"):
            leader.exchange("programs", 1)
        with pytest.raises(JobError, match=r"process 1 did not come along within 0.05 s"):
            leader.exchange("programs", 1, 0.05)
        leader.close()


@pytest.mark.parametrize("gone", [0, 1])
def test_a_process_that_dies_is_noticed_at_once(gone: int, threads: Threads) -> None:
    with process_groups(2) as made:
        waiting = threads.start(made.all[1 - gone].exchange, "never", 0)
        for channel in made.all[gone]._channels.values():
            channel.close()  # as the kernel does
        made.until(lambda: made.reasons[1 - gone])
        with pytest.raises(JobError, match=f"process {gone} of the job closed the connection"):
            waiting.result(SOON)
        with pytest.raises(JobError, match="closed the connection"):
            made.all[1 - gone].announce(Kind.RESET)
        assert made.all[1 - gone].lost == made.reasons[1 - gone][0]
        assert len(made.reasons[1 - gone]) == 1


def test_a_process_that_says_nothing_is_lost() -> None:
    mine, theirs = connected()
    reasons: list[str] = []
    lost = threading.Event()

    def note(reason: str) -> None:
        reasons.append(reason)
        lost.set()

    processes = TcpProcessGroup(
        {1: Channel(mine, 0.3)},
        process_id=0,
        beat_seconds=0.05,
        load_seconds=5,
        on_lost=note,
    )
    assert lost.wait(SOON)
    assert reasons == ["process 1 of the job was not heard of for 0.3 s"]
    processes.close()
    theirs.close()


def test_an_idle_job_lives() -> None:
    with process_groups(2) as made:
        time.sleep(1.5 * CONFIG.lost_seconds)
        assert not any(made.reasons)


def test_a_follower_says_why_it_ends() -> None:
    with process_groups() as made:
        made.all[1].announce(Kind.LEAVE)
        made.until(lambda: made.left)
        assert made.left == ["process 1 was told to end"]
        assert made.all[0].lost is None
        made.all[1].announce(Kind.FAILED, b"no memory")
        made.until(lambda: made.reasons[0])
        assert made.reasons[0] == ["process 1 of the job failed: no memory"]


def test_an_end_in_order_is_no_loss(threads: Threads) -> None:
    with process_groups(2) as made:

        def obey(processes: TcpProcessGroup) -> None:
            assert processes.next() == (Kind.STOP, b"")
            processes.announce(Kind.STOP)
            processes.close()

        threads.all(
            lambda: made.all[0].end(SOON),
            lambda: obey(made.all[1]),
            lambda: obey(made.all[2]),
        )
        made.all[0].close()
        time.sleep(3 * CONFIG.beat_seconds)
        assert not any(made.reasons)
        assert not any(processes.lost for processes in made.all)
