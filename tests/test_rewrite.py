from dataclasses import replace

import numpy as np
import pytest

from pipeline.artifacts import GgufFile, GgufSet, sha256_of
from pipeline.checkpoints import Checkpoints
from pipeline.config import ResumeConfig
from pipeline.errors import CheckFailed
from pipeline.gguf_file import GgufContents
from pipeline.gguf_reader import TensorReader
from pipeline.rewrite import rewrite
from tests.test_gguf_file import write


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a-Q2_K.gguf"
    write(path, {"blk.0.ffn_up.weight": (np.ones((2, 32), np.float32), "F32")})
    return GgufFile(path, sha256_of(path), path.stat().st_size, "Q2_K", GgufContents(path).describe())


def rewritten(file, out, reason=None, change=None, checkpoints=None):
    out.mkdir(exist_ok=True)
    return rewrite(GgufSet((file,)), "polish", lambda file: reason, change, out, checkpoints).files[0]


def test_a_changed_copy_has_its_own_hash_and_the_facts_of_the_change(file, tmp_path):
    def change(path, checkpoints):
        assert checkpoints is None and path != file.path
        TensorReader(path, "r+").tensors[0].data[0] = 0
        return {"gained": 1.0}

    found = rewritten(file, tmp_path / "out", change=change)
    assert found.path == tmp_path / "out" / "a-Q2_K.gguf"
    assert found.sha256 == sha256_of(found.path) != file.sha256 == sha256_of(file.path)
    assert (found.type, found.size_bytes, found.facts["zeros"]) == ("Q2_K", file.size_bytes, 0.5)
    assert found.facts["polish"] == {"gained": 1.0}


def test_a_file_that_is_left_alone_says_why(file, tmp_path):
    found = rewritten(file, tmp_path / "out", reason="it shines")
    assert found.sha256 == sha256_of(found.path) == file.sha256
    assert found.facts["polish"] == {"reason": "it shines"}


def test_what_a_file_says_of_itself_depends_on_its_bytes_alone(file, tmp_path):
    """Else a run that quantizes to the same bytes by other settings would tell of this one's."""
    other = replace(file, facts=file.facts | {"encoder": "other", "budget": {"max_bytes": 1}})
    one, two = (rewritten(f, tmp_path / n, reason="it shines") for f, n in ((file, "one"), (other, "two")))
    assert one.facts == two.facts


def test_a_file_of_another_size_or_of_other_types_is_refused(file, tmp_path):
    for before in (
        replace(file, size_bytes=file.size_bytes - 1),
        replace(file, facts=file.facts | {"tensor_types": {"F16": 1}}),
    ):
        with pytest.raises(CheckFailed, match=r"polish changed the size or the types of a-Q2_K\.gguf"):
            rewritten(before, tmp_path / "out", reason="it shines")


def test_each_file_has_checkpoints_of_its_own_under_its_name(file, tmp_path):
    seen = []
    checkpoints = Checkpoints(tmp_path / "kept", ResumeConfig())
    rewritten(file, tmp_path / "out", change=lambda path, own: seen.append(own.folder) or {}, checkpoints=checkpoints)
    assert seen == [tmp_path / "kept" / "a-Q2_K.gguf"]
