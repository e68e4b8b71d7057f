import json

import jsonschema
import pytest
from pydantic import ValidationError

from pipeline import metrics
from pipeline.metrics import GateResult, LedgerRow, LongContextRow

ROW = {
    "stage": "tuned",
    "file": None,
    "type": None,
    "engine": "torch float32, cpu",
    "quotes": 20,
    "tokens": 400,
    "perplexity": {"value": 30.0, "low": 25.0, "high": 36.0},
    "bits_per_byte": 1.1,
    "ppl_ratio": {"value": 1.0, "low": 1.0, "high": 1.0},
    "kl_mean": 0.0,
    "same_top": 1.0,
    "size_bytes": 1,
    "bits_per_weight": 32.0,
    "zeros": {"value": None, "reason": "not pruned"},
}


def test_the_schema_in_the_repository_is_the_one_the_models_make():
    assert json.loads(metrics.SCHEMA_PATH.read_text()) == metrics.schema()


def test_the_schema_is_a_valid_json_schema():
    jsonschema.Draft202012Validator.check_schema(metrics.schema())


def test_a_number_or_a_null_with_a_reason_is_accepted():
    assert LedgerRow.model_validate(ROW).zeros.reason == "not pruned"
    assert LedgerRow.model_validate({**ROW, "zeros": 0.5}).zeros == 0.5


@pytest.mark.parametrize("broken", [{"zeros": None}, {"zeros": {"value": None}}, {"kl_mean": float("nan")}])
def test_a_missing_number_without_a_reason_is_refused(broken):
    with pytest.raises(ValidationError):
        LedgerRow.model_validate({**ROW, **broken})


def test_a_size_at_a_gate_stays_a_whole_number():
    row = {"gate": "max_bytes", "file": "a.gguf", "found": 70_700_000, "limit": 80_000_000, "passed": True}
    assert GateResult.model_validate(row).model_dump_json() == json.dumps(row, separators=(",", ":"))


def test_a_context_that_was_not_measured_says_why():
    row = {"context": 2048, "quotes": 3, "tokens": 40, "perplexity": {"value": None, "reason": "too little text"}}
    assert LongContextRow.model_validate({**row, "ratio": row["perplexity"]}).ratio.reason == "too little text"
    with pytest.raises(ValidationError):
        LongContextRow.model_validate({**row, "ratio": None})


def test_an_absent_number_is_refused():
    with pytest.raises(ValidationError):
        LedgerRow.model_validate({key: value for key, value in ROW.items() if key != "same_top"})
