"""Which keywords of a call are passed on to the model: those that its forward names.

A transformers model accepts any keyword, so a misspelt one, or another library's, would be ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from grpo_fast.errors import UserError, nearest
from grpo_kernels import PolicyObjective

# Names of our arguments in other libraries and earlier versions.
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
    "temperature": "pass it to FusedPolicy(model, temperature=...)",
    "labels": "the scored tokens are those of input_ids, selected by completion_mask or logits_to_keep",
    "loss_type": "pass objective=PRESETS[...] of grpo_kernels",
    "importance_sampling_level": "pass objective=PolicyObjective(level=...)",
    "epsilon_low": "pass objective=PolicyObjective(epsilon=...)",
    "num_items_in_batch": "pass weights, computed by grpo_kernels.token_weights",
    "adapter_names": "choose the adapter with model.set_adapter(...) before the call",
    **{name: f"pass objective=PolicyObjective({name}=...)" for name in PolicyObjective.__dataclass_fields__},
}
# Arguments that a model's forward names, but whose result would differ or would not be returned.
REFUSED = {
    "past_key_values": "a call computes whole sequences, so pass all of input_ids",
    "cache": "a call computes whole sequences, so pass all of input_ids",
    "inputs_embeds": "pass input_ids",
    "output_attentions": "only log-probabilities, entropies and the loss are returned",
    "output_hidden_states": "only log-probabilities, entropies and the loss are returned",
    "output_router_logits": "set it in the model's config, and the router loss is part of the loss",
}


def check_keywords(given: Mapping[str, Any], model: nn.Module, inner: nn.Module, own: Iterable[str] = ()) -> None:
    """Raise a UserError for a keyword that `model` and its body `inner` would ignore, or that is known not to work.

    The body receives the keywords that are `given`; `own` are the names of the function's arguments, for suggestions.
    """
    passed = forward_arguments(inner)
    known = passed | forward_arguments(model)
    for name, value in given.items():
        if name in REFUSED and value is not None and value is not False:
            raise UserError(f"{name} is not supported: {REFUSED[name]}")
        if name == "return_dict" and value is False:
            raise UserError("return_dict=False is not supported: the call returns tensors or a PolicyLoss")
        if name in passed or name in REFUSED or name == "return_dict":
            continue
        hint = f"it is called {RENAMED[name]} here" if name in RENAMED else INSTEAD.get(name)
        if hint:
            raise UserError(f"{name} is no argument of this call: {hint}")
        if name not in known and "input_ids" in known:
            raise UserError(
                f"{name} is no argument of this call, nor of {type(inner).__name__}.forward"
                f"{nearest(name, {*own, *known})}"
            )


def forward_arguments(module: nn.Module) -> frozenset[str]:
    """The arguments that a module's forward names; those of the original for a compiled module."""
    return function_arguments(type(module._modules.get("_orig_mod", module)).forward)


@cache
def function_arguments(function: Callable) -> frozenset[str]:
    """The arguments that a function names, without those that collect others."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)) - {"self"}


def check_tensors(**arguments: Any) -> None:
    """Raise a UserError if an argument is neither a tensor nor None."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor | None):
            hint = "; pass its parts by name: policy(**batch)" if isinstance(value, Mapping) else ""
            raise UserError(f"{name} must be a tensor, got {type(value).__name__}{hint}")


def check_token_ids(input_ids: Tensor, config: Any, with_inputs: bool) -> None:
    """Raise a UserError for an id outside the vocabulary; on a CPU only, since reading values stalls a GPU's stream.

    With other inputs, `config`'s ids of placeholders (of images, say) may be outside the vocabulary.
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
