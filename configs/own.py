"""Your own images, 500 to 50,000 of them: adapters, small batches, an end where validation stops improving.

    python -m mmllm train own data.train_data_path=train.json data.image_dir=images data.val_fraction=0.1
    python -m mmllm train own --dry-run device=cuda:8GB data.train_data_path=train.json data.val_fraction=0.1

One epoch of 500 images is 31 steps of 16, one of 50,000 is 3,125: the epochs are for the small end, and early stop ends
the last stage of the large end sooner. With the published weights: not measured. docs/training.md says what was.
"""

from mmllm.config import ExperimentConfig

config = ExperimentConfig()
config.experiment_name = "own"
config.model.use_lora = True  # trains 2.2 million weights of the language model instead of 494 million
config.data.batch_size = 16  # images, with all their texts; full.py's 128 would leave 500 images 4 steps an epoch
config.training.weight_decay = 0.05
config.training.early_stop = 2  # epochs without a lower validation loss; best_model is the best one, not the last
config.training.stage1.epochs = 5  # a new projector, nothing else moves: 2 at 1e-3 leave it half trained
config.training.stage1.learning_rate = 2e-3
config.training.stage2.epochs = 8
config.training.stage2.learning_rate = 2e-4  # as in small.py; small models from scratch want 1e-3
config.training.stage2.projector_learning_rate = 1e-4  # and 1e-3 here
