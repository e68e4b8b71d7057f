"""What is kept of the images that the tests build. The images here have one small file."""

import tarfile

import pytest

from tests import containers
from tests.containers import DEMANDED, IMAGE, alone, hold, images, missing, podman, remove_older

pytestmark = [
    pytest.mark.slow,
    pytest.mark.image,
    pytest.mark.skipif(bool(missing()) and DEMANDED != "1", reason=missing()),
]
BASE = "localhost/quotesmith-base:bookworm-2"


@pytest.fixture
def image(tmp_path, monkeypatch):
    """Makes an image in a store of this test's own."""
    monkeypatch.setattr(containers, "STORE", tmp_path / "store")
    monkeypatch.setattr(containers, "HELD", [])

    def make(name=""):
        content = tmp_path / "content"
        content.write_text(f"{len(images())}")
        with tarfile.open(tmp_path / "one.tar", "w") as archive:
            archive.add(content, "content")
        made = podman("import", str(tmp_path / "one.tar"), *filter(None, [name]))
        assert made.returncode == 0, made.stderr
        return made.stdout.strip().removeprefix("sha256:")

    yield make
    for file in containers.HELD:
        file.close()
    podman("rmi", "--all", "--force")


def test_a_build_leaves_itself_its_base_its_steps_and_what_another_process_uses(image):
    new, used, old = (f"{IMAGE}{letter * 16}" for letter in "abc")
    kept = {BASE, new, used, f"{used}-sagemaker"}
    for name in (
        *kept,
        old,
        f"{old}-sagemaker",
        "localhost/quotesmith-base:bookworm-1",
        "localhost/quotesmith:0.1.0-cpu",
    ):
        image(name)
    step, _ = image(), image()
    for letter in "ab":
        hold(letter * 16)
    with alone():
        remove_older(BASE, {step[:11]})
    assert {name for each in images() for name in each.get("Names") or ()} == kept
    assert [each["Id"] for each in images() if not each.get("Names")] == [step]
