import socket
import threading
import time

import pytest

from pipeline import signals
from pipeline.config import NodesConfig
from pipeline.errors import ConfigError, InputMissing, TryLater
from pipeline.team import line
from pipeline.team import meeting as module
from pipeline.team.meeting import Guest, Host, Superseded
from pipeline.team.verdict import DONE, PEER_LOST, STOPPED, Verdict

KILLED = Verdict("MachineError", "killed")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(line, "BEAT_SECONDS", 0.05)
    for name, seconds in {"PATIENCE": 0.01, "LAST_WORD": 1.0, "CAUSE": 0.5}.items():
        monkeypatch.setattr(module, f"{name}_SECONDS", seconds)


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def nodes(port, rank=0, **changes):
    return NodesConfig(**{"count": 2, "rank": rank, "port": port, "wait_seconds": 60, "lost_seconds": 3, **changes})


@pytest.fixture
def both(port):
    host, guest = Host(nodes(port)), Guest(nodes(port, 1))
    host.wait_for_all()
    yield host, guest
    guest.line.close()
    host.line.close()


def soon(there, seconds=60):
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_lesson_reaches_the_guest_and_its_verdict_the_host(both):
    host, guest = both
    first = host.order("the lesson", 4)
    assert guest.next_order() == first and (first.lesson, first.processes) == ("the lesson", 4)
    guest.report(KILLED)
    assert host.verdicts(first.number, Verdict(PEER_LOST)) == [KILLED]
    second = host.order("smaller", 2)
    assert guest.next_order() == second and second.name != first.name
    guest.report(DONE)
    assert host.verdicts(second.number, DONE) == []  # nobody has to be asked


def test_an_attempt_that_is_followed_by_another_ends_on_the_guest_too(both):
    host, guest = both
    host.order("the lesson", 1)
    guest.next_order()
    guest.require_not_over()
    host.order("smaller", 1)
    soon(lambda: "order/2" in guest.line.heard)
    with pytest.raises(Superseded):
        guest.require_not_over()


def test_a_guest_that_left_may_come_back(both, port):
    host, guest = both
    guest.leave("it was stopped")
    guest.line.join()
    other = Guest(nodes(port, 1))
    soon(lambda: other.line.id.encode() in host.line.heard["machine/1"])
    host.known.clear()
    host.wait_for_all()
    host.require_all_at_work(host.order("the lesson", 1).number)
    other.line.close()


def test_a_guest_that_comes_when_all_is_done_hears_of_it(port):
    host = Host(nodes(port))
    host.dismiss()
    ending = threading.Thread(target=host.end, args=(DONE,))
    ending.start()
    guest = Guest(nodes(port, 1))
    assert guest.next_order() is None
    guest.leave("it is done")
    ending.join(60)
    assert not ending.is_alive()


@pytest.mark.parametrize(
    ("verdict", "error"),
    [(DONE, None), (Verdict("InputMissing", "gs://x is not there"), InputMissing), (Verdict(STOPPED), TryLater)],
)
def test_a_guest_ends_as_the_job_does(both, verdict, error):
    host, guest = both
    threading.Thread(target=host.end, args=(verdict,)).start()
    if error is None:
        assert guest.next_order() is None
    else:
        with pytest.raises(error):
            guest.next_order()
    guest.leave("done")


def test_a_host_at_its_end_waits_no_longer_than_guests_need(both, monkeypatch):
    monkeypatch.setattr(module, "LAST_WORD_SECONDS", 60.0)
    host, guest = both
    threading.Thread(target=lambda: (guest.next_order(), guest.leave("done"))).start()
    begun = time.monotonic()
    host.end(DONE)
    assert time.monotonic() - begun < module.LAST_WORD_SECONDS


def test_a_guest_that_never_comes_is_waited_for_only_so_long(port):
    host = Host(nodes(port, count=3, wait_seconds=1))
    with pytest.raises(TryLater, match="1 of 3 machines came within 1 s"):
        host.wait_for_all()
    host.line.close()


def test_a_host_that_never_comes_is_waited_for_only_so_long(port, monkeypatch):
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.5)
    with pytest.raises(TryLater, match=f"did not answer at localhost:{port} within 1 s"):
        Guest(nodes(port, 1, wait_seconds=1))


def test_a_guest_that_falls_silent_is_lost(both):
    host, guest = both
    number = host.order("the lesson", 1).number
    host.require_all_at_work(number)
    for each in (guest, host):
        each.line.close()
        each.line.join()
    host.line.changed_at["machine/1"] -= 4
    with pytest.raises(TryLater, match="machine 2 said nothing for 3 s"):
        host.require_all_at_work(number)


def test_a_guest_that_leaves_in_training_says_why(both):
    host, guest = both
    number = host.order("the lesson", 1).number
    guest.leave("the disk is full")
    soon(lambda: f"left/{guest.line.id}" in host.line.heard)
    with pytest.raises(TryLater, match="machine 2 left: the disk is full"):
        host.require_all_at_work(number)


def test_a_guest_that_was_started_anew_is_another(both, port):
    host, guest = both
    number = host.order("the lesson", 1).number
    guest.line.close()
    guest.line.join()
    other = Guest(nodes(port, 1))
    soon(lambda: other.line.id.encode() in host.line.heard["machine/1"])
    with pytest.raises(TryLater, match="machine 2 was started anew in the middle of training"):
        host.require_all_at_work(number)
    other.line.close()


def test_a_guest_that_stopped_is_not_lost_while_others_save(both):
    host, guest = both
    number = host.order("the lesson", 1).number
    guest.next_order()
    guest.report(Verdict(STOPPED))
    guest.leave("it was stopped")
    soon(lambda: {f"left/{guest.line.id}", f"verdict/{number}/1"} <= set(host.line.heard))
    host.require_all_at_work(number)
    host.line.changed_at[f"verdict/{number}/1"] -= module.ENDING_SECONDS + 1
    with pytest.raises(TryLater, match="machine 2 has ended its training"):
        host.require_all_at_work(number)


def test_another_version_is_refused(both, monkeypatch):
    host, _ = both
    monkeypatch.setattr(module, "code_digest", lambda: "another")
    with pytest.raises(ConfigError, match="machine 2 has another version of quotesmith"):
        host.wait_for_all()


def test_a_host_that_dies_is_noticed(both):
    host, guest = both
    host.line.close()
    host.line.join()
    soon(lambda: "machine/0" in guest.line.heard)
    guest.line.changed_at["machine/0"] -= 4
    with pytest.raises(TryLater, match="the first machine of the job is lost"):
        guest.next_order()


def test_a_port_in_use_is_said(port):
    with socket.create_server(("0.0.0.0", port)), pytest.raises(TryLater, match=f"port {port} of this machine cannot"):
        Host(nodes(port))


def test_a_signal_ends_the_waiting(both, monkeypatch):
    _, guest = both
    monkeypatch.setattr(signals.state, "received", signals.signal.SIGTERM)
    with pytest.raises(signals.Stopped):
        guest.next_order()
