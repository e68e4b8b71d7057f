"""Calibration text as `calibrate` leaves it, made by hand for the tests of the stages that read it."""

import json

from pipeline.artifacts import Calibration, sha256_of
from pipeline.calibrate import describe


def calibration_in(folder, sequences, validation=None):
    """`sequences` of token ids as the training split in `folder`, `validation` as the other; a tenth if not given."""
    if validation is None:
        held = max(1, len(sequences) // 10)
        sequences, validation = sequences[held:], sequences[:held]
    splits = {"train": [list(ids) for ids in sequences], "validation": [list(ids) for ids in validation]}
    path = folder / "calibration.jsonl"
    with path.open("w") as file:
        for split, rows in splits.items():
            file.writelines(json.dumps({"split": split, "kind": "quotes", "ids": ids}) + "\n" for ids in rows)
    facts = describe({"quotes": splits["train"] + splits["validation"]})
    return Calibration(path, sha256_of(path), facts | {"validation_texts": len(splits["validation"])})
