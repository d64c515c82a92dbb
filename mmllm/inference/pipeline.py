"""Pictures and questions in, text out: the model as a person uses it.

Next: sample.py and server.py, which only put this on a command line and on the network.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mmllm.data.chat import Message, assistant, user
from mmllm.errors import UserError
from mmllm.inference.engine import Engine
from mmllm.inference.generate import drive
from mmllm.inference.optimize import load_model
from mmllm.inference.request import EncodedImage, Generated, Prompt
from mmllm.inference.sampling import GenerationConfig
from mmllm.kernels import cpu as kernels
from mmllm.models.loading import read_info
from mmllm.models.multimodal import MultimodalLLM
from mmllm.runtime.console import stderr_rank0
from mmllm.runtime.device import choose_device
from mmllm.storage.weights import locate

# a path, encoded bytes, a data URI, a PIL image, or what `encode_image` gave
ImageSource = str | Path | bytes | Image.Image | EncodedImage

DEFAULT_PROMPT = "Describe this image."


class MultimodalInferencePipeline:
    """Captions, answers about a picture, and a conversation that remembers.

        pipeline = MultimodalInferencePipeline(MultimodalLLM.from_pretrained("outputs/demo/best_model"))
        pipeline.caption_image("cat.jpg")
        pipeline.answer_question("cat.jpg", "What color is the cat?")
        pipeline.chat("What do you see?", image="cat.jpg")
        pipeline.chat("And where is it?")

        cat = pipeline.encode_image("cat.jpg")  # looked at once, asked about many times
        [pipeline.answer_question(cat, question) for question in ("What is it?", "What color is it?")]

    Every method raises ImageError for a picture that cannot be used and UserError for settings out of range. One thread
    at a time may use a pipeline. `is_compiled` compiles the decoding step: the first answer takes minutes, the others less.
    """

    def __init__(self, model: MultimodalLLM, *, is_compiled: bool = False):
        if model.processor is None:
            raise UserError("the model has no processor; load it with MultimodalLLM.from_pretrained")
        self.model = model.eval()
        self.processor = model.processor
        self.is_compiled = is_compiled
        self.engine = Engine(model, 1, is_compiled=is_compiled)
        self.reset()

    def caption_image(
        self, image: ImageSource, prompt: str = DEFAULT_PROMPT, config: GenerationConfig | None = None
    ) -> str:
        return self.answer_question(image, prompt, config)

    def answer_question(self, image: ImageSource, question: str, config: GenerationConfig | None = None) -> str:
        return self.generate(self.prompt([user(question, images=1)], [image]), config).text

    def encode_image(self, image: ImageSource) -> EncodedImage:
        """The picture, looked at once; it may take the place of the picture in every method."""
        if isinstance(image, EncodedImage):
            return image
        pixels_3SS = self.processor.image_processor(image)
        ids = self.processor.encode_prompt([user("?", images=1)])
        end = len(ids) - ids[::-1].index(self.processor.tokenizer.image_id) + 1  # with <|vision_end|>
        return EncodedImage(pixels_3SS, self.engine.read(tuple(ids[:end]), pixels_3SS[None]))

    def chat(self, message: str, image: ImageSource | None = None, config: GenerationConfig | None = None) -> str:
        """The answer to the next message of one conversation; a turn that fails leaves the conversation as it was."""
        images = [] if image is None else [self._read(image)]
        messages = [*self.messages, user(message, images=len(images))]
        pictures = [*self.pictures, *images]
        answer = self.generate(self.prompt(messages, pictures), config)
        self.messages, self.pictures = [*messages, assistant(answer.text)], pictures
        return answer.text

    def reset(self) -> None:
        """Begins a new conversation."""
        self.messages: list[Message] = []
        self.pictures: list[Tensor | EncodedImage] = []

    def prompt(self, messages: list[Message], images: list[ImageSource | Tensor]) -> Prompt:
        """Messages and their pictures, in order, as the model reads them; a Tensor is pixels (3, S, S) already."""
        pictures = [self._read(image) for image in images]
        pixels = [picture.pixels if isinstance(picture, EncodedImage) else picture for picture in pictures]
        side = self.model.config.vision.image_size
        pixels_N3SS = torch.stack(pixels) if pixels else torch.zeros(0, 3, side, side)
        prefix = pictures[0].prefix if pictures and isinstance(pictures[0], EncodedImage) else None
        return Prompt(tuple(self.processor.encode_prompt(messages)), pixels_N3SS, prefix)

    def _read(self, image: ImageSource | Tensor) -> Tensor | EncodedImage:
        return image if isinstance(image, Tensor | EncodedImage) else self.processor.image_processor(image)

    def generate(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Generated:
        """The answer; `on_text` hears it piece by piece, each of whole characters, `cancelled` may end it early."""
        config = config or GenerationConfig()
        if self.engine.slots < config.num_beams:
            self.engine = Engine(self.model, config.num_beams, is_compiled=self.is_compiled)
        handle = self.engine.submit(prompt, config, on_text=on_text)
        try:
            drive(self.engine, [handle], cancelled)
        finally:
            if not handle.is_done:  # Ctrl-C: the next question finds the slot free
                handle.on_text = None
                handle.cancel()
                self.engine.step()
        return handle.result()


def default_model(outputs: str | Path = "outputs") -> Path:
    """The newest trained model under `outputs`: the best of the run that was written to last."""
    models = [path for path in Path(outputs).glob("*/best_model") if (path / "config.json").is_file()]
    if not models:
        raise UserError(
            f"no trained model under {outputs}; run `make demo`, or train one with `python train.py configs/full.py`, "
            "or name one with --model"
        )
    return max(models, key=lambda path: (path.resolve() / "config.json").stat().st_mtime)


def load_pipeline(
    source: str | Path | None = None, *, device: str = "auto", dtype: str | None = None, is_compiled: bool = False
) -> MultimodalInferencePipeline:
    """A pipeline for `source` (directory or hub name; None: the newest trained model), on the device by name.

    `dtype`, one of those in fast.py, None: int8 for int8 weights, else bfloat16 on CUDA and float32 elsewhere.
    """
    place = choose_device(device)
    source = locate(source or default_model())
    if dtype is None:
        others = "bfloat16" if place.type == "cuda" else "float32"
        dtype = "int8" if read_info(source).is_packed else others
    model = load_model(source, device=place, precision=dtype)
    if is_compiled and place.type == "cpu" and dtype != "float32" and kernels.native():
        stderr_rank0("the step is not compiled: on a CPU it is slower than our kernels by themselves")
        is_compiled = False
    return MultimodalInferencePipeline(model, is_compiled=is_compiled)
