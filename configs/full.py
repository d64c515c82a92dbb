"""Everything: stage 1 aligns the projector, stage 2 trains projector and language model.

    torchrun --nproc_per_node=4 train.py configs/full.py data.train_data_path=train.json data.image_dir=images

49 patch tokens a picture. Rates and epochs follow LLaVA 1.5; for one GPU of 24 GB halve `data.batch_size` and double
`gradient_accumulation_steps`: the gradient is the same. Scores on COCO: not measured.
"""

from mmllm.config import ExperimentConfig

config = ExperimentConfig()
config.experiment_name = "full"
config.model.features = "patch"
config.data.batch_size = 32
config.training.stage1.epochs = 3
config.training.stage1.learning_rate = 1e-3  # a new projector, nothing else moves
config.training.stage1.gradient_accumulation_steps = 8  # 256 samples a step
config.training.stage2.epochs = 2
config.training.stage2.learning_rate = 2e-5
config.training.stage2.gradient_accumulation_steps = 4  # 128 samples a step
