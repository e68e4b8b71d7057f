import pytest

from pipeline.openmp import WAITING, spin_briefly


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, WAITING), ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}), ({"GOMP_SPINCOUNT": "5"},) * 2],
)
def test_threads_spin_briefly_unless_the_environment_says_otherwise(given, expected):
    environment = {"PATH": "/bin", **given}
    spin_briefly(environment)
    assert environment == {"PATH": "/bin", **expected}
