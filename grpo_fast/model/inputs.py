"""Which keywords of a call reach the model: those that its forward names.

A transformers model takes any keyword, so a misspelt one, or another library's, would be passed on and change nothing.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from grpo_fast.errors import UserError, nearest
from grpo_kernels import PolicyObjective

# What other libraries and earlier versions call our arguments.
RENAMED = {
    "old_per_token_logps": "old_logprobs",
    "old_log_probs": "old_logprobs",
    "ref_per_token_logps": "ref_logprobs",
    "ref_log_prob": "ref_logprobs",
    "ref_log_probs": "ref_logprobs",
    "mask": "completion_mask",
    "loss_mask": "completion_mask",
    "response_mask": "completion_mask",
    "num_logits_to_keep": "logits_to_keep",
    "importance_sampling_ratio": "correction",
    "vllm_is_ratio": "correction",
    "rollout_is_weights": "correction",
}
INSTEAD = {
    "temperature": "give it to FusedPolicy(model, temperature=...)",
    "labels": "the tokens that are scored are those of input_ids, by completion_mask or logits_to_keep",
    "loss_type": "give objective=PRESETS[...] of grpo_kernels",
    "importance_sampling_level": "give objective=PolicyObjective(level=...)",
    "epsilon_low": "give objective=PolicyObjective(epsilon=...)",
    "num_items_in_batch": "give weights, by grpo_kernels.token_weights",
    "adapter_names": "choose the adapter with model.set_adapter(...) before the call",
    **{
        field.name: f"give objective=PolicyObjective({field.name}=...)" for field in dataclasses.fields(PolicyObjective)
    },
}
# Arguments that a model's forward names, but that would give another result, or one that is not returned.
REFUSED = {
    "past_key_values": "a call computes whole sequences, so give all of input_ids",
    "cache": "a call computes whole sequences, so give all of input_ids",
    "inputs_embeds": "give input_ids",
    "output_attentions": "only log-probabilities, entropies and the loss are returned",
    "output_hidden_states": "only log-probabilities, entropies and the loss are returned",
    "output_router_logits": "set it in the model's config, and the router loss is part of the loss",
}


def check_keywords(given: Mapping[str, Any], model: nn.Module, inner: nn.Module, own: Iterable[str] = ()) -> None:
    """Refuse the keywords that the model would swallow.

    Args:
        given: the keywords that are to be passed on.
        model: the transformers model, without wrappers.
        inner: its body, to which they are passed.
        own: the names of the function's own arguments, of which the nearest is named.

    Raises:
        UserError: one of them is not named by the forward of the model or of its body, or is known not to work.
    """
    if not given:
        return
    passed = forward_arguments(inner)
    known = passed | forward_arguments(model)
    for name, value in given.items():
        if name in REFUSED and value is not None and value is not False:
            raise UserError(f"{name} is not supported: {REFUSED[name]}")
        if name == "return_dict" and value is False:
            raise UserError("return_dict=False is not supported: the call returns tensors or a PolicyLoss")
        if name in passed or name in REFUSED or name == "return_dict":
            continue
        if name in RENAMED:
            raise UserError(f"{name} is no argument of this call: it is called {RENAMED[name]} here")
        if name in INSTEAD:
            raise UserError(f"{name} is no argument of this call: {INSTEAD[name]}")
        if name not in known and "input_ids" in known:
            raise UserError(
                f"{name} is no argument of this call, nor of {type(inner).__name__}.forward"
                f"{nearest(name, {*own, *known})}"
            )


def forward_arguments(module: nn.Module) -> frozenset[str]:
    """The arguments that a module's forward names; of a compiled one, those of the original."""
    return function_arguments(type(module._modules.get("_orig_mod", module)).forward)


@cache
def function_arguments(function: Callable) -> frozenset[str]:
    """The arguments that a function names, those that collect others apart."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)) - {"self"}


def check_tensors(**arguments: Any) -> None:
    """Refuse lists, numbers and the like where a tensor is needed.

    Raises:
        UserError: one of them is neither a tensor nor None.
    """
    for name, value in arguments.items():
        if value is None or isinstance(value, Tensor):
            continue
        hint = "; give its parts by name: policy(**batch)" if isinstance(value, Mapping) else ""
        raise UserError(f"{name} must be a tensor, got {type(value).__name__}{hint}")


def check_token_ids(input_ids: Tensor, config: Any, with_inputs: bool) -> None:
    """Refuse ids that are no token's; on a CPU alone, since on a GPU looking at values would stall the stream.

    Args:
        input_ids: ``[B, T]``.
        config: of the model. Its ids of placeholders (of images, say) may lie outside of the vocabulary.
        with_inputs: whether there is something that placeholders would stand for.

    Raises:
        UserError: an id is outside of the vocabulary.
    """
    if input_ids.device.type != "cpu":
        return
    vocab = config.get_text_config().vocab_size
    wrong = input_ids[(input_ids < 0) | (input_ids >= vocab)].tolist()
    if wrong and with_inputs:
        ends = ("_token_id", "_token_index")
        placeholders = [value for name, value in config.to_dict().items() if name.endswith(ends)]
        wrong = [token for token in wrong if token not in placeholders]
    if wrong:
        raise UserError(f"input_ids holds {wrong[0]}; allowed are token ids from 0 to {vocab - 1}")
