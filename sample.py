"""Ask a trained model about images: `mmllm sample` from a checkout."""

from mmllm.__main__ import start

if __name__ == "__main__":
    start("sample")
