"""Frames between two processes of a job, and how each proves that it may send some."""

import struct

import pytest

from inferneo_jax.distributed.transport import Channel, Kind
from inferneo_jax.errors import JobError
from tests.distributed.process_groups import SOON, TOKEN, Threads, connected


def test_what_is_sent_arrives(pair: tuple[Channel, Channel], threads: Threads) -> None:
    one, other = pair
    payloads = [b"", b"x", bytes(range(256)) * 20_000]
    sent = threads.start(lambda: [one.send(Kind.STEP, each[:7], each[7:]) for each in payloads])
    assert [other.receive() for _ in payloads] == [(Kind.STEP, each) for each in payloads]
    sent.result(SOON)


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\n\r\n", struct.pack("!BI", 3, 2**31), b"\0" * 9]
)
def test_what_is_no_frame_is_refused(sent: bytes) -> None:
    mine, theirs = connected()
    channel = Channel(mine, 1)
    theirs.sendall(sent)
    with pytest.raises(JobError, match="does not speak the protocol"):
        channel.receive()
    channel.close()
    theirs.close()


def test_both_sides_prove_that_they_know_the_token(
    pair: tuple[Channel, Channel], threads: Threads
) -> None:
    leader, follower = pair
    proving = threads.start(follower.prove, TOKEN, 7)
    assert leader.challenge(TOKEN) == 7
    leader.welcome()
    proving.result(SOON)


def test_a_leader_without_the_token_is_refused(
    pair: tuple[Channel, Channel], threads: Threads
) -> None:
    leader, follower = pair
    proving = threads.start(follower.prove, TOKEN, 1)
    leader.send(Kind.PROOF, b"n" * 32)
    leader.receive()
    leader.send(Kind.PROOF, b"t" * 32)
    with pytest.raises(JobError, match="leader does not know the job's token"):
        proving.result(SOON)
