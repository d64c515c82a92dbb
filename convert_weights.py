"""Join a CLIP and a Qwen2.5 model, or make a model int8: `mmllm convert` from a checkout."""

from mmllm.commands.convert import main
from mmllm.errors import run

if __name__ == "__main__":
    run(main)
