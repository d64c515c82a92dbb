"""The whole model: a picture becomes tokens between the words, and the language model goes on from there.

The surprising fact: nothing is added to the vocabulary. Qwen2.5 already has `<|image_pad|>`; it stands once per visual
token in the text, and the projector's outputs take those places.

In patch mode a saved directory is a `LlavaForConditionalGeneration` checkpoint of transformers, names and all.
Paper: LLaVA, https://arxiv.org/abs/2304.08485.

B rows, T tokens, N pictures in the whole batch, S their side, Q visual tokens a picture, D hidden size, V vocabulary,
M labelled positions.
Next: chat.py (what the text looks like), trainer.py, generate.py.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmllm.config.schema import LoraConfig
from mmllm.data.chat import DEFAULT_SYSTEM, IGNORED, ChatProcessor
from mmllm.data.image import ImageProcessor
from mmllm.data.tokenizer import Tokenizer
from mmllm.errors import CheckpointError
from mmllm.layers.lora import (
    CONFIG_FILE,
    TENSOR_FILE,
    adapter_tensors,
    adapters,
    load_adapter_,
    write_adapter_config,
)
from mmllm.layers.packed import empty_, to_device_layout_
from mmllm.layers.quantized import ROUNDINGS, quantize_
from mmllm.models.clip import CLIPVisionTower
from mmllm.models.config import CLIPVisionConfig, MultimodalConfig, Qwen2Config
from mmllm.models.loss import cross_entropy_sum
from mmllm.models.projector import Projector
from mmllm.models.qwen import Qwen2
from mmllm.models.shared_prefix import attention_of, positions_of, predictor_positions
from mmllm.runtime.files import read_json
from mmllm.storage.atomic import atomic_directory
from mmllm.storage.weights import load_strict_, locate, read_tensors, refuse_integers
from mmllm.training.surgery import WithoutValues

LOGITS_AT_ONCE = 2**23  # numbers in one piece of logits: 32 MiB in float32
ROOM_BESIDE_A_GRADIENT = 8  # times as many where the head is trained: each piece makes a gradient of the whole head


class MultimodalLLM(nn.Module):
    """CLIP -> projector -> Qwen2.5. `processor` turns conversations and pictures into its inputs; it is None only in a
    model that was built for its shapes."""

    def __init__(self, config: MultimodalConfig):
        super().__init__()
        self.config = config
        is_pooled = config.features == "pooled"
        self.vision_tower = CLIPVisionTower(config.vision, with_projection=is_pooled)
        self.multi_modal_projector = Projector(config.feature_shape[1], config.text.hidden_size)
        self.language_model = Qwen2(config.text)
        self.processor: ChatProcessor | None = None
        self.lora: LoraConfig | None = None  # set where the language model has adapters
        self.rounding: str | None = None  # "int8" or "int4" where the linear layers under its adapters are (quant.py)
        self.is_packed = False  # whether both towers are int8 for answering only (packed.py)
        self.precision: str | None = None  # set where load_model (fast.py) made it ready to answer, and nothing else

    @property
    def device(self) -> torch.device:
        return self.multi_modal_projector.linear_1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.multi_modal_projector.linear_1.weight.dtype

    def encode_images(self, pixels_N3SS: Tensor) -> Tensor:
        """Visual tokens, (N, Q, D); N may be 0. In place of pixels it may be given what `vision_features` made of them."""
        if pixels_N3SS.ndim == 3:
            return self.multi_modal_projector(pixels_N3SS.to(self.device, self.dtype))
        return self.multi_modal_projector(self.vision_features(pixels_N3SS))

    def vision_features(self, pixels_N3SS: Tensor) -> Tensor:
        """What the tower sees, (N, Q, F). A frozen tower runs without a graph."""
        is_frozen = not any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen):
            pixels_N3SS = pixels_N3SS.to(self.device, self.dtype)
            is_patch = self.config.features == "patch"
            return self.vision_tower.patches(pixels_N3SS) if is_patch else self.vision_tower.pooled(pixels_N3SS)

    def embed(self, ids_BT: Tensor, pixels_N3SS: Tensor) -> Tensor:
        """Token embeddings (B, T, D) with the pictures' tokens in the places of `image_token_id`, in order."""
        x_BTD = self.language_model.embed(ids_BT).to(self.dtype)  # a frozen embedding may be held in less
        image_NQD = self.encode_images(pixels_N3SS)
        is_image_BT = ids_BT == self.config.image_token_id
        places, features = int(is_image_BT.sum()), image_NQD.shape[0] * image_NQD.shape[1]
        if places != features:  # masked_scatter would take too many features without a word
            raise ValueError(
                f"{places} image places in the text for {len(image_NQD)} pictures of {image_NQD.shape[1]} tokens"
            )
        return x_BTD.masked_scatter(is_image_BT[:, :, None], image_NQD.to(x_BTD.dtype))

    def forward(
        self, ids_BT: Tensor, labels_BT: Tensor, pixels_N3SS: Tensor, segment_ids_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies (float32) and number of the labelled positions.

        `labels_BT[b, t]` is the token at t, to be foretold from t - 1, or IGNORED. Rows are padded on the right.
        With `branches_BT` a row may hold several conversations, see branches.py.
        The caller divides: only it knows all the targets of its optimiser step.
        """
        x_BTD = self.embed(ids_BT, pixels_N3SS)
        rows_M, places_M = (labels_BT[:, 1:] != IGNORED).nonzero(as_tuple=True)
        targets_M = labels_BT[rows_M, places_M + 1]
        positions_BT = attend_BTS = None
        if segment_ids_BT is not None:
            positions_BT, attend_BTS = positions_of(segment_ids_BT), attention_of(segment_ids_BT)
            places_M = predictor_positions(segment_ids_BT)[rows_M, places_M + 1]
        x_MD = self.language_model(x_BTD, positions_BT, attend_BTS=attend_BTS, keep=(rows_M, places_M))
        return self.loss_sum(x_MD, targets_M), torch.tensor(len(targets_M), device=x_MD.device)

    def loss_sum(self, x_MD: Tensor, targets_M: Tensor) -> Tensor:
        """Summed cross-entropy of what follows `x_MD`."""
        weight_VD = self.language_model.lm_head.weight
        numbers = LOGITS_AT_ONCE * (ROOM_BESIDE_A_GRADIENT if weight_VD.requires_grad else 1)
        return cross_entropy_sum(x_MD, weight_VD, targets_M, max(1, numbers // self.config.text.vocab_size))

    def logits(self, ids_BT: Tensor, pixels_N3SS: Tensor) -> Tensor:
        """Logits of every position, (B, T, V) float32, for rows padded on the right."""
        return self.language_model.logits(self.language_model(self.embed(ids_BT, pixels_N3SS)))

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32
    ) -> "MultimodalLLM":
        """The model of a directory that `save_pretrained` wrote, or of a hub repository with the same files.

        Strict: CheckpointError names what is missing, unexpected, or of another shape. `dtype` None keeps every tensor as
        its file has it, and on the CPU in its file: read when it is used. For int8 and the like see fast.py.
        """
        folder = locate(source)
        config, system = read_config(folder)
        surgery = read_surgery(folder)
        processor = ChatProcessor.load(folder, config.num_image_tokens, system)
        model = cls._empty(config)
        found = read_tensors(folder)
        if "packed" in surgery:
            empty_(model)
        else:
            refuse_integers(found, folder)
        rounding = next((kind for kind in surgery if kind in ROUNDINGS), None)
        exact = "language_model." if rounding else "" if "packed" in surgery else None  # rounded once, to integers
        tensors = {
            name: value.to(device, None if exact is not None and name.startswith(exact) else dtype)
            for name, value in found.items()
        }
        if config.text.tie_word_embeddings and "packed" not in surgery:
            tensors.setdefault("language_model.lm_head.weight", tensors.get(EMBEDDING, torch.empty(0)))
        load_strict_(model, tensors, folder)
        if "packed" in surgery:
            to_device_layout_(model)
            model.is_packed = True
            for parameter in model.parameters():
                parameter.data = parameter.data.to(device, dtype)
        else:
            model.language_model.tie_weights()
        if rounding:
            quantize_(model.language_model, rounding)
            model.rounding = rounding
            for parameter in model.language_model.parameters():
                parameter.data = parameter.data.to(device, dtype or torch.float32)
        if "lora" in surgery:
            model.lora = load_adapter_(model, folder)
        return model._finished(processor, folder)

    @classmethod
    def from_towers(
        cls,
        clip: str | Path,
        qwen: str | Path,
        *,
        features: str = "patch",
        system: str = DEFAULT_SYSTEM,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = torch.float32,
    ) -> "MultimodalLLM":
        """Two published models and a new projector (drawn by `seed`). Each source is a folder or a hub name.

        `dtype` None keeps every tensor as its file has it.
        """
        clip_folder, qwen_folder = locate(clip), locate(qwen)
        vision, text = read_tower_configs(clip_folder, qwen_folder)
        tokenizer = Tokenizer(qwen_folder)
        config = MultimodalConfig(vision, text, features, tokenizer.image_id)
        images = ImageProcessor.from_dict(read_json(clip_folder / "preprocessor_config.json"))
        model = cls._empty(config)
        load_tower_(model.vision_tower, vision_tensors(clip_folder, features), clip_folder, device, dtype)
        load_tower_(model.language_model, language_tensors(qwen_folder, text), qwen_folder, device, dtype)
        model.language_model.tie_weights()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = Projector(model.multi_modal_projector.linear_1.in_features, text.hidden_size)
        model.multi_modal_projector = fresh.to(device, dtype)
        return model._finished(ChatProcessor(tokenizer, images, config.num_image_tokens, system), qwen_folder)

    @classmethod
    def _empty(cls, config: MultimodalConfig) -> "MultimodalLLM":
        """The architecture without memory for its weights."""
        with torch.device("meta"), WithoutValues():
            return cls(config)

    def _finished(self, processor: ChatProcessor, where: Path) -> "MultimodalLLM":
        rows, side = self.config.text.vocab_size, self.config.vision.image_size
        if processor.tokenizer.vocab_size > rows:
            raise CheckpointError(
                f"{where}: tokenizer.json has {processor.tokenizer.vocab_size} tokens, but the model has {rows} rows; "
                "they belong to different models"
            )
        if processor.image_processor.size != side:
            raise CheckpointError(
                f"{where}: preprocessor_config.json makes pictures of {processor.image_processor.size} pixels, "
                f"but the vision tower takes {side}"
            )
        self.processor = processor
        return self.eval()

    def save_pretrained(self, folder: str | Path, *, replace: bool = False) -> None:
        """Writes the whole model as one directory, all of it or nothing; `replace` allows an old one to go."""
        with atomic_directory(folder, replace=replace) as temporary:
            self.write_files(temporary)

    def write_files(self, folder: Path) -> None:
        """Writes config.json, model.safetensors, mmllm.json, the processor's files and adapters into `folder`."""
        for name, tensors in self.tensor_files().items():
            save_file({n: value.contiguous() for n, value in tensors.items()}, folder / name, {"format": "pt"})
        self.write_small_files(folder)

    def tensor_files(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of the model's directory by file: the base in model.safetensors, adapters in theirs."""
        if self.precision is not None:
            raise ValueError(f"this model was made ready to answer in {self.precision} and cannot be written back")
        if any(layer.lora.is_merged for layer in adapters(self).values()):
            raise ValueError("the adapters are merged: unmerge_lora_ before saving, or they would count twice")
        tied = {"language_model.lm_head.weight"} if self.config.text.tie_word_embeddings else set()
        base = {n: value for n, value in self.state_dict().items() if n not in tied and ".lora_" not in n}
        return {"model.safetensors": base} | ({TENSOR_FILE: adapter_tensors(self)} if self.lora else {})

    def write_small_files(self, folder: Path) -> None:
        """Writes everything but the tensors."""
        if self.lora:
            write_adapter_config(folder, self, self.lora)
        ours = {
            "format_version": 1,
            "features": self.config.features,
            "system_prompt": self.processor.system,
            "surgery": [*filter(None, ("packed" * self.is_packed, self.rounding, "lora" * (self.lora is not None)))],
        }
        for name, content in (("config.json", self.config.to_dict()), ("mmllm.json", ours)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        self.processor.save(folder)


EMBEDDING = "language_model.model.embed_tokens.weight"


def read_config(folder: str | Path) -> tuple[MultimodalConfig, str]:
    """Configuration and system text of a model directory."""
    folder = Path(folder)
    ours = read_json(folder / "mmllm.json")
    if ours.get("format_version") != 1:
        raise CheckpointError(f"{folder / 'mmllm.json'}: written by a newer mmllm; update this one")
    return MultimodalConfig.from_dict(read_json(folder / "config.json")), ours.get("system_prompt", DEFAULT_SYSTEM)


def read_surgery(folder: Path) -> list[str]:
    """What was done to the model of a directory, in order: "packed" or one of ROUNDINGS, "lora"."""
    surgery = read_json(folder / "mmllm.json").get("surgery") or []
    if not set(surgery) <= {*ROUNDINGS, "packed", "lora"}:
        raise CheckpointError(f"{folder / 'mmllm.json'}: written by a newer mmllm; update this one")
    if ("lora" in surgery) != (folder / CONFIG_FILE).exists():
        raise CheckpointError(f"{folder}: mmllm.json and {CONFIG_FILE} disagree on whether there are adapters")
    return surgery


def read_tower_configs(clip_folder: Path, qwen_folder: Path) -> tuple[CLIPVisionConfig, Qwen2Config]:
    """Configurations of the two published models; refuses folders of other kinds by name."""
    configs = []
    for folder, kinds in ((clip_folder, ("clip", "clip_vision_model")), (qwen_folder, ("qwen2",))):
        config = read_json(folder / "config.json")
        if config.get("model_type") not in kinds:
            found = config.get("model_type")
            raise CheckpointError(
                f"{folder / 'config.json'}: model_type is {found!r}; {' or '.join(kinds)} is needed here"
            )
        if "quantization_config" in config:
            raise CheckpointError(f"{folder / 'config.json'}: a quantised model; use the plain one")
        configs.append(config)
    return CLIPVisionConfig.from_dict(configs[0]), Qwen2Config.from_dict(configs[1])


def vision_tensors(folder: Path, features: str) -> dict[str, Tensor]:
    """The tensors of a CLIP file that the vision tower needs: not the text tower's, not the old files' position ids."""
    kept = ("vision_model.", "visual_projection.") if features == "pooled" else ("vision_model.",)
    tensors = read_tensors(folder)
    return {name: v for name, v in tensors.items() if name.startswith(kept) and not name.endswith(".position_ids")}


def language_tensors(folder: Path, config: Qwen2Config) -> dict[str, Tensor]:
    """The tensors of a Qwen2 file; a tied head that the file holds all the same must be the embedding."""
    tensors = read_tensors(folder)
    embedding = tensors.get("model.embed_tokens.weight", torch.empty(0))
    if config.tie_word_embeddings and not torch.equal(tensors.setdefault("lm_head.weight", embedding), embedding):
        raise CheckpointError(
            f"{folder}: lm_head.weight differs from the embedding, but config.json says they are tied"
        )
    return tensors


def load_tower_(
    tower: nn.Module,
    tensors: dict[str, Tensor],
    where: Path,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> None:
    refuse_integers(tensors, where)
    load_strict_(tower, {name: value.to(device, dtype) for name, value in tensors.items()}, where)
