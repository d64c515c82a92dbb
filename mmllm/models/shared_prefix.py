"""Attention masks and positions for several texts about one image in one row, which computes their common prefix once.

    row          system, image, prompt   | A cat.<|im_end|> | A cat sits.<|im_end|> | ...
    segment_ids  0 0 0 0 0 0 0 0 0 0 0 0 | 1 1 1  1         | 2 2 2   2  2          |
    positions    0 1 2 ...           P-1 | P P+1 ...        | P P+1 ...             |

Loss and gradient are those of separate rows: a token attends to the prefix and to its own segment, at the positions that
it would have in a row of its own, and the first token of a segment is predicted from the last one of the prefix. Five
captions of an image take a third of the time. data/packing.py builds such rows; -1 is padding.

B rows, T tokens, S = T tokens attended to, P length of the prefix.
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
    """Which tokens each token attends to, (B, T, S): those to its left in its own segment and in the prefix."""
    length = segment_ids_BT.shape[1]
    is_left_TS = torch.ones(length, length, dtype=torch.bool, device=segment_ids_BT.device).tril()
    keys_B1S = segment_ids_BT[:, None, :]
    return is_left_TS & ((keys_B1S == 0) | (keys_B1S == segment_ids_BT[:, :, None]))


def predictor_positions(segment_ids_BT: Tensor) -> Tensor:
    """The position from which each token is predicted, (B, T): the one before it, or the end of the prefix."""
    before_T = (torch.arange(segment_ids_BT.shape[1], device=segment_ids_BT.device) - 1).clamp(min=0)
    prefix_B1 = (segment_ids_BT == 0).sum(1, keepdim=True)
    return torch.where(_is_first(segment_ids_BT) & (segment_ids_BT > 0), prefix_B1 - 1, before_T)


def _is_first(segment_ids_BT: Tensor) -> Tensor:
    """Whether a token is the first of its segment."""
    is_first_BT = torch.ones_like(segment_ids_BT, dtype=torch.bool)
    is_first_BT[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return is_first_BT
