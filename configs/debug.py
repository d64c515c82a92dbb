"""Does my data train at all? 100 samples, one epoch a stage, batches of 4.

python -m mmllm train debug data.train_data_path=train.json data.val_data_path=val.json data.image_dir=images
"""

from mmllm.config import ExperimentConfig

config = ExperimentConfig()
config.experiment_name = "debug"
config.data.max_train_samples = 100
config.data.max_val_samples = 50
config.data.batch_size = 4
config.training.stage1.epochs = 1
config.training.stage2.epochs = 1
