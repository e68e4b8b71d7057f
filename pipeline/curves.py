"""TensorBoard's files of the training, where a platform or a person looks for them."""

from __future__ import annotations

from pipeline.artifacts import Checkpoint
from pipeline.mirror import tolerated
from pipeline.storage import open_store

FOLDER = "tensorboard"  # beside the tuned model, in its stage's folder
RUN = "finetune"  # what TensorBoard calls it


def show(tuned: Checkpoint, uri: str) -> None:
    """Copies them to the folder or bucket `uri`, if that is set. A job can do without: what fails is a warning."""
    if not uri:
        return
    with tolerated(f"TensorBoard's files are not copied to {uri}"):
        store = open_store(uri)
        for path in sorted((tuned.path.parent / FOLDER).glob("*tfevents*")):
            store.put(f"{RUN}/{path.name}", path)
