import pytest

from pipeline import threads


@pytest.mark.parametrize(
    ("asked", "allowed", "found"),
    [("3", 8, 3), ("5,2", 8, 5), (None, 8, 8), (None, 1.5, 2), (None, 0.5, 1), ("0", 8, 8), ("many", 8, 8)],
)
def test_threads_are_those_of_openmp_or_what_the_container_may_use(asked, allowed, found, monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: allowed)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads.count() == found
