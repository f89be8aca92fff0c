"""A reward model: a sequence classifier of transformers with one output, which reads prompt and completion."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grpo_fast.errors import UserError, import_extra, one_line
from grpo_fast.rewards.base import RewardFunction

DTYPES = ("auto", "float32", "bfloat16", "float16")


def reward_model(
    model: str, dtype: str = "auto", device: str | None = None, batch_size: int = 8, tokenizer: Any = None
) -> RewardFunction:
    """The scores of a trained reward model, as in TRL where a model's name is among ``reward_funcs``.

    It is loaded by ``AutoModelForSequenceClassification`` with one label, from safetensors and without code of its own.

    Args:
        model: a folder or hub name.
        dtype: precision of its weights; ``auto`` is that of its files.
        device: where it computes, such as ``cuda:1`` or ``cpu`` (default: where the policy is).
        batch_size: completions in one forward.
        tokenizer: None loads the one beside the model.

    Raises:
        UserError: the model cannot be loaded, has no head for one score, or an argument is not allowed.
    """
    if dtype not in DTYPES:
        raise UserError(f"reward_model: dtype={dtype!r} is not allowed: it must be one of {', '.join(DTYPES)}")
    if batch_size < 1:
        raise UserError(f"reward_model: batch_size={batch_size} is not allowed: it must be at least 1")
    try:
        place = None if device is None else torch.device(device)
    except RuntimeError as error:
        raise UserError(f"reward_model: device={device!r} is not allowed: {one_line(error)}") from None
    transformers = import_extra("transformers", "train")
    try:
        loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=1, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        raise UserError(f"the reward model {model!r} cannot be loaded: {one_line(error)}") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{model!r} is not a reward model: its files lack {', '.join(missing)}, which would be random")
    return RewardClassifier(loaded, tokenizer, place, batch_size)


class RewardClassifier:
    """The reward function that a sequence classifier with one output is.

    Args:
        model: a module whose output has ``logits`` ``[B, 1]``. On the CPU, it is moved to the policy's device at the
            first call, unless `device` says where; a model that a script has put on another device stays there.
        tokenizer: its tokenizer; None loads the one beside the model.
        device: where it computes.
        batch_size: completions in one forward.

    Raises:
        UserError: there is no tokenizer, or the model has more than one output.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, device: torch.device | None = None, batch_size: int = 8
    ):
        config: Any = getattr(model, "config", None)
        source = getattr(config, "_name_or_path", "")
        name = source or type(model).__name__
        labels = getattr(config, "num_labels", 1)
        if labels != 1:
            raise UserError(f"the reward model {name!r} has {labels} outputs; load it with num_labels=1")
        if tokenizer is None and not source:
            raise UserError(
                f"the reward model {name} does not say where its tokenizer is; pass reward_processing_classes"
            )
        if tokenizer is None:
            transformers = import_extra("transformers", "train")
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            except Exception as error:
                raise UserError(f"the reward model {name!r} has no tokenizer: {one_line(error)}") from None
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise UserError(f"the tokenizer of the reward model {name!r} has neither a pad nor an end-of-text token")
        if config is not None:
            # The classifiers find the last token of a text before the padding.
            config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.model, self.tokenizer = model.eval(), tokenizer
        self.device, self.batch_size = device, batch_size
        self.longest = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
        self.__name__ = name.rstrip("/").rsplit("/", 1)[-1]

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float]:
        """The model's score of each completion after its prompt.

        Raises:
            ValueError: a text has more tokens than the model has positions; it is never cut.
        """
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        most = max(map(len, encoded))
        if self.longest is not None and most > self.longest:
            raise ValueError(f"a prompt with its completion has {most} tokens, more than its {self.longest} positions")
        device, scores = self._place(), torch.empty(len(texts))
        # Texts of similar length together, so that little is padding.
        order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
        with torch.inference_mode():
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                rows = [encoded[index] for index in chosen]
                scores[chosen] = self._forward(rows, device)
        return scores.tolist()

    def _forward(self, rows: list[list[int]], device: torch.device) -> torch.Tensor:
        ids = torch.full((len(rows), max(map(len, rows))), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for line, kept, row in zip(ids, mask, rows, strict=True):
            line[: len(row)], kept[: len(row)] = torch.tensor(row), 1
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        if logits.shape != (len(rows), 1):
            raise ValueError(f"returned logits of shape {list(logits.shape)}; it must have one score for each text")
        return logits[:, 0].float().cpu()

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + completion
        return self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)

    def _place(self) -> torch.device:
        """The device of the model, where it is from the first call on."""
        weight = next(self.model.parameters(), None)
        now = torch.device("cpu") if weight is None else weight.device
        if self.device is None:
            from accelerate import PartialState

            self.device = PartialState().device if now.type == "cpu" else now
        if now != self.device:
            self.model.to(self.device)
        return self.device
