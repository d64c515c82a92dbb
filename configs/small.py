"""For a card of 8 to 16 GB: low-rank adapters on an int8 language model, 2 + 1 epochs.

    python -m mmllm train small data.train_data_path=train.json data.val_data_path=val.json data.image_dir=images

Rates as in torchtune's recipes for Qwen2.5 with LoRA. Scores, and memory on a card: not measured.
"""

from mmllm.config import ExperimentConfig

config = ExperimentConfig()
config.experiment_name = "small"
config.model.use_lora = True
config.model.load_in_8bit = True
config.data.batch_size = 8
config.training.gradient_accumulation_steps = 16  # 128 samples a step, as full.py's stage 2
config.training.gradient_checkpointing = True
config.training.stage1.epochs = 2
config.training.stage2.epochs = 1
config.training.stage2.learning_rate = 2e-4  # ten times that of all weights: adapters begin at zero
config.training.stage2.projector_learning_rate = 2e-5
