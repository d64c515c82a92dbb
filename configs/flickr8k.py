r"""Real photographs on two cores: Flickr8k, from small backbones that its own training captions made.

    python -m examples.pretrain --data data/flickr8k/train/captions.jsonl --out backbones/flickr8k --bf16 \
        --guide-steps 1600 --word-loss 0.3 --clip-batch 128 --clip-steps 3000
    python -m mmllm train flickr8k
    python -m mmllm evaluate --model outputs/flickr8k/best_model --data data/flickr8k/dev/captions.jsonl \
        --constant --max-new-tokens 30 --num-beams 3

Each folder holds its images and captions.jsonl, lines of {"image": "1.jpg", "captions": ["...", ...]}.
"""

from mmllm.config import ExperimentConfig

config = ExperimentConfig()
config.experiment_name = "flickr8k"
config.model.clip = "backbones/flickr8k/clip"
config.model.qwen = "backbones/flickr8k/qwen"
config.data.train_data_path = "data/flickr8k/train/captions.jsonl"
config.data.val_data_path = "data/flickr8k/dev/captions.jsonl"
config.data.augment = True
config.data.batch_size = 16  # images, each with its five captions in one row
config.training.weight_decay = 0.05
config.training.log_steps = 50
config.training.stage1.epochs = 1
config.training.stage1.learning_rate = 2e-3
config.training.stage2.epochs = 6
config.training.stage2.learning_rate = 1e-3  # for weights that are small and new
