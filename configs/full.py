"""Everything: stage 1 aligns the projector, stage 2 trains projector and language model.

    python -m mmllm train full data.train_data_path=train.json data.val_data_path=val.json data.image_dir=images

49 patch tokens an image; rates, epochs and samples a step are those of LLaVA 1.5. For a smaller card set
`data.batch_size=8` and four times the accumulation of each stage: the gradient is the same. A sample is an image with
all its captions or questions, in one row. Scores: not measured.
"""

from mmllm.config import ExperimentConfig

config = ExperimentConfig()
config.experiment_name = "full"
config.model.features = "patch"
config.data.batch_size = 32
config.training.stage1.epochs = 3
config.training.stage1.learning_rate = 1e-3  # a new projector, nothing else moves
config.training.stage1.gradient_accumulation_steps = 8  # 256 samples a step on one device; on four: 2
config.training.stage2.epochs = 2
config.training.stage2.learning_rate = 2e-5
config.training.stage2.gradient_accumulation_steps = 4  # 128 samples a step on one device; on four: 1
