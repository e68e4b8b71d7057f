import threading

import pytest

from pipeline.config import JobConfig
from pipeline.errors import ServiceUnavailable, TryLater
from pipeline.team import follower
from pipeline.team.meeting import Host
from pipeline.team.verdict import DONE, Verdict
from tests.test_team_meeting import nodes, port, quick  # noqa: F401  (fixtures)


@pytest.fixture
def host(port):  # noqa: F811
    made = Host(nodes(port))
    yield made
    made.line.close()


@pytest.fixture
def cfg(port, tmp_path):  # noqa: F811
    return JobConfig(work_dir=tmp_path / "work", nodes=nodes(port, 1))


def ends(host, verdict):
    def when_all_are_there():
        host.wait_for_all()
        host.end(verdict)

    threading.Thread(target=when_all_are_there, daemon=True).start()


def test_a_machine_without_anything_to_train_ends_well_and_leaves_nothing(host, cfg):
    ends(host, DONE)
    follower.follow(cfg)
    assert [path.name for path in cfg.work_dir.rglob("*") if path.is_dir()] == ["machine-2"]


def test_it_ends_with_the_error_of_the_job(host, cfg):
    ends(host, Verdict("TryLater", "another start holds the run"))
    with pytest.raises(TryLater, match="another start holds the run"):
        follower.follow(cfg)


def test_a_machine_with_too_few_gpus_says_so_to_the_first(host, cfg):
    threading.Thread(target=lambda: (host.wait_for_all(), host.order(LESSON, 8)), daemon=True).start()
    with pytest.raises(ServiceUnavailable, match="machine 2 sees 0 GPUs, but the first machine trains with 8"):
        follower.follow(cfg)
    (verdict,) = host.verdicts(1, Verdict("PeerLost"))
    assert verdict.kind == "ServiceUnavailable"


LESSON = '{"keeping": null, "device": "cuda"}'
