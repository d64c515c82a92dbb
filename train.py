"""Train a model in two stages: `mmllm train` from a checkout."""

from mmllm.commands.train import main
from mmllm.errors import run

if __name__ == "__main__":
    run(main)
