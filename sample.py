"""Ask a trained model about images: `mmllm sample` from a checkout."""

from mmllm.commands.sample import main
from mmllm.errors import run

if __name__ == "__main__":
    run(main)
