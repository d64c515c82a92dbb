"""llama.cpp, through its Python package, on the weights of one of our directories.

Needs the packages llama-cpp-python and gguf.
"""

import importlib.util
import time
from pathlib import Path

import torch

from benchmarks.random_model import prompt_ids
from benchmarks.runner import Work, speeds
from mmllm.models.gguf import write_language_model
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.memory import peak_memory

KINDS = ("Q8_0", "BF16", "Q4_0")


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))


def answers(spec: dict) -> tuple[dict, Work]:
    """llama.cpp through its Python package, the language model alone; its prompt is as long as ours, all of it text."""
    import llama_cpp
    import numpy as np

    file = write_gguf(Path(spec["model"]), spec["precision"])
    begin = time.perf_counter()
    threads = torch.get_num_threads()
    model = llama_cpp.Llama(
        str(file), n_ctx=1024, n_threads=threads, n_threads_batch=threads, n_gpu_layers=-1, verbose=False
    )
    load_s = time.perf_counter() - begin
    vocab = model.n_vocab()

    def best() -> int:
        logits = llama_cpp.llama_get_logits_ith(model._ctx.ctx, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(vocab,))))

    def turn(asked: dict) -> dict:
        ids = [token % (vocab - 20) for token in prompt_ids(spec, 0)]
        token_times: list[tuple[int, float]] = []
        model.reset()
        begin = time.perf_counter()
        model.eval(ids)
        for _ in range(asked["new_tokens"]):
            token = best()
            token_times.append((0, time.perf_counter()))
            model.eval([token])
        total = time.perf_counter() - begin
        return speeds(token_times, begin, total, 1) | {"peak_bytes": peak_memory(torch.device("cpu"))}

    return {"load_s": load_s, "weight_bytes": file.stat().st_size}, turn


def write_gguf(folder: Path, kind: str) -> Path:
    """The language model of a directory as a GGUF file of that kind beside it; kept when it is there already."""
    file = folder.parent / f"{folder.name}-{kind}.gguf"
    if not file.exists():
        temporary = file.with_suffix(".tmp")
        write_language_model(MultimodalLLM.from_pretrained(folder, dtype=None), temporary, kind)
        temporary.replace(file)
    return file
