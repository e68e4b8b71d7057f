"""SparseGPT (arXiv:2301.00774): drop the weights that cost least and let the ones to their right make up for them.

Column by column, as in algorithm 1 of the paper: the error of a dropped weight is spread over the columns not yet
visited, by the Cholesky factor of the inverse Hessian; the mask is chosen block by block of columns from the
weights as they are by then.
"""

from torch import Generator, Tensor

from pipeline.activations import Gram
from pipeline.hessian import inverse_factor
from pipeline.masks import Target

BLOCK = 128  # columns whose mask is chosen at once, the paper's B_s


def prune(weight: Tensor, gram: Gram, target: Target, generator: Generator | None = None, block: int = BLOCK) -> Tensor:
    factor = inverse_factor(gram)  # (in, in) upper
    fires = gram.total.diagonal() > 0  # (in,); a weight on an input that never fires costs nothing, so it goes first
    weight = weight.clone()
    block = target.whole_groups(block)
    for start in range(0, weight.shape[1], block):
        end = min(start + block, weight.shape[1])
        weight[:, start:end], errors = prune_block(weight, factor, fires, target, start, end)
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def prune_block(
    weight: Tensor, factor: Tensor, fires: Tensor, target: Target, start: int, end: int
) -> tuple[Tensor, Tensor]:
    """The pruned columns `start` to `end` and their errors, each (out, end - start)."""
    now, own = weight[:, start:end].clone(), factor[start:end, start:end]
    cost = fires[start:end] / own.diagonal() ** 2  # (end - start,), of a weight of one
    mask = target.column_mask(now**2 * cost, start, weight.shape[1])
    errors = now.new_empty(now.shape)
    for i in range(end - start):
        if target.group and i % target.group == 0:  # n:m is chosen group by group, from the weights as they are now
            group = slice(i, i + target.group)
            mask[:, group] = target.mask(now[:, group] ** 2 * cost[group])
        errors[:, i] = now[:, i] * ~mask[:, i] / own[i, i]
        now[:, i] *= mask[:, i]
        now[:, i + 1 :] -= errors[:, i, None] * own[i, None, i + 1 :]
    return now, errors
