"""What is done to a built model that knows nothing of it: freeze, recompute, compile, hold in half the memory, count.

The surprising fact: a block's `forward` is replaced on the instance, not the block by a wrapper. So no parameter changes
its name, and a checkpoint written with recomputation loads without it.
Next: trainer.py, where these are applied in order.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmllm.errors import ConfigError
from mmllm.layers.lora import adapter_names
from mmllm.runtime.memory import blocks_apart


def train_only_(model: nn.Module, parts: Iterable[str]) -> None:
    """Make the children called `parts` trainable and freeze the others, which stay in evaluation mode.

    Of a child with adapters only these are trained.
    """
    parts = set(parts)
    unknown = parts - dict(model.named_children()).keys()
    if unknown:
        raise ValueError(f"no part {', '.join(sorted(unknown))} in a {type(model).__name__}")
    for name, child in model.named_children():
        of_adapters = adapter_names(child)
        for key, parameter in child.named_parameters():
            parameter.requires_grad_(name in parts and (key in of_adapters or not of_adapters))
        child.train(name in parts)


def checkpoint_blocks_(blocks: Iterable[nn.Module]) -> None:
    """Keep only the inputs of each block for the backward pass, which then runs the block again (x1.2 to 1.35 time)."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks_(blocks: Iterable[nn.Module]) -> None:
    """Compile each block where a graph for the backward pass is recorded; all lengths share one compilation.

    Elsewhere (validation, captions: other shapes, another graph) it runs as it is. With dropout the random numbers are
    others than those of the plain block.
    """
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "cl"]
    if not any(map(shutil.which, compilers)):
        raise ConfigError(
            f"training.compile needs a C++ compiler, and there is no {' or '.join(compilers)} on the PATH; install one, or "
            "set training.compile=false"
        )
    for block in blocks:
        plain = block.forward
        block.forward = partial(_either, torch.compile(plain, dynamic=True), plain)


def _either(compiled: Callable[..., Tensor], plain: Callable[..., Tensor], *arguments: object) -> Tensor:
    return compiled(*arguments) if torch.is_grad_enabled() else plain(*arguments)


@torch.no_grad()
def exact_in_bfloat16(layers: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The frozen weights of `layers` that lose nothing as bfloat16, as those of models published so do.

    Under autocast a product rounds them anyway, in every pass: held so, the numbers are the same bit for bit. Those that
    would lose something stay as they are, and so do shards.
    """
    frozen = {id(p): p for layer in layers if type(p := layer.weight) is nn.Parameter and not p.requires_grad}
    return [p for p in frozen.values() if p.dtype == torch.float32 and _is_exact_in_bfloat16(p)]


def _is_exact_in_bfloat16(p: Tensor) -> bool:
    """In pieces: copies of a whole embedding would be the peak of a stage's memory."""
    return all(torch.equal(rows.bfloat16().float(), rows) for rows in p.split(4096))


def cast_(weights: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Keep `weights` as numbers of `dtype`. The largest is there twice when the others are small: first of those that
    grow, last of those that shrink."""
    weights = sorted(weights, key=torch.Tensor.numel)
    with blocks_apart():
        for weight in weights if dtype.itemsize == 2 else reversed(weights):
            weight.data = weight.data.to(dtype)
