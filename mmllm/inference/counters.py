"""What an engine has done since it was made, and how fast: for a monitor, and to bound the next step."""

import math
import time
from dataclasses import dataclass, field

FORGET = 0.9  # a slow step makes the next ones short at once; they grow by a tenth
MIN_TOKENS, FIRST_TOKENS, MAX_TOKENS = 8, 32, 512  # of prompts in one step; FIRST: before a step was measured


@dataclass
class Counters:
    """Sums over all steps. A step that both reads prompts and decodes counts to both, by its rows."""

    steps: int = 0
    last_step: float = field(default_factory=time.monotonic)  # when it ended
    prompt_tokens: int = 0  # read
    reused_tokens: int = 0  # of prompts, taken from the store
    new_tokens: int = 0  # decoded
    prefill_s: float = 0.0
    decode_s: float = 0.0
    token_s: float | None = None  # what a token of a step that reads prompts takes, at most; None before the first

    def add(self, seconds: float, decoded: int, read: int, cost: int) -> None:
        """Adds a step that decoded `decoded` rows and read `read` tokens of prompts, which with images cost `cost`."""
        if cost and decoded + cost >= MIN_TOKENS:  # fewer take as long: the weights are read
            self.token_s = max(seconds / (decoded + cost), FORGET * (self.token_s or 0))
        prefill_s = seconds * cost / max(1, decoded + cost)
        self.prefill_s += prefill_s
        self.decode_s += seconds - prefill_s
        self.prompt_tokens += read
        self.new_tokens += decoded
        self.steps += 1
        self.last_step = time.monotonic()

    def budget(self, step_s: float, rows: int) -> int:
        """How many tokens of prompts a step of `step_s` seconds can read beside `rows` rows."""
        if step_s == math.inf:
            return MAX_TOKENS
        tokens = FIRST_TOKENS if self.token_s is None else int(step_s / self.token_s) - rows
        return min(MAX_TOKENS, max(MIN_TOKENS, tokens))
