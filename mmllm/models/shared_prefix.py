"""One picture with its several captions or questions in one row: what they share stands there, and is computed, once.

    row        system, picture, prompt | A cat.<|im_end|> | A cat sits.<|im_end|> | ...
    branches   0 0 0 0 0 0 0 0 0 0 0 0 | 1 1 1  1         | 2 2 2   2  2          |
    positions  0 1 2 ...           P-1 | P P+1 ...        | P P+1 ...             |

The surprising fact: it is exact. A token sees the shared prefix and its own branch, at the positions that it would have
in a row of its own, and the first token of each branch is foretold from the last one of the prefix. So loss, targets and
gradient are those of separate rows, and five captions of a picture cost a third of them.

B rows, T tokens, S tokens that may be seen (also all of the row). P: length of the prefix.
Next: model.py, batches.py.
"""

import torch
from torch import Tensor


def positions_of(segment_ids_BT: Tensor) -> Tensor:
    """The position of each token in a row of its own, (B, T)."""
    t_T = torch.arange(segment_ids_BT.shape[1], device=segment_ids_BT.device)
    begins_BT = torch.where(_is_first(segment_ids_BT), t_T, 0).cummax(1).values
    prefix_B1 = (segment_ids_BT == 0).sum(1, keepdim=True)
    return torch.where(segment_ids_BT == 0, t_T, t_T - begins_BT + prefix_B1)


def attention_of(segment_ids_BT: Tensor) -> Tensor:
    """Which tokens each token sees, (B, T, S): those to its left of its own branch and of the prefix."""
    length = segment_ids_BT.shape[1]
    is_left_TS = torch.ones(length, length, dtype=torch.bool, device=segment_ids_BT.device).tril()
    keys_B1S = segment_ids_BT[:, None, :]
    return is_left_TS & ((keys_B1S == 0) | (keys_B1S == segment_ids_BT[:, :, None]))


def predictor_positions(segment_ids_BT: Tensor) -> Tensor:
    """The place from which each token is foretold, (B, T): the one before it, or the end of the prefix."""
    before_T = (torch.arange(segment_ids_BT.shape[1], device=segment_ids_BT.device) - 1).clamp(min=0)
    prefix_B1 = (segment_ids_BT == 0).sum(1, keepdim=True)
    return torch.where(_is_first(segment_ids_BT) & (segment_ids_BT > 0), prefix_B1 - 1, before_T)


def _is_first(segment_ids_BT: Tensor) -> Tensor:
    """Whether a token begins a branch."""
    is_first_BT = torch.ones_like(segment_ids_BT, dtype=torch.bool)
    is_first_BT[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return is_first_BT
