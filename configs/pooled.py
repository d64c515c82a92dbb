"""The one-token model: CLIP's image embedding of 512 numbers stands for the whole image. As full.py otherwise.

    python -m mmllm train pooled data.train_data_path=train.json data.val_data_path=val.json data.image_dir=images

Cheaper (1 visual token instead of 49) and enough for captions; it cannot say where things are. Scores: not measured.
"""

from pathlib import Path

from mmllm.config import load

config = load(Path(__file__).with_name("full.py"))
config.experiment_name = "pooled"
config.model.features = "pooled"
