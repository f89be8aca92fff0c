"""The longest answers that a device can train on, and the settings that reach them (``grpo-fast plan --longest``).

What is trained (all weights, LoRA adapters, LoRA adapters of 4-bit weights) decides how good the result can be, so each
is searched separately. Within one, every switch only costs time: the search starts with all of them, and then picks for
one choice after another the fastest setting that keeps the answers about as long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.memory.plan import LONGEST, MemoryPlan, plan_memory
from grpo_fast.memory.switches import Changes, Untraced, merged
from grpo_fast.memory.trace import Tracer
from grpo_fast.model.loading import max_positions

# What can be trained, the most capable first.
TRAINED: dict[str, Changes] = {
    "all weights": {"use_peft": False, "load_in_4bit": False},
    "LoRA": {"use_peft": True, "load_in_4bit": False},
    "QLoRA (4-bit)": {"use_peft": True, "load_in_4bit": True},
}
# The same with frozen layers in host memory: every sampled token waits for the bus, so these are taken if nothing else
# fits.
HOST = {
    "LoRA, layers on host": TRAINED["LoRA"],
    "QLoRA, layers on host": TRAINED["QLoRA (4-bit)"],
}
# Shares of the layers that wait in host memory, the most saving first.
HOST_SHARES = (1.0, 0.75, 0.5, 0.25)
# Choices that only cost time: the settings of each, from the one that saves the most memory to the fastest.
CHOICES: tuple[tuple[Changes, ...], ...] = (
    ({"optim_offload": True, "optim": "adamw_torch_fused"}, {"optim": "adamw_torch_8bit"}, {}),
    ({"activation_offloading": True, "gradient_checkpointing": True}, {"gradient_checkpointing": True}, {}),
    ({"max_buffer_mib": 128}, {}),
    ({"tiled_mlp": True}, {}),
)
# A faster setting is taken if answers stay longer than this share of the longest.
KEPT = 0.98
# The number of completions that are sampled at once is searched among these; the more, the faster.
AT_ONCE = (64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Longest:
    """The longest answers with one way to train.

    Attributes:
        trained: a key of `TRAINED` or `HOST`.
        answer: tokens of the longest answer; 0 if not even one token fits.
        by_memory: what `answer` would be if the model had unlimited positions.
        switches: the fields that the search set.
        config: the run at `answer`; None if nothing fits.
        plan: its memory; None if nothing fits.
    """

    trained: str
    answer: int = 0
    by_memory: int = 0
    switches: Changes | None = None
    config: GRPOConfig | None = None
    plan: MemoryPlan | None = None


def longest_answers(
    config: GRPOConfig, tracer: Tracer, vram: int, prompt_tokens: int, tell: Callable[[str], Any] = lambda text: None
) -> list[Longest]:
    """The longest answers for each way to train, in the order of `TRAINED` and `HOST`.

    Args:
        config: the run; its switches are replaced, its other fields stay.
        vram: bytes of the device.
        prompt_tokens: length of the longest prompt.
        tell: is called with what is being searched.

    Raises:
        UserError: the model cannot be built or traced.
    """
    found = []
    for trained, changes in (TRAINED if config.use_vllm else TRAINED | HOST).items():
        tell(trained)
        search = _Search(replace_all(config, changes), tracer, vram, prompt_tokens)
        found.append(search.longest(trained, on_host=trained in HOST))
    return found


def best(found: list[Longest]) -> Longest:
    """The most capable way to train of those whose answers are about as long as the longest.

    Layers stay in host memory only if nothing fits otherwise.
    """
    on_device = [each for each in found if each.trained in TRAINED]
    ways = on_device if any(each.answer for each in on_device) else found
    longest = max(each.answer for each in ways)
    return next(each for each in ways if each.answer >= KEPT * longest)


def replace_all(config: GRPOConfig, changes: Changes) -> GRPOConfig:
    """`config` with `changes` and all other switches off; only the combination has to be valid.

    On a GPU the weights have 16 bits, as is usual where memory is short.
    """
    precision = {} if config.use_cpu else {"dtype": "bfloat16", "bf16": False}
    off = {"optim_offload": False, "activation_offloading": False, "tiled_mlp": False, "gradient_checkpointing": False}
    return replace(config, **precision, **off, layers_on_host=0, **changes)


class _Search:
    """Searches the answers of one way to train; lengths are in tokens."""

    def __init__(self, config: GRPOConfig, tracer: Tracer, vram: int, prompt_tokens: int):
        self.config, self.tracer, self.vram, self.prompt_tokens = config, tracer, vram, prompt_tokens
        positions = max_positions(tracer.model_config)
        self.most = max(positions - prompt_tokens, 0) if positions else LONGEST

    def longest(self, trained: str, on_host: bool) -> Longest:
        listed = [self.host_choice(), *CHOICES] if on_host else CHOICES
        choices = [[setting for setting in choice if self.allowed(setting)] for choice in listed]
        taken = [choice[0] for choice in choices]
        by_memory = self.answer(merged(taken), LONGEST)
        if not by_memory:
            return Longest(trained)
        wanted = KEPT * min(by_memory, self.most)
        for index, choice in enumerate(choices):
            for setting in reversed(choice[1:]):
                faster = [*taken[:index], setting, *taken[index + 1 :]]
                if self.answer(merged(faster), self.most) >= wanted:
                    taken = faster
                    break
        switches = merged(taken)
        answer = self.answer(switches, self.most)
        config = self.fastest(switches, answer)
        return Longest(trained, answer, by_memory, switches, config, self.plan(config, interpolated=False))

    def host_choice(self) -> list[Changes]:
        layers = self.tracer.model_config.get_text_config().num_hidden_layers
        counts = (max(round(share * layers), 1) for share in HOST_SHARES)
        return [{"layers_on_host": count, "gradient_checkpointing": True} for count in counts]

    def allowed(self, setting: Changes) -> bool:
        """Whether the device and the model permit a setting."""
        if self.config.use_cpu and {"optim_offload", "activation_offloading"} & {*setting}:
            return False
        try:
            self.plan(self.at(setting, 64, 1))
        except UserError:
            # Not every MLP can be tiled, for example.
            return not setting
        return True

    def at(self, switches: Changes, answer: int, at_once: int) -> GRPOConfig:
        """The run with answers of `answer` tokens: one in a microbatch, and `at_once` of them sampled at once."""
        sequence = self.prompt_tokens + answer
        lengths = {
            "max_completion_length": answer,
            "max_tokens_per_microbatch": sequence,
            "max_tokens_per_generation_batch": at_once * sequence,
        }
        return replace(self.config, **switches, **lengths)

    def plan(self, config: GRPOConfig, tracer: Tracer | None = None, interpolated: bool = True) -> MemoryPlan:
        return plan_memory(config, self.tracer.model_config, self.prompt_tokens, tracer or self.tracer, interpolated)

    def fits(self, config: GRPOConfig) -> bool:
        # A plan that is too large without activations need not be traced.
        return all(self.plan(config, tracer).fits(self.vram) for tracer in (Untraced(self.tracer), self.tracer))

    def answer(self, switches: Changes, most: int) -> int:
        """The longest answer, at most `most`; 0 if none fits. One completion is sampled at a time."""
        low, high = 0, most
        if self.fits(self.at(switches, most, 1)):
            return most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(self.at(switches, middle, 1)) else (low, middle)
        return low

    def fastest(self, switches: Changes, answer: int) -> GRPOConfig:
        """The run that samples the most completions at once of those that fit."""
        fewest = self.at(switches, answer, 1)
        samples = (self.at(switches, answer, n) for n in AT_ONCE if n <= self.config.generation_batch_size)
        return next(filter(self.fits, samples), fewest)
