"""easy-VQA on two cores: questions about drawn shapes, from small backbones that its own training answers made.

    python -m mmllm prepare easy-vqa --out data/easy_vqa
    python -m examples.pretrain --data data/easy_vqa/train.jsonl --image-dir data/easy_vqa/images \
        --out backbones/easy_vqa --image-size 64 --patch-size 8 --vision-width 128 --vision-layers 4 --vocab-size 400 \
        --text-width 128 --clip-steps 800 --qwen-steps 200
    python -m mmllm train easyvqa

Stage 2 trains the vision tower too: the backbones have seen few images. 97.8 % of the answers about new images are right.
"""

from mmllm.config import ExperimentConfig

config = ExperimentConfig()
config.experiment_name = "easyvqa"
config.model.clip = "backbones/easy_vqa/clip"
config.model.qwen = "backbones/easy_vqa/qwen"
config.data.train_data_path = "data/easy_vqa/train.jsonl"
config.data.val_data_path = "data/easy_vqa/val.jsonl"
config.data.image_dir = "data/easy_vqa/images"
config.data.batch_size = 16  # images, each with its questions in one row
config.data.max_val_samples = 1000
config.training.bf16 = False  # layers of width 128 gain nothing
config.training.weight_decay = 0.05
config.training.log_steps = 50
config.training.stage1.epochs = 1
config.training.stage1.learning_rate = 2e-3
config.training.stage2.train = ("projector", "language_model", "vision_tower")
config.training.stage2.epochs = 8
config.training.stage2.learning_rate = 1e-3  # for weights that are small and new
config.training.stage2.vision_learning_rate = 3e-4
