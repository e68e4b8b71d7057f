import torch

from pipeline.collate import collate


def test_the_end_token_is_learned_and_padding_is_not():
    end = 50256  # GPT-2's end token, which most recipes also take for padding
    batch = collate([{"input_ids": [end, 5, 6, end]}, {"input_ids": [end, 7, end]}])
    assert batch["labels"].tolist() == [[end, 5, 6, end], [end, 7, end, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["input_ids"].dtype == torch.long


def test_a_batch_is_as_wide_as_its_longest_example():
    assert collate([{"input_ids": [1, 2]}, {"input_ids": [1, 2, 3]}])["input_ids"].shape == (2, 3)
