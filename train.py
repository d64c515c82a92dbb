"""Train a model in two stages: `mmllm train` from a checkout."""

from mmllm.__main__ import start

if __name__ == "__main__":
    start("train")
