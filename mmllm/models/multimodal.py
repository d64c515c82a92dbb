"""The whole model: the features of an image become tokens between the words, and the language model reads both.

Nothing is added to the vocabulary. Qwen2.5 already has `<|image_pad|>`: it stands in the text once per visual token, and
`embed` puts the projector's outputs in its place. The methods that read and write files are functions of loading.py.

Paper: LLaVA, https://arxiv.org/abs/2304.08485; code: https://github.com/haotian-liu/LLaVA.

B rows, T tokens, N images in the whole batch, S their side, Q visual tokens per image, F features of each before the
projector, D hidden size, V vocabulary, M target positions, P places for an image where an image may have several.
"""

import torch
from torch import Tensor, nn

from mmllm.data.chat import IGNORED, ChatProcessor
from mmllm.models import loading
from mmllm.models.clip import CLIPVisionTower
from mmllm.models.config import MultimodalConfig
from mmllm.models.loss import cross_entropy_sum
from mmllm.models.projector import Projector
from mmllm.models.qwen import Qwen2
from mmllm.models.qwen3 import Qwen3
from mmllm.models.shared_prefix import attention_of, positions_of, predictor_positions
from mmllm.models.siglip import SigLIPVisionTower

TOWERS = {"clip_vision_model": CLIPVisionTower, "siglip_vision_model": SigLIPVisionTower}
LANGUAGE_MODELS = {"qwen2": Qwen2, "qwen3": Qwen3}
LOGITS_AT_ONCE = 2**23  # numbers in one piece of logits: 32 MiB in float32
LOGITS_ON_GPU = 2**27  # where small pieces waste time
TRAINED_HEAD_FACTOR = 8  # times as many where the head is trained: each piece makes a gradient of the whole head


class MultimodalLLM(nn.Module):
    """CLIP or SigLIP -> projector -> Qwen2.5 or Qwen3.

    `processor` turns conversations and images into inputs; it is None in a model that was built from a configuration.
    """

    def __init__(self, config: MultimodalConfig):
        super().__init__()
        self.config = config
        is_pooled = config.features == "pooled"
        self.vision_tower = TOWERS[config.vision.model_type](config.vision, with_projection=is_pooled)
        self.multi_modal_projector = Projector(config.feature_shape[1], config.text.hidden_size)
        self.language_model = LANGUAGE_MODELS[config.text.model_type](config.text)
        self.processor: ChatProcessor | None = None
        self.form = loading.ModelForm()
        self.planned_for: str | None = None  # the kind of device, where memory is planned for another one

    @property
    def device(self) -> torch.device:
        return self.multi_modal_projector.linear_1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.multi_modal_projector.linear_1.weight.dtype

    def vision_features(self, pixels_N3SS: Tensor) -> Tensor:
        """The vision tower's output, (N, Q, F). A frozen tower records no graph."""
        is_frozen = not any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen):
            pixels_N3SS = pixels_N3SS.to(self.device, self.dtype)
            is_patch = self.config.features == "patch"
            return self.vision_tower.patches(pixels_N3SS) if is_patch else self.vision_tower.pooled(pixels_N3SS)

    def encode_images(self, pixels_N3SS: Tensor) -> Tensor:
        """Visual tokens, (N, Q, D); N may be 0. Takes pixels, or the cached (N, Q, F) output of `vision_features`."""
        is_cached = pixels_N3SS.ndim == 3
        features_NQF = pixels_N3SS.to(self.device, self.dtype) if is_cached else self.vision_features(pixels_N3SS)
        return self.multi_modal_projector(features_NQF)

    def embed(self, ids_BT: Tensor, pixels_N3SS: Tensor, image_index_P: Tensor | None = None) -> Tensor:
        """Token embeddings (B, T, D), in which the visual tokens replace those of `image_token_id`, in order.

        `image_index_P`: the image of each place; None: the next one.
        """
        x_BTD = self.language_model.embed(ids_BT).to(self.dtype)  # a frozen embedding may be held in bfloat16
        image_NQD = self.encode_images(pixels_N3SS)
        if image_index_P is not None:
            image_NQD = image_NQD[image_index_P]
        is_image_BT = ids_BT == self.config.image_token_id
        places, features = int(is_image_BT.sum()), image_NQD.shape[0] * image_NQD.shape[1]
        if places != features:  # masked_scatter accepts too many features
            raise ValueError(
                f"{places} image places in the text for {len(image_NQD)} images of {image_NQD.shape[1]} tokens"
            )
        return x_BTD.masked_scatter(is_image_BT[:, :, None], image_NQD.to(x_BTD.dtype))

    def forward(
        self,
        ids_BT: Tensor,
        labels_BT: Tensor,
        pixels_N3SS: Tensor,
        segment_ids_BT: Tensor | None = None,
        image_index_P: Tensor | None = None,
        factors_M: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy (float32) of the target positions, each times its factor, and their number.

        `labels_BT[b, t]` is the token at t, predicted from t - 1, or IGNORED. Rows are padded on the right. With
        `segment_ids_BT` a row holds several conversations about one image, see shared_prefix.py.
        The caller divides: only it knows the number of targets in the whole optimizer step.
        """
        x_MD, targets_M = self.predictors(ids_BT, labels_BT, pixels_N3SS, segment_ids_BT, image_index_P)
        return self.loss_sum(x_MD, targets_M, factors_M), torch.tensor(len(targets_M), device=x_MD.device)

    def predictors(
        self,
        ids_BT: Tensor,
        labels_BT: Tensor,
        pixels_N3SS: Tensor,
        segment_ids_BT: Tensor | None = None,
        image_index_P: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The hidden states (M, D) that predict the targets, and the targets, row by row."""
        x_BTD = self.embed(ids_BT, pixels_N3SS, image_index_P)
        rows_M, columns_M = (labels_BT[:, 1:] != IGNORED).nonzero(as_tuple=True)
        targets_M = labels_BT[rows_M, columns_M + 1]
        positions_BT = attend_BTS = None
        if segment_ids_BT is not None:
            positions_BT, attend_BTS = positions_of(segment_ids_BT), attention_of(segment_ids_BT)
            columns_M = predictor_positions(segment_ids_BT)[rows_M, columns_M + 1]
        return self.language_model(x_BTD, positions_BT, attend_BTS=attend_BTS, keep=(rows_M, columns_M)), targets_M

    def loss_sum(self, x_MD: Tensor, targets_M: Tensor, factors_M: Tensor | None = None) -> Tensor:
        """Summed cross-entropy of `targets_M`, each predicted from its hidden state and times its factor."""
        weight_VD = self.language_model.lm_head.weight
        numbers = LOGITS_AT_ONCE * (TRAINED_HEAD_FACTOR if weight_VD.requires_grad else 1)
        numbers = LOGITS_ON_GPU if (self.planned_for or weight_VD.device.type) == "cuda" else numbers
        return cross_entropy_sum(x_MD, weight_VD, targets_M, max(1, numbers // self.config.text.vocab_size), factors_M)

    def target_logprobs(self, *inputs: Tensor | None) -> Tensor:
        """The log-probability of each target, (M,) float32, by the inputs of `predictors`."""
        pieces = [x.split(max(1, LOGITS_AT_ONCE // self.config.text.vocab_size)) for x in self.predictors(*inputs)]
        logits = self.language_model.logits
        found = [
            logits(x).log_softmax(-1).gather(1, targets[:, None])[:, 0] for x, targets in zip(*pieces, strict=True)
        ]
        return torch.cat(found)

    def logits(self, ids_BT: Tensor, pixels_N3SS: Tensor) -> Tensor:
        """Logits of every position, (B, T, V) float32, for rows padded on the right."""
        return self.language_model.logits(self.language_model(self.embed(ids_BT, pixels_N3SS)))

    # files: loading.py
    from_pretrained = classmethod(loading.from_pretrained)
    from_towers = classmethod(loading.from_towers)
    save_pretrained = loading.save_pretrained
    tensor_files = loading.tensor_files
    write_small_files = loading.write_small_files
