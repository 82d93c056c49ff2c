"""The `child` fixture: messages, descriptors, results, and an end that comes with the test."""

import os
import signal
import socket

import pytest

from tests.support.children import Child, ChildFailed, Nursery, Parent, Spawn


def echo(parent: Parent, prefix: str = "") -> str:
    parent.send(prefix + parent.recv())
    return "returned"


def write_to_a_received_descriptor(parent: Parent) -> None:
    _, fds, _, _ = socket.recv_fds(parent.sock, 1, 1)
    os.write(fds[0], b"from the child")


def raises(parent: Parent) -> None:
    raise ValueError("what the child said")


def waits(parent: Parent) -> None:
    parent.recv()


def forks_and_waits(parent: Parent) -> None:
    if os.fork() == 0:
        signal.pause()
    parent.send("forked")
    parent.recv()


def test_a_child_takes_arguments_and_messages_and_returns_a_result(child: Spawn) -> None:
    other = child(echo, prefix="heard ")
    other.send("this")
    assert other.recv() == "heard this"
    assert other.result() == "returned"
    assert other.wait() == 0


def test_descriptors_travel_over_the_socket(child: Spawn) -> None:
    other = child(write_to_a_received_descriptor)
    read, write = os.pipe()
    try:
        socket.send_fds(other.sock, [b"x"], [write])
        os.close(write)
        assert os.read(read, 100) == b"from the child"
    finally:
        os.close(read)


def test_an_exception_in_the_child_is_raised_by_recv_and_by_result(child: Spawn) -> None:
    other = child(raises)
    with pytest.raises(ChildFailed, match="what the child said"):
        other.recv()
    with pytest.raises(ChildFailed, match="what the child said"):
        other.result()
    assert other.wait() == 1


def test_a_killed_child_is_an_end_of_file_at_once(child: Spawn) -> None:
    other = child(waits)
    other.kill()
    assert other.wait() == -signal.SIGKILL
    with pytest.raises(EOFError):
        other.recv()
    with pytest.raises(EOFError, match="died before"):
        other.result()


def test_a_stopped_child_goes_on_when_resumed(child: Spawn) -> None:
    other = child(echo)
    other.stop()
    other.send("hello")
    other.resume()
    assert other.recv() == "hello"


def test_the_end_of_the_test_ends_children_and_what_they_forked() -> None:
    with Nursery() as nursery:
        other: Child = nursery(forks_and_waits)
        assert other.recv() == "forked"
    with pytest.raises(ProcessLookupError):
        os.killpg(other.pid, 0)


def test_an_exception_that_nobody_asked_about_fails_the_test() -> None:
    with pytest.raises(ChildFailed, match="what the child said"), Nursery() as nursery:
        nursery(raises).wait()
