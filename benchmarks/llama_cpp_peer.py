"""llama.cpp, through its Python package, on the weights of one of our directories.

A GGUF file needs no conversion script: it is a list of named tensors after a few numbers, and a vocabulary whose words do
not matter to speed. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Needs the packages
llama-cpp-python and gguf, which are imported only here.
"""

import importlib.util
import time
from pathlib import Path

import torch

from benchmarks.random_model import prompt_ids
from benchmarks.runner import Work, speeds
from examples.pretrain.folders import CONTROL_TOKENS
from mmllm.models.config import MultimodalConfig
from mmllm.runtime.files import read_json
from mmllm.runtime.memory import peak_memory
from mmllm.storage.weights import read_tensors

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
    import gguf

    file = folder.parent / f"{folder.name}-{kind}.gguf"
    if file.exists():
        return file
    text = MultimodalConfig.from_dict(read_json(folder / "config.json")).text
    temporary = file.with_suffix(".tmp")
    writer = gguf.GGUFWriter(str(temporary), "qwen2")
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    write_vocabulary(writer, folder, text.vocab_size)
    tensor_type = gguf.GGMLQuantizationType[kind]
    for name, value in read_tensors(folder).items():
        if name.startswith("language_model."):
            array = value.float().numpy()
            if array.ndim == 1:
                writer.add_tensor(gguf_name(name), array)
            else:
                writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, tensor_type), raw_dtype=tensor_type)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(file)
    return file


def write_vocabulary(writer, folder: Path, rows: int) -> None:
    vocab = read_json(folder / "tokenizer.json")["model"]["vocab"]
    words = dict.fromkeys(sorted(vocab, key=vocab.get)) | dict.fromkeys(CONTROL_TOKENS)
    tokens = [*words, *(f"<unused {i}>" for i in range(rows - len(words)))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * rows)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(vocab))
    writer.add_eos_token_id(len(vocab) + 2)


GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """`language_model.model.layers.3.mlp.up_proj.weight` as `blk.3.ffn_up.weight`."""
    path, _, kind = name.removeprefix("language_model.model.").rpartition(".")
    if path.startswith("layers."):
        _, number, layer = path.split(".", 2)
        return f"blk.{number}.{GGUF_NAMES[layer]}.{kind}"
    return f"{GGUF_NAMES[path]}.{kind}"
