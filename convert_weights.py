"""Join a CLIP and a Qwen2.5 model, or make a model int8: `mmllm convert` from a checkout."""

from mmllm.__main__ import start

if __name__ == "__main__":
    start("convert")
