"""The cross-entropy of a language model's head, and its gradient in the same pass.

The logits are the largest tensor in a training step of a small model, 152,000 numbers per token, and autograd keeps three
copies of them. But the gradient of a sum of cross-entropies is softmax minus one-hot, times the weights: it is known as
soon as the logits are. So the logits are made in pieces, and each piece makes its part of the gradient and is freed.

The same in Triton: Liger-Kernel, https://arxiv.org/abs/2410.10989. M target positions, D hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.models.qwen import at_least_float32

WORDS = 2**15  # of the vocabulary, whose gradient is in autocast's dtype at a time


def cross_entropy_sum(
    x_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, rows: int, factors_M: Tensor | None = None
) -> Tensor:
    """Summed cross-entropy of the logits x W^T, float32; `rows` of the logits exist at a time, in autocast's dtype.

    `factors_M`: each target's factor in the sum, 1 where None."""
    if torch.is_autocast_enabled(x_MD.device.type):
        x_MD = x_MD.to(torch.get_autocast_dtype(x_MD.device.type))
    if not torch.is_grad_enabled():
        x_MD, weight_VD = x_MD.detach(), weight_VD.detach()
    return HeadCrossEntropy.apply(x_MD, weight_VD, targets_M, rows, factors_M)


class HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, rows: int, factors_M: Tensor | None) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        rounded_VD = weight_VD.to(x_MD.dtype)
        of_x_MD = torch.empty_like(x_MD) if needs_x else None
        of_weight_VD = None
        loss = at_least_float32(x_MD).new_zeros(())
        for start in range(0, len(x_MD), rows):
            x, targets = x_MD[start : start + rows], targets_M[start : start + rows, None]
            log_p = at_least_float32(F.linear(x, rounded_VD)).log_softmax(-1)
            factors = None if factors_M is None else factors_M[start : start + rows, None].to(log_p.dtype)
            of_targets = log_p.gather(1, targets)
            loss -= (of_targets if factors is None else of_targets * factors).sum()
            if not (needs_x or needs_weight):
                continue
            p = log_p.exp_()
            p.scatter_add_(1, targets, p.new_full(targets.shape, -1.0))
            p = (p if factors is None else p.mul_(factors)).to(x.dtype)
            del log_p
            if needs_x:
                torch.mm(p, rounded_VD, out=of_x_MD[start : start + rows])
            if needs_weight:
                of_weight_VD = torch.zeros_like(weight_VD) if of_weight_VD is None else of_weight_VD
                for of_words, p_of_words in zip(of_weight_VD.split(WORDS), p.split(WORDS, 1), strict=True):
                    of_words += p_of_words.T @ x
        if needs_weight and of_weight_VD is None:
            of_weight_VD = torch.zeros_like(weight_VD)
        ctx.gradients = of_x_MD, of_weight_VD
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if g is None else g.mul_(of_loss) for g in gradients), None, None, None
