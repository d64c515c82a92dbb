"""The network: clip.py, qwen.py, projector.py, and multimodal.py that joins them."""
