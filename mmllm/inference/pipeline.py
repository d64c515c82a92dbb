"""Images and questions in, text out: what a program uses."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mmllm.data.chat import Message, assistant, user
from mmllm.errors import UserError
from mmllm.inference.engine import Engine
from mmllm.inference.optimize import load_model
from mmllm.inference.request import Generated, GenerationConfig, Handle, Prompt
from mmllm.models.loading import read_info
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.console import stderr_rank0
from mmllm.runtime.device import choose_device
from mmllm.storage.hub import locate

# a path, encoded bytes, a data URI, a PIL image, or pixels (3, S, S) as `encode_image` returns them
ImageSource = str | Path | bytes | Image.Image | Tensor
STORE_BYTES = 256 * 2**20  # of what a pipeline keeps of images and prompts

DEFAULT_PROMPT = "Describe this image."


class MultimodalInferencePipeline:
    """Captions, answers about an image, and a conversation that remembers.

        pipeline = MultimodalInferencePipeline(MultimodalLLM.from_pretrained("outputs/demo/best_model"))
        pipeline.caption_image("cat.jpg")
        pipeline.answer_question("cat.jpg", "What color is the cat?")
        pipeline.chat("What do you see?", image="cat.jpg")
        pipeline.chat("And where is it?")

        [pipeline.answer_question("cat.jpg", question) for question in ("What is it?", "What color is it?")]

    What was computed for an image or an earlier turn is used again (STORE_BYTES of it): the weights must not change, or
    call `pipeline.engine.store.clear()`. Every method raises ImageError for an image that cannot be used and UserError for
    settings out of range. Only one thread at a time may use a pipeline.
    """

    def __init__(self, model: MultimodalLLM):
        if model.processor is None:
            raise UserError("the model has no processor; load it with MultimodalLLM.from_pretrained")
        self.model = model.eval()
        self.processor = model.processor
        self.reset()

    @cached_property
    def engine(self) -> Engine:
        """Made when it is first used: a server has one of its own."""
        return Engine(self.model, 1, store_bytes=STORE_BYTES)

    def caption_image(
        self, image: ImageSource, prompt: str = DEFAULT_PROMPT, config: GenerationConfig | None = None
    ) -> str:
        return self.answer_question(image, prompt, config)

    def answer_question(self, image: ImageSource, question: str, config: GenerationConfig | None = None) -> str:
        return self.generate(self.prompt([user(question, images=1)], [image]), config).text

    def encode_image(self, image: ImageSource) -> Tensor:
        """The pixels of an image, (3, S, S), for several questions: reading and resizing it is then done only once."""
        return image if isinstance(image, Tensor) else self.processor.image_processor(image)

    def chat(self, message: str, image: ImageSource | None = None, config: GenerationConfig | None = None) -> str:
        """The answer to the next message of one conversation. A turn that fails leaves the conversation unchanged."""
        new = [] if image is None else [self.encode_image(image)]
        messages, images = [*self.messages, user(message, images=len(new))], [*self.images, *new]
        answer = self.generate(self.prompt(messages, images), config)
        self.messages, self.images = [*messages, assistant(answer.text)], images
        return answer.text

    def reset(self) -> None:
        """Starts a new conversation."""
        self.messages: list[Message] = []
        self.images: list[Tensor] = []

    def prompt(self, messages: list[Message], images: list[ImageSource]) -> Prompt:
        """Messages and their images, in order, as input of the model."""
        pixels, side = [self.encode_image(image) for image in images], self.model.config.vision.image_size
        pixels_N3SS = torch.stack(pixels) if pixels else torch.zeros(0, 3, side, side)
        return Prompt(tuple(self.processor.encode_prompt(messages)), pixels_N3SS)

    def generate(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
        is_cancelled: Callable[[], bool] = bool,
    ) -> Generated:
        """The answer. `on_text` gets it in pieces of whole characters; `is_cancelled()` is asked after every token."""
        config = config or GenerationConfig()
        if self.engine.slots < config.num_beams:
            self.engine = Engine(self.model, config.num_beams, store_bytes=self.engine.store.limit_bytes)
        handle = self.engine.submit(Handle(prompt, config, on_text=on_text))
        try:
            self.engine.run([handle], is_cancelled)
        finally:
            if not handle.is_done:  # Ctrl-C: free the slot for the next question
                handle.on_text = None
                handle.cancel()
                self.engine.step()
        return handle.result()


def default_model(outputs: str | Path = "outputs") -> Path:
    """The best model of the run under `outputs` that was written last."""
    models = [path for path in Path(outputs).glob("*/best_model") if (path / "config.json").is_file()]
    if not models:
        raise UserError(
            f"no trained model under {outputs}; run `make demo`, or train one with `python -m mmllm train full`, "
            "or name one with --model"
        )
    return max(models, key=lambda path: (path.resolve() / "config.json").stat().st_mtime)


def load_pipeline(
    source: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str | None = None,
    dtype_on_cpu: str = "float32",
) -> MultimodalInferencePipeline:
    """A pipeline for a directory or hub name (None: `default_model`, named on stderr), on a device given by name.

    `dtype` is one of PRECISIONS; None means that of packed weights, else bfloat16 on CUDA, `dtype_on_cpu` on a CPU, and
    float32 elsewhere.
    """
    where = choose_device(device)
    if source is None:
        source = default_model()
        stderr_rank0(f"model: {source}, the last one trained here; --model names another")
    source = locate(source)
    if dtype is None:
        dtype = read_info(source).packed or {"cuda": "bfloat16", "cpu": dtype_on_cpu}.get(where.type, "float32")
    return MultimodalInferencePipeline(load_model(source, device=where, precision=dtype))
