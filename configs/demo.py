"""The drawn world of `make demo`, which draws the images and trains the backbones first: minutes on two cores.

    python -m examples.shapes demo

Many small steps train faster here than few large ones.
"""

from mmllm.config import ExperimentConfig

config = ExperimentConfig()
config.experiment_name = "demo"
config.model.pretrained = "outputs/shapes/start"
config.data.train_data_path = "outputs/shapes/data/train.json"
config.data.val_data_path = "outputs/shapes/data/val.json"
config.data.batch_size = 8  # images, each with all its questions in one row
config.data.max_val_samples = 160
config.training.bf16 = False  # layers of width 128 gain nothing
config.training.weight_decay = 0.02
config.training.adam_beta2 = 0.98
config.training.log_steps = 25
config.training.stage1.epochs = 1
config.training.stage1.batch_size = 16
config.training.stage1.learning_rate = 3e-3
config.training.stage2.epochs = 4
config.training.stage2.learning_rate = 1.5e-3
