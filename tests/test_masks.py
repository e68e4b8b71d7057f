import pytest
import torch

from pipeline.masks import Target, global_masks, keep_mask, n_of_m_mask, row_mask

RATIOS = [0, 0.25, 0.3, 1 / 3, 0.5, 0.9, 0.999]


def scores_of(rows, columns, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


def dropped(mask):
    return int((~mask).sum())


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shape", [(8, 16), (7, 13), (1, 5), (5, 1)])
def test_exactly_the_asked_share_is_dropped_even_when_all_scores_tie(ratio, shape):
    total = round(ratio * shape[0] * shape[1])
    for scores in (torch.ones(shape), scores_of(*shape)):
        assert dropped(keep_mask(scores, ratio)) == total
        assert dropped(row_mask(scores, ratio)) == total


def test_the_lowest_scores_go_first():
    mask = keep_mask(torch.tensor([[3.0, 1.0], [2.0, 4.0]]), 0.5)
    assert mask.tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("ratio", RATIOS)
def test_rows_lose_the_same_number_to_within_one_and_their_lowest_scores(ratio):
    scores = scores_of(9, 13)
    mask = row_mask(scores, ratio)
    counts = (~mask).sum(1)
    assert counts.max() - counts.min() <= 1
    for row, kept in zip(scores, mask, strict=True):
        assert set(row[~kept].tolist()) == set(row.sort().values[: dropped(kept)].tolist())


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("block", [1, 4, 5, 13, 128])
def test_blocks_of_columns_lose_what_adds_up_to_the_share_of_the_whole_matrix(ratio, block):
    scores, target = scores_of(7, 13), Target(ratio)
    blocks = [target.column_mask(scores[:, start : start + block], start, 13) for start in range(0, 13, block)]
    assert dropped(torch.cat(blocks, 1)) == round(ratio * 7 * 13)
    for mask in blocks:
        assert abs(dropped(mask) - ratio * mask.numel()) <= 1.5
    if block >= 13:
        assert torch.equal(blocks[0], target.mask(scores))


def test_blocks_take_whole_groups_and_at_least_one():
    assert [Target(0.5, 2, 4).whole_groups(columns) for columns in (128, 127, 3)] == [128, 124, 4]
    assert Target(0.5).whole_groups(127) == 127


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8), (1, 2)])
def test_n_of_m_keeps_the_n_highest_of_every_m_neighbours(n, m):
    scores = scores_of(6, 16)
    mask = n_of_m_mask(scores, n, m)
    assert (mask.view(-1, m).sum(1) == n).all()
    kept = torch.where(mask, scores, 9).view(-1, m).amin(1)
    lost = torch.where(mask, -1, scores).view(-1, m).amax(1)
    assert (kept >= lost).all()
    target = Target(1 - n / m, n, m)
    assert torch.equal(target.mask(scores), mask) and torch.equal(target.row_mask(scores), mask)


def test_n_of_m_keeps_exactly_n_when_scores_tie():
    assert (n_of_m_mask(torch.zeros(3, 8), 2, 4).view(-1, 4).sum(1) == 2).all()


def test_one_matrix_alone_gets_the_same_mask_globally():
    scores = scores_of(4, 8)
    assert torch.equal(global_masks({"a": scores}, 0.5)["a"], keep_mask(scores, 0.5))


def test_a_global_threshold_takes_more_from_the_weaker_matrix():
    masks = global_masks({"weak": torch.full((4, 4), 0.1), "strong": torch.full((4, 4), 0.9)}, 0.5)
    assert not masks["weak"].any() and masks["strong"].all()
