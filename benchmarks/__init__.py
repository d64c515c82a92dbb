"""What this machine makes of mmllm and of other programs beside it: `python -m benchmarks`.

Reading order: train and generate say what is measured, runner how contestants take turns, transformers_peer and
llama_cpp_peer what the others do, rows and table what is kept and shown. memory, rehearse,
precision and gpu are smaller.
"""
