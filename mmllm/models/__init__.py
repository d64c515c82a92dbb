"""The network. Read clip.py, qwen.py and projector.py, then multimodal.py, which joins them.

config.py has the sizes; loss.py, shared_prefix.py and kv_cache.py make training and decoding cheap; loading.py reads and
writes files.
"""
