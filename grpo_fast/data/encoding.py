"""Prompts as tokens, the order in which they are sampled, and completions as text."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from grpo_fast.config import GRPOConfig
from grpo_fast.data.templates import Prompt, Row
from grpo_fast.errors import UserError, one_line


def encode_prompts(rows: list[Row], tokenizer, config: GRPOConfig) -> list[list[int]]:
    """Token ids of every row's prompt; a chat is rendered by the model's chat template.

    The template opens the assistant's turn, or leaves it open if the chat ends in one. Text begins with the tokens that
    the tokenizer puts before it (BOS), once, and without those that it puts after it (EOS), since the model continues.
    """
    encoded, first = [], tokens_before(tokenizer)
    for prompt in (row["prompt"] for row in rows):
        if isinstance(prompt, str):
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            encoded.append(ids if ids[: len(first)] == first else [*first, *ids])
            continue
        if tokenizer.chat_template is None:
            raise UserError(f"{config.model_name_or_path!r} has no chat template, but the prompts are chats")
        opened = prompt[-1]["role"] == "assistant"
        arguments = {"add_generation_prompt": not opened, "continue_final_message": opened}
        arguments |= {**(config.chat_template_kwargs or {}), "tokenize": True, "return_dict": False}
        try:
            encoded.append(list(tokenizer.apply_chat_template(prompt, **arguments)))
        except Exception as error:
            raise UserError(f"the chat template refuses {prompt!r:.80}: {one_line(error)}") from None
    return encoded


def encode_rows(
    rows: list[Row],
    tokenizer: Any,
    config: GRPOConfig,
    max_positions: int | None,
    kind: str,
    warn: Callable[[str], None],
) -> tuple[list[Row], list[list[int]]]:
    """The rows to use, and their prompts as tokens.

    Args:
        max_positions: the model's limit, if it has one.
        kind: what messages call the rows, such as "training".
        warn: called with a line that says how many rows ``long_prompts="drop"`` drops.

    Raises:
        UserError: the chat template refuses a prompt; a prompt is empty or too long; or ``long_prompts="drop"`` would
            drop all.
    """
    encoded = encode_prompts(rows, tokenizer, config)
    if config.long_prompts == "drop":
        room, limit = min((tokens, name) for name, tokens in _limits(max_positions, config).items())
        most = room - config.max_completion_length
        kept = [index for index, ids in enumerate(encoded) if len(ids) <= most]
        dropped = f"{len(rows) - len(kept)} of {len(rows)} {kind} prompts"
        reason = f"longer than {most} tokens, which is what max_completion_length={config.max_completion_length} leaves"
        if not kept:
            raise UserError(f"long_prompts='drop' would leave out {dropped}: all are {reason} of {limit}")
        if len(kept) < len(rows):
            warn(f"long_prompts='drop' leaves out {dropped}, {reason} of {limit}")
            rows, encoded = [rows[index] for index in kept], [encoded[index] for index in kept]
    check_lengths(encoded, rows, max_positions, config)
    return rows, encoded


def _limits(max_positions: int | None, config: GRPOConfig) -> dict[str, int]:
    """How many tokens a prompt and its longest completion may have together, by the source of the limit."""
    microbatch, vllm = config.max_tokens_per_microbatch, config.vllm_max_model_length if config.use_vllm else None
    limits = {
        f"the model's {max_positions} positions": max_positions,
        f"max_tokens_per_microbatch={microbatch}": microbatch,
        f"vllm_max_model_length={vllm}": vllm,
    }
    return {name: tokens for name, tokens in limits.items() if tokens is not None}


def tokens_before(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text."""
    whole, text = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return whole[:start]
    return []


def completion_text(tokenizer: Any, token_ids: list[int], ended: bool, past: int = 0) -> str:
    """A completion as rewards and files get it: without pad, BOS and EOS, and if it `ended`, without its last token.

    Other special tokens are text, because they may be tags such as ``<think>`` or ``<tool_call>``. `past` characters
    are left out at the end: those that the last token has after a stop text.
    """
    silent = silent_tokens(tokenizer)
    ids = token_ids[:-1] if ended else token_ids
    text = tokenizer.decode([token for token in ids if token not in silent], skip_special_tokens=False)
    return text[: len(text) - past]


def silent_tokens(tokenizer: Any) -> set[int | None]:
    """The tokens that are no part of a completion's text."""
    silent = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    # Without EOS, the pad token may be any token of the vocabulary.
    return silent if tokenizer.eos_token_id is None else silent | {tokenizer.pad_token_id}


def rendered_prompt(tokenizer: Any, prompt_ids: list[int], prompt: Prompt) -> str:
    """A prompt as the model got it, with special tokens, up to where the scored completion begins (see `as_scored`)."""
    text = tokenizer.decode(prompt_ids, skip_special_tokens=False)
    if isinstance(prompt, str) or prompt[-1]["role"] != "assistant":
        return text
    content = prompt[-1]["content"].strip()
    return text.rpartition(content)[0] if content and content in text else text


def as_scored(prompt: Prompt, text: str) -> tuple[Prompt, str | list[dict[str, str]]]:
    """A prompt and its completion as reward functions get them: both strings, or both chat messages.

    If the chat ends in the assistant's turn, the prompt ends before that turn and the completion begins with it (TRL).
    """
    if isinstance(prompt, str):
        return prompt, text
    if prompt[-1]["role"] != "assistant":
        return prompt, [{"role": "assistant", "content": text}]
    return prompt[:-1], [{"role": "assistant", "content": prompt[-1]["content"] + text}]


def check_lengths(encoded: list[list[int]], rows: list[Row], max_positions: int | None, config: GRPOConfig) -> None:
    """Check that every prompt with its longest completion fits the model, a microbatch and vLLM's sequences."""
    longest = max(range(len(encoded)), key=lambda index: len(encoded[index]))
    length = len(encoded[longest])
    if min(len(ids) for ids in encoded) == 0:
        raise UserError("a prompt has no tokens; every prompt must have at least one")
    for limit, tokens in _limits(max_positions, config).items():
        if length + config.max_completion_length > tokens:
            raise UserError(
                f"a prompt of {length} tokens and max_completion_length={config.max_completion_length} do not fit "
                f"{limit}; the longest prompt begins {str(rows[longest]['prompt'])[:60]!r}; long_prompts=drop leaves "
                "such rows out"
            )


def prompt_order(
    num_rows: int, shuffle: bool, seed: int, start: int = 0, sampling: str = "uniform", rates: Sequence[float] = ()
) -> Iterator[int]:
    """Endless row indices from the `start`-th on, epoch by epoch; with `shuffle`, every epoch has a different order.

    Args:
        sampling: ``"uniform"``; ``"curriculum"``, in which every epoch begins with the highest of the pass `rates`; or
            ``"prioritized"``, which draws each row in proportion to ``1 - rate``, so that an epoch may repeat rows
            (Kimi k1.5, arXiv 2501.12599, section 2.3.4).
        rates: pass rates of the rows, for the last two.
    """
    order = list(range(num_rows))
    generator = random.Random(seed)
    if sampling == "prioritized":
        weights = list(itertools.accumulate(1 - rate for rate in rates))
        for draw in itertools.count():
            (index,) = generator.choices(order, cum_weights=weights)
            if draw >= start:
                yield index
    for epoch in itertools.count():
        if shuffle:
            generator.shuffle(order)
        if epoch >= start // num_rows:
            rows = sorted(order, key=lambda index: -rates[index]) if sampling == "curriculum" else order
            yield from rows[max(start - epoch * num_rows, 0) :]
