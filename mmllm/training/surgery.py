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
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from mmllm.errors import ConfigError
from mmllm.runtime.memory import blocks_apart


class WithoutValues(TorchFunctionMode):
    """Modules built inside keep whatever their memory holds: values are about to be loaded.

    Above all for the meta device, where drawing the values of an embedding makes torch import its compiler, 1.2 s.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None) -> object:
        kwargs = kwargs or {}
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, nn.init.constant_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def train_only_(model: nn.Module, parts: Iterable[str]) -> None:
    """Make the children called `parts` trainable and freeze the others, which stay in evaluation mode.

    Of a child with adapters only these are trained.
    """
    parts = set(parts)
    unknown = parts - dict(model.named_children()).keys()
    if unknown:
        raise ValueError(f"no part {', '.join(sorted(unknown))} in a {type(model).__name__}")
    for name, child in model.named_children():
        parameters = dict(child.named_parameters())
        has_adapters = any(".lora_" in key for key in parameters)
        for key, parameter in parameters.items():
            parameter.requires_grad_(name in parts and (".lora_" in key or not has_adapters))
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
