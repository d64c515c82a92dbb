"""Captions from true CLIP embeddings, on two cores: a small language model, five folds of a few hundred images.

    python -m examples.crossval --features clip_embeddings.npz --captions captions.jsonl

With so few images only the projector is trained, on many noisy copies of each.
"""

from mmllm.config import ExperimentConfig

config = ExperimentConfig()
config.model.features = "pooled"
config.model.system_prompt = ""  # fewer tokens in front of every caption
config.data.batch_size = 16  # images, with all their captions
config.data.num_workers = 0
config.training.bf16 = False
config.training.weight_decay = 0.1
config.training.adam_beta2 = 0.98
config.training.warmup_ratio = 0.05
config.training.log_steps = 50
config.training.num_sample_captions = 2
config.training.keep_checkpoints = 1
config.training.stage1.epochs = 1  # over 20 copies of each image, --copies
config.training.stage1.learning_rate = 2e-3
config.training.stage2.epochs = 0  # the language model loses by it
