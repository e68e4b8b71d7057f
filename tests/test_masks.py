import pytest
import torch

from pipeline.masks import global_masks, keep_mask, n_of_m_mask


@pytest.mark.parametrize("ratio", [0, 0.25, 0.5, 0.9])
def test_exactly_the_asked_share_is_dropped_even_when_all_scores_tie(ratio):
    assert int((~keep_mask(torch.ones(8, 16), ratio)).sum()) == round(ratio * 128)


def test_the_lowest_scores_go_first():
    mask = keep_mask(torch.tensor([[3.0, 1.0], [2.0, 4.0]]), 0.5)
    assert mask.tolist() == [[True, False], [False, True]]


def test_n_of_m_keeps_the_n_highest_of_every_m_neighbours():
    scores = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    mask = n_of_m_mask(scores, 2, 4)
    assert (mask.view(-1, 4).sum(1) == 2).all()
    kept = torch.where(mask, scores, 9).view(-1, 4).amin(1)
    dropped = torch.where(mask, -1, scores).view(-1, 4).amax(1)
    assert (kept >= dropped).all()


def test_one_matrix_alone_gets_the_same_mask_globally():
    scores = torch.rand(4, 8)
    assert torch.equal(global_masks({"a": scores}, 0.5)["a"], keep_mask(scores, 0.5))


def test_a_global_threshold_takes_more_from_the_weaker_matrix():
    masks = global_masks({"weak": torch.full((4, 4), 0.1), "strong": torch.full((4, 4), 0.9)}, 0.5)
    assert not masks["weak"].any() and masks["strong"].all()
