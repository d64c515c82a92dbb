"""One model sharded over the processes (FSDP2): each keeps its own rows of every weight, gradient and moment.

The rows of a process are one contiguous piece of a safetensors file. So a model too large for any process is never whole
anywhere: it is built on the meta device, each process copies its rows from the mapped file, and checkpoints write them
back in the same way (storage/sharded_file.py).

The weights of a block are gathered when it runs. The embedding and the head, which may be one tensor, are in the outermost
group with the norm and the projector. A frozen vision tower is small and stays whole.

Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from mmllm.config.schema import ExperimentConfig
from mmllm.data.chat import IGNORED
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.distributed import World, local, rows_for


def is_wanted(config: ExperimentConfig, processes: int) -> bool:
    """Whether to shard the model. "auto": where the language model's own weights are trained.

    Adapters, or a projector alone, have few gradients and moments: a whole copy in every process is faster.
    """
    if processes == 1 or config.training.sharding == "none":
        return False
    trains = any("language_model" in stage.train and stage.epochs for stage in config.stages())
    return config.training.sharding == "full" or (trains and not config.model.use_lora)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@torch.no_grad()
def shard_(model: MultimodalLLM, world: World, *, reshard_after_forward: bool = False) -> None:
    """Shard `model` over the processes and move it to their devices, in float32.

    From a mapped file (loaded with `dtype=None`) a process reads only its own rows.
    `reshard_after_forward` frees the weights of a block after the forward pass and gathers them again for the backward.
    """
    whole = dict(model.named_parameters()) | dict(model.named_buffers())
    _to_meta_(model)
    model.language_model.model.embed_tokens.sparse = False  # FSDP exchanges dense gradients
    tower = model.vision_tower
    is_whole = not any(p.requires_grad for p in tower.parameters())
    blocks = [*model.language_model.model.layers, *([] if is_whole else tower.vision_model.encoder.layers)]
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in [*blocks, model]:
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            ignored_params=set(tower.parameters()) if is_whole else None,
        )
        # a sum, not a mean: the loss is already divided by the targets of all. Neither setting reaches the blocks inside.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=world.device)
    for name, tensor in (dict(model.named_parameters()) | dict(model.named_buffers())).items():
        local(tensor).copy_(rows_for(tensor, whole[name], world))
    head, embedding = model.language_model.lm_head.weight, model.language_model.model.embed_tokens.weight
    assert (head is embedding) == model.config.text.tie_word_embeddings, "the head lost its tie to the embedding"


def _to_meta_(model: nn.Module) -> None:
    """Replace all parameters by ones on the meta device; tied parameters stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p not in made:
                made[p] = nn.Parameter(torch.empty(p.shape, device="meta"), requires_grad=p.requires_grad)
            setattr(module, name, made[p])


def reduce_after_(model: nn.Module, is_last: bool) -> None:
    """Exchange the gradients of a sharded model after the next backward pass if it is the last of the step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)


@torch.no_grad()
def call_once(model: MultimodalLLM) -> None:
    """Call a sharded model as a whole, before any of its parts: FSDP takes the first module that is called for the root."""
    if is_sharded(model):
        ids_BT = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        side = model.config.vision.image_size
        model(ids_BT, torch.full_like(ids_BT, IGNORED), torch.zeros(0, 3, side, side))


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, the parts of a sharded model can be called, not only its `forward`; a collective."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
