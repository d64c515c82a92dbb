"""The network. Read clip.py, qwen.py and projector.py, then multimodal.py, which joins them; siglip.py and qwen3.py can take
the places of the first two.

config.py has the sizes; loss.py, shared_prefix.py and kv_cache.py make training and decoding cheap. published.py reads the
files of others, loading.py reads and writes ours. clip_text.py is for `mmllm verify` alone.
"""
