"""For a card of 8 to 16 GB: LoRA on an int8 language model, 2 + 1 epochs.

    python train.py configs/small.py data.train_data_path=train.json data.image_dir=images

128 samples a step from micro-batches of 8. Rates as in torchtune's Qwen2.5 recipes for LoRA.
"""

from mmllm.config import ExperimentConfig

config = ExperimentConfig()
config.experiment_name = "small"
config.model.use_lora = True
config.model.load_in_8bit = True
config.data.batch_size = 8
config.training.gradient_accumulation_steps = 16
config.training.gradient_checkpointing = True
config.training.stage1.epochs = 2
config.training.stage2.epochs = 1
config.training.stage2.learning_rate = 2e-4
config.training.stage2.projector_learning_rate = 2e-5
