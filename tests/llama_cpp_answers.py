"""llama.cpp's own multimodal library, through the package llama-cpp-python: greedy answers of a pair of GGUF files."""

import ctypes

import numpy as np
from PIL import Image

MARK = "<__media__>"  # where llama.cpp puts the image


class LlamaCpp:
    """The model that `mmllm convert --gguf` wrote into `folder`."""

    def __init__(self, folder, threads: int = 1):
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self.lib, self.mtmd = llama_cpp, mtmd_cpp
        self.llama = llama_cpp.Llama(
            str(folder / "model.gguf"),
            n_ctx=1024,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
            flash_attn=False,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
        )
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu, params.n_threads, params.warmup, params.print_timings = False, threads, False, False
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.vision = mtmd_cpp.mtmd_init_from_file(str(folder / "mmproj.gguf").encode(), self.llama.model, params)
        assert self.vision, "mmproj.gguf was not loaded"

    def answer(self, text: str, image: Image.Image, new_tokens: int) -> tuple[np.ndarray, list[int]]:
        """Logits (V) after the prompt `text`, which holds MARK, and the greedy ids that follow."""
        pixels = (ctypes.c_uint8 * (3 * image.width * image.height)).from_buffer_copy(image.convert("RGB").tobytes())
        bitmap = self.mtmd.mtmd_bitmap_init(image.width, image.height, pixels)
        content = self.mtmd.mtmd_input_text()
        encoded = text.encode()
        content.text, content.text_len = encoded, len(encoded)
        content.add_special, content.parse_special = False, True
        chunks = self.mtmd.mtmd_input_chunks_init()
        bitmaps = (self.mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        assert self.mtmd.mtmd_tokenize(self.vision, chunks, ctypes.byref(content), bitmaps, 1) == 0
        self.llama._ctx.kv_cache_clear()
        context, past = self.llama._ctx.ctx, self.lib.llama_pos(0)
        result = self.mtmd.mtmd_helper_eval_chunks(self.vision, context, chunks, 0, 0, 512, True, ctypes.byref(past))
        assert result == 0, "the prompt was not read"
        first, ids = self._logits(), []
        logits = first
        for _ in range(new_tokens):
            ids.append(int(logits.argmax()))
            token = (self.lib.llama_token * 1)(ids[-1])
            assert self.lib.llama_decode(context, self.lib.llama_batch_get_one(token, 1)) == 0
            logits = self._logits()
        return first, ids

    def _logits(self) -> np.ndarray:
        values = self.lib.llama_get_logits_ith(self.llama._ctx.ctx, -1)
        return np.ctypeslib.as_array(values, shape=(self.llama.n_vocab(),)).copy()
