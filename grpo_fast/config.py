"""The configuration of a run: one flat dataclass, with TRL's names where TRL has one.

`grpo-fast train CONFIG.yaml --field value` fills it; `config_checks` checks every field, before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from grpo_fast.errors import UserError
from grpo_kernels import PRESETS, PolicyObjective

# Not Any: jsonargparse would import what a dictionary with a ``class_path`` names.
Value = bool | int | float | str | list | dict | None

# Fields that a resumed run may change: where and how much it writes, how long it goes on, and how the same figures are
# computed. The learning rate follows the schedule of the new max_steps.
FREE_FIELDS = frozenset(
    {
        "output_dir",
        "run_name",
        "max_steps",
        "logging_steps",
        "log_completions_steps",
        "eval_steps",
        "keep_best",
        "report_to",
        "reward_timeout",
        "on_reward_error",
        "code_isolation",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
        "max_tokens_per_microbatch",
        "max_tokens_per_generation_batch",
        "max_buffer_mib",
        "gradient_checkpointing",
        "activation_offloading",
        "use_liger_kernel",
        "tiled_mlp",
        "attn_implementation",
        "fsdp",
        "padding_free",
        "share_prompts",
        "use_cpu",
        "trust_remote_code",
        "vllm_mode",
        "vllm_server_base_url",
        "vllm_server_host",
        "vllm_server_port",
        "vllm_server_timeout",
        "vllm_max_model_length",
        "vllm_gpu_memory_utilization",
        "vllm_enable_sleep_mode",
        "sync_tolerance",
    }
)

# Those that leave something even where all rewards of a group are equal.
UNCENTRED = ("none", "best_only")

_RANGES = [
    (("num_generations",), lambda v: v >= 2, "at least 2, since advantages compare completions of one prompt"),
    (
        (
            "generation_batch_size", "max_completion_length", "num_generations_eval", "num_iterations", "max_steps",
            "max_tokens_per_generation_batch", "max_tokens_per_microbatch", "max_buffer_mib", "logging_steps",
            "max_train_samples", "max_eval_samples", "lora_r", "lora_alpha", "save_total_limit",
            "max_num_gen_batches", "ref_model_sync_steps", "vllm_max_model_length",
        ),
        lambda v: v >= 1,
        "at least 1",
    ),
    (
        ("temperature", "learning_rate", "adam_epsilon", "reward_timeout", "sync_tolerance", "vllm_server_timeout"),
        lambda v: v > 0,
        "above 0",
    ),
    (
        (
            "top_k", "beta", "weight_decay", "max_grad_norm", "warmup_steps", "log_completions_steps", "save_steps",
            "eval_steps", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
        ),
        lambda v: v >= 0,
        "at least 0",
    ),
    (("top_entropy_quantile",), lambda v: 0 <= v <= 1, "from 0 to 1"),
    (("seed",), lambda v: 0 <= v < 2**63, "at least 0 and below 2**63"),
    (("vllm_server_port",), lambda v: 1 <= v <= 65535, "from 1 to 65535"),
    (("top_p", "ref_model_mixup_alpha", "vllm_gpu_memory_utilization"), lambda v: 0 < v <= 1, "above 0 and at most 1"),
    (("min_p", "adam_beta1", "adam_beta2", "lora_dropout"), lambda v: 0 <= v < 1, "at least 0 and below 1"),
]  # fmt: skip
# Evaluated once: a plan tries thousands of configurations.
_hints = cache(get_type_hints)

# The largest reward, reward weight or advantage: float32's largest number, since the loss takes float32 advantages.
# Squares of products of two such numbers are finite in float64.
LARGEST_REWARD = 3.4028234663852886e38


@dataclass
class GRPOConfig:
    """A GRPO run.

    Args:
        model_name_or_path: a folder or hub name for `from_pretrained`, or a built-in: ``smollm2-135m-instruct``
            (extra `smollm2`) or ``random-llama`` (random weights for digit tasks). It may name an adapter saved by
            peft, such as ``RUN/checkpoint-N``, whose adapter_config.json names the base model; with use_peft, training
            goes on with that adapter.
        dtype: dtype of the weights.
        attn_implementation: attention of the model; None leaves the choice to transformers.
        trust_remote_code: run code that comes with the model.
        model_init_kwargs: more arguments for the model (for ``random-llama``: fields of its LlamaConfig).
        use_peft: train LoRA adapters instead of the weights (extra `train`); the reference policy is the model without
            them, or with the adapter of model_name_or_path as it was.
        lora_r: rank of a new adapter; one that was there keeps its own, and its own of the next four fields.
        lora_alpha: its scale is lora_alpha / lora_r (with use_rslora, / sqrt(lora_r)).
        lora_dropout: dropout before the adapter.
        lora_target_modules: names of the modules that get an adapter (default: all linear ones but the head).
        use_rslora: rank-stabilised scale.
        load_in_4bit: quantise the frozen weights to 4 bits (QLoRA, extra `lowbit`).
        bnb_4bit_quant_type: the 4-bit format.
        use_bnb_nested_quant: also quantise the scales of the 4-bit blocks.
        gradient_checkpointing: recompute activations in the backward instead of storing them.
        activation_offloading: with gradient_checkpointing, keep the layers' inputs in pinned host memory, copied
            beside the computation.
        use_liger_kernel: fused norms, rotary embedding and SwiGLU from liger-kernel (extra `liger`, GPU).
        tiled_mlp: compute the MLPs in tiles of 2048 tokens, and again in the backward, which bounds their
            intermediates.
        dataset_name: a .jsonl, .json, .csv (each also with .gz) or .parquet file, a hub name, or a built-in:
            ``sort_digits``, ``addition``, ``arithmetic``, ``countdown`` (generated), ``gsm8k`` or ``math`` (from the
            hub or from files).
        dataset_config: configuration of a hub dataset.
        dataset_kwargs: arguments of a built-in dataset, such as ``{digits: 3}`` for arithmetic or
            ``{path: FOLDER}`` for gsm8k and math.
        dataset_train_split: split of a hub dataset to train on.
        dataset_test_split: split of a hub dataset to evaluate on.
        eval_dataset_name: file to evaluate on; without it, dataset_test_split, or about a tenth of a file's rows, at
            most 200: always the same ones, chosen by their content.
        prompt_template: makes the prompt from a row's columns, as in ``"{question}"``; None uses column ``prompt``.
            Columns must be text, numbers, dates or lists of numbers.
        prompt_file: the same from a file (text, or a YAML list of chat messages), or a built-in one: ``r1_zero``,
            ``question_only``, ``countdown`` or ``countdown_short`` (two answers shown, the third opened).
        system_prompt: system message put before a templated prompt, which then is a chat.
        apply_chat_template: turn a templated prompt into a chat even without a system message.
        chat_template_kwargs: more arguments for the tokenizer's chat template.
        max_train_samples: use only the first rows of the training split.
        max_eval_samples: use only the first rows of the evaluation split; it does not change what is held out.
        long_prompts: a prompt that leaves no room for max_completion_length in the model's positions or in
            max_tokens_per_microbatch ends the run before it begins (error), or its row is left out (drop).
        shuffle_dataset: draw the training prompts in a random order (by the seed); false keeps the order of the data.
        reward_funcs: names of built-in rewards, dotted paths (``package.module.function``) or ``file.py:function``.
        reward_weights: a weight for each of them (default: 1 each).
        reward_timeout: seconds that a reward function may take for a completion.
        on_reward_error: a completion for which a function fails has no reward from it (none), or ends the run (raise).
        code_isolation: how `unit_tests` contains generated code: the best level that this machine has (available), only
            namespaces with a system call filter (strict: no start without), or resource limits only (none).
        eval_metric: the reward function whose mean is the run's score, by name (default: the last one).
        eval_steps: measure the held-out prompts every so many steps; 0 for before and after training only.
        num_generations: completions sampled for each prompt, G.
        generation_batch_size: completions of one optimizer step; num_generations must divide it.
        max_completion_length: longest completion, tokens.
        temperature: sampling temperature, also applied to the log-probabilities of the loss.
        top_p: nucleus sampling.
        top_k: sample among the k likeliest tokens; 0 for all.
        min_p: drop tokens below this fraction of the likeliest one's probability.
        generation_kwargs: more of GenerationConfig's filters, such as ``repetition_penalty``.
        num_generations_eval: completions for each evaluation prompt.
        use_vllm: sample with vLLM instead of transformers' generate (extra `vllm`).
        vllm_mode: in this process, asleep while training (colocate), or from a server.
        vllm_server_base_url: the server's address, such as ``http://127.0.0.1:8000`` (default: from host and port).
        vllm_server_host: the server's host; others than loopback need VLLM_API_KEY in the environment, on both sides.
        vllm_server_port: the server's port.
        vllm_server_timeout: seconds to wait for the server when the run starts.
        vllm_max_model_length: longest prompt and completion together in vLLM (default: what the data and
            max_completion_length need).
        vllm_gpu_memory_utilization: share of the GPU that vLLM may take for weights and KV cache (colocate; default:
            planned from the prompts, num_generations and max_completion_length).
        vllm_enable_sleep_mode: give vLLM's memory back while training (colocate).
        vllm_importance_sampling_correction: weigh the loss by the ratio of the trainer's to the sampler's
            probabilities, wherever vLLM samples.
        vllm_importance_sampling_mode: a ratio for each token or for the whole sequence (product, or geometric: its
            length-normalised form), cut off at the bounds (truncate) or zero outside (mask).
        vllm_importance_sampling_clip_max: upper bound of the ratio; None for none.
        vllm_importance_sampling_clip_min: lower bound of the ratio; None for none.
        sync_tolerance: stop when after a sync the sampler's log-probabilities of a probe differ by more from the
            trainer's (default: 1e-3 in float32, 0.3 in bfloat16, also that of `bf16`).
        sample_ahead: sample the next batch on a vLLM server while training on this one; completions are then one step
            old, which the correction accounts for. A resumed run samples its first batch anew, so it is not the same
            bit for bit.
        max_tokens_per_generation_batch: tokens whose keys and values sampling with transformers may keep at once, of
            prompts and completions; sequences wait where it is used up.
        loss_type: a preset of the objective: grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo, gspo, rloo,
            dual_clip, reinforce or unclipped (docs/objectives.md).
        epsilon: lower clip distance (default: the preset's).
        epsilon_high: upper clip distance (default: the preset's).
        delta: upper bound of the unclipped ratio, for two-sided clipping.
        importance_sampling_level: whether a ratio belongs to a token, or to a sequence, as the geometric mean
            (sequence) or the product of its tokens' (default: the preset's).
        beta: weight of the KL term to the initial policy.
        use_bias_correction_kl: multiply the KL estimate by the ratio.
        kl_estimator: estimate of the KL term in the loss: k1, k2 or k3.
        entropy_coef: weight of the entropy bonus.
        top_entropy_quantile: share of the step's tokens, those of the highest entropy, that carry the policy gradient;
            below 1 it costs one more forward for each update.
        sapo_temperature_pos: sapo's temperature for positive advantages.
        sapo_temperature_neg: sapo's temperature for the other advantages.
        vespo_k_pos: vespo's power of the ratio for positive advantages.
        vespo_lambda_pos: vespo's decay with the ratio for positive advantages.
        vespo_k_neg: vespo's power of the ratio for the other advantages.
        vespo_lambda_neg: vespo's decay with the ratio for the other advantages.
        num_iterations: optimizer steps on each generation batch.
        kl_in_reward: take beta times a sequence's KL to the reference (k1, summed over its tokens) from its reward,
            instead of a KL term in the loss.
        sync_ref_model: move the reference policy towards the trained one as training goes on.
        ref_model_sync_steps: every so many steps.
        ref_model_mixup_alpha: by this share of the way; 1 makes them equal.
        reward_baseline: what is taken from a reward: the mean of its group, the mean of the others (leave_one_out), the
            group's highest reward (max), or nothing (none); best_only makes all rewards below the highest 0.
        scale_rewards: divide advantages by the standard deviation of the group, of the batch, or of nothing.
        multi_objective_aggregation: several rewards are summed and then normalised, or each is normalised in its group,
            and their sum over the batch (normalize_then_sum, GDPO).
        dynamic_sampling: sample other prompts in place of those whose completions all have the same reward (DAPO).
        max_num_gen_batches: at most so often for a step, the first time included.
        mask_truncated_completions: leave completions that did not end out of the loss.
        optim: adamw_torch_fused; adamw_torch_8bit (torchao: 8-bit moments, stochastic rounding of bfloat16 weights);
            adamw_8bit or paged_adamw_8bit (bitsandbytes, GPU); the latter three need the extra `lowbit`.
        optim_offload: keep the optimizer's state and step on the CPU (torchao, GPU).
        learning_rate: peak learning rate of AdamW.
        weight_decay: AdamW's weight decay, on matrices only.
        adam_beta1: AdamW's first decay rate.
        adam_beta2: AdamW's second decay rate.
        adam_epsilon: AdamW's epsilon.
        max_grad_norm: clip the gradient to this norm; 0 for no clipping.
        max_steps: number of optimizer steps.
        lr_scheduler_type: learning-rate schedule, one of transformers'.
        warmup_steps: steps of linear warm-up; below 1, a share of max_steps.
        max_tokens_per_microbatch: tokens of one forward and backward; it bounds the memory for activations.
        fsdp: several processes share weights, gradients and optimizer state (FSDP2) instead of having all each (DDP);
            also with accelerate's own file, ``fsdp_version: 2``.
        padding_free: pack sequences of any length side by side (auto: wherever the model's attention allows it).
        share_prompts: compute a prompt once for all completions of its group (auto: wherever sequences are packed).
        max_buffer_mib: budget for temporary memory in the output head, MiB (default: 256 on CPU, 1024 on GPU, where the
            head may also use a quarter of the free memory).
        bf16: mixed precision with bfloat16 through accelerate.
        use_cpu: stay on the CPU even where there is a GPU.
        seed: seed of the weights, the data order and the sampling.
        output_dir: the run folder (default: runs/NAME-TIME).
        run_name: name of the run (default: the configuration file's).
        logging_steps: write metrics every so many steps.
        log_completions_steps: write sampled completions every so many steps; 0 for never.
        report_to: trackers beside the run folder, of tensorboard, wandb and trackio.
        save_steps: write a checkpoint every so many steps; 0 for the last step only.
        save_total_limit: keep only so many checkpoints, the newest.
        keep_best: also keep the checkpoint with the best score on the held-out prompts, measured every eval_steps.
        resume_from_checkpoint: go on from output_dir's newest checkpoint, if there is one (also: ``--resume``).
    """

    model_name_or_path: str
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    model_init_kwargs: dict[str, Value] | None = None
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = None
    use_rslora: bool = False
    load_in_4bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    use_bnb_nested_quant: bool = False
    gradient_checkpointing: bool = False
    activation_offloading: bool = False
    use_liger_kernel: bool = False
    tiled_mlp: bool = False

    dataset_name: str = ""
    dataset_config: str | None = None
    dataset_kwargs: dict[str, Value] | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    eval_dataset_name: str | None = None
    prompt_template: str | None = None
    prompt_file: str | None = None
    system_prompt: str | None = None
    apply_chat_template: bool = False
    chat_template_kwargs: dict[str, Value] | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    long_prompts: Literal["error", "drop"] = "error"
    shuffle_dataset: bool = True

    reward_funcs: list[str] = field(default_factory=list)
    reward_weights: list[float] | None = None
    reward_timeout: float = 10.0
    on_reward_error: Literal["none", "raise"] = "none"
    code_isolation: Literal["strict", "available", "none"] = "available"
    eval_metric: str | None = None
    eval_steps: int = 0

    num_generations: int = 8
    generation_batch_size: int = 64
    max_completion_length: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    generation_kwargs: dict[str, Value] | None = None
    num_generations_eval: int = 1
    use_vllm: bool = False
    vllm_mode: Literal["colocate", "server"] = "colocate"
    vllm_server_base_url: str | None = None
    vllm_server_host: str = "127.0.0.1"
    vllm_server_port: int = 8000
    vllm_server_timeout: float = 240.0
    vllm_max_model_length: int | None = None
    vllm_gpu_memory_utilization: float | None = None
    vllm_enable_sleep_mode: bool = True
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: Literal[
        "token_truncate",
        "token_mask",
        "sequence_truncate",
        "sequence_mask",
        "geometric_truncate",
        "geometric_mask",
    ] = "sequence_mask"
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None
    sync_tolerance: float | None = None
    sample_ahead: bool = False
    max_tokens_per_generation_batch: int = 65536

    loss_type: str = "dapo"
    epsilon: float | None = None
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: Literal["token", "sequence", "product"] | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    num_iterations: int = 1
    kl_in_reward: bool = False
    sync_ref_model: bool = False
    ref_model_sync_steps: int = 512
    ref_model_mixup_alpha: float = 0.6
    reward_baseline: Literal["mean", "leave_one_out", "max", "none", "best_only"] = "mean"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    dynamic_sampling: bool = False
    max_num_gen_batches: int = 10
    mask_truncated_completions: bool = False

    optim: Literal["adamw_torch_fused", "adamw_torch_8bit", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch_fused"
    optim_offload: bool = False
    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    max_steps: int = 100
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = "linear"
    warmup_steps: float = 0
    max_tokens_per_microbatch: int = 8192
    fsdp: bool = False
    padding_free: Literal["auto", "always", "never"] = "auto"
    share_prompts: Literal["auto", "always", "never"] = "auto"
    max_buffer_mib: int | None = None
    bf16: bool = False
    use_cpu: bool = False
    seed: int = 42

    output_dir: str | None = None
    run_name: str | None = None
    logging_steps: int = 1
    log_completions_steps: int = 10
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    save_steps: int = 50
    save_total_limit: int = 2
    keep_best: bool = False
    resume_from_checkpoint: bool = False

    def __post_init__(self):
        for name in _PATH_FIELDS:
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, os.path.expanduser(value))
        check_config(self)

    @property
    def uses_reference(self) -> bool:
        return self.beta != 0.0

    @property
    def corrects_sampler(self) -> bool:
        """Whether the loss is weighed by the ratio of the trainer's to the sampler's probabilities."""
        return self.use_vllm and self.vllm_importance_sampling_correction

    @property
    def prompts_per_step(self) -> int:
        return self.generation_batch_size // self.num_generations

    @property
    def max_buffer_bytes(self) -> int | None:
        return None if self.max_buffer_mib is None else self.max_buffer_mib << 20

    def objective(self) -> PolicyObjective:
        """The preset of `loss_type` with the fields that were set."""
        overrides = {
            "epsilon": self.epsilon,
            "epsilon_high": self.epsilon_high,
            "delta": self.delta,
            "level": self.importance_sampling_level,
        }
        return dataclasses.replace(
            PRESETS[self.loss_type],
            **{name: value for name, value in overrides.items() if value is not None},
            beta=0.0 if self.kl_in_reward else self.beta,
            kl_bias_correction=self.use_bias_correction_kl,
            kl=self.kl_estimator,
            **{name: getattr(self, name) for name in _OBJECTIVE_FIELDS},
        )


# Fields that may hold a path, in which ``~`` is the home folder; functions of reward_funcs are found likewise.
_PATH_FIELDS = ("model_name_or_path", "dataset_name", "eval_dataset_name", "prompt_file", "output_dir")

# What has the same name in `PolicyObjective`.
_OBJECTIVE_FIELDS = ("entropy_coef", "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos")
_OBJECTIVE_FIELDS += ("vespo_k_neg", "vespo_lambda_neg")

# Fields of TRL that have another name, or another home, here.
TRL_FIELDS_INSTEAD = {
    "per_device_train_batch_size": "generation_batch_size (and max_tokens_per_microbatch for the memory)",
    "gradient_accumulation_steps": "max_tokens_per_microbatch",
    "steps_per_generation": "num_iterations",
    "num_train_epochs": "max_steps",
    "repetition_penalty": "generation_kwargs",
    "warmup_ratio": "warmup_steps (below 1, it is a share of max_steps)",
    "log_completions": "log_completions_steps",
    "vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max",
    "vllm_tensor_parallel_size": "it on the server (grpo-fast serve CONFIG.yaml -- --tensor-parallel-size 2)",
}


def check_config(config: GRPOConfig) -> None:
    """Raise a UserError that names the first wrong field, its value and what is allowed."""
    for name, hint in _hints(type(config)).items():
        value, allowed = getattr(config, name), _literals(hint)
        if allowed and not set(value if get_origin(hint) is list else [value]) <= set(allowed):
            _refuse(
                name, value, f"{'made of' if get_origin(hint) is list else 'one of'} {', '.join(map(str, allowed))}"
            )
        if hint is bool and value is not None and not isinstance(value, bool):
            _refuse(name, value, "true or false")
        if value is None and type(None) not in get_args(hint):
            _refuse(name, value, "set; leave the field out for its default")
    for names, holds, allowed in _RANGES:
        for name in names:
            value = getattr(config, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                _refuse(name, value, f"a finite number, {allowed}")
    if not config.dataset_name:
        raise UserError("dataset_name is missing: a data file, a hub name or a built-in name")
    if not config.reward_funcs:
        raise UserError("reward_funcs is missing: at least one reward function, by name or dotted path")
    if config.keep_best and not config.eval_steps:
        raise UserError("keep_best goes with eval_steps: the best score is among those measured while training")
    if config.load_in_4bit and not config.use_peft:
        raise UserError("load_in_4bit goes with use_peft: 4-bit weights are not trained, adapters beside them are")
    if config.sample_ahead and not (config.corrects_sampler and config.vllm_mode == "server"):
        raise UserError(
            "sample_ahead goes with use_vllm, vllm_mode='server' and vllm_importance_sampling_correction: only a "
            "server samples beside an update, and its completions are a step old"
        )
    if config.corrects_sampler and config.loss_type == "vespo" and "token" not in config.vllm_importance_sampling_mode:
        raise UserError(
            "loss_type='vespo' goes with vllm_importance_sampling_mode token_truncate or token_mask, not "
            f"{config.vllm_importance_sampling_mode!r}: its own ratio is the sequence's"
        )
    address, host = config.vllm_server_base_url, config.vllm_server_host
    if address is not None and not address.startswith(("http://", "https://")):
        _refuse("vllm_server_base_url", address, "an address like http://127.0.0.1:8000")
    if not host or "/" in host or ":" in host:
        _refuse("vllm_server_host", host, "a name or an IPv4 address; vllm_server_base_url takes any other")
    low, high = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    if low is not None and high is not None and low > high:
        raise UserError(f"vllm_importance_sampling_clip_min={low} is above vllm_importance_sampling_clip_max={high}")
    if config.activation_offloading and not config.gradient_checkpointing:
        raise UserError("activation_offloading goes with gradient_checkpointing: it keeps the layers' inputs")
    if config.share_prompts == "always" and config.padding_free == "never":
        raise UserError("share_prompts='always' goes with padding_free: prompts are shared in packed sequences")
    for name in ("kl_in_reward", "sync_ref_model"):
        if getattr(config, name) and not config.uses_reference:
            raise UserError(f"{name} goes with beta above 0: without, there is no reference policy")
    if config.sync_ref_model and config.use_peft:
        raise UserError("sync_ref_model goes without use_peft: the reference is the model that the adapter began from")
    if config.reward_baseline in UNCENTRED and config.scale_rewards != "none":
        raise UserError(
            f"reward_baseline={config.reward_baseline!r} goes with scale_rewards='none', not "
            f"{config.scale_rewards!r}: rewards that are not centred are not scaled"
        )
    if config.multi_objective_aggregation == "normalize_then_sum":
        for name, value in (("scale_rewards", "group"), ("reward_baseline", "mean"), ("kl_in_reward", False)):
            if getattr(config, name) != value:
                raise UserError(
                    f"multi_objective_aggregation='normalize_then_sum' goes with {name}={value!r}, "
                    f"not {getattr(config, name)!r}"
                )
    if config.generation_batch_size % config.num_generations:
        _refuse(
            "generation_batch_size", config.generation_batch_size,
            f"a multiple of num_generations={config.num_generations}",
        )  # fmt: skip
    if config.reward_weights is not None and len(config.reward_weights) != len(config.reward_funcs):
        raise UserError(
            f"reward_weights has {len(config.reward_weights)} values for {len(config.reward_funcs)} reward_funcs"
        )
    if config.prompt_template is not None and config.prompt_file is not None:
        raise UserError("prompt_template and prompt_file both make the prompt; set one of them")
    if config.prompt_template is config.prompt_file is None and (config.system_prompt or config.apply_chat_template):
        name = "system_prompt" if config.system_prompt else "apply_chat_template"
        raise UserError(f"{name} goes with prompt_template or prompt_file; a prompt column is taken as it is")
    if config.run_name is not None and (not config.run_name or "/" in config.run_name):
        _refuse("run_name", config.run_name, "a name without '/'; output_dir takes a path")
    if not all(abs(weight) <= LARGEST_REWARD for weight in config.reward_weights or []):
        _refuse("reward_weights", config.reward_weights, f"made of numbers within +-{LARGEST_REWARD:.1e}")
    if config.loss_type not in PRESETS:
        _refuse("loss_type", config.loss_type, f"one of {', '.join(PRESETS)}")
    try:
        config.objective()
    except ValueError as error:
        raise UserError(str(error).removeprefix("PolicyObjective: ")) from None


def _literals(hint: Any) -> tuple:
    """The values that a ``Literal`` (or an optional one) allows; empty for other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    values = [value for part in get_args(hint) for value in _literals(part)]
    return (*values, None) if values and type(None) in get_args(hint) else tuple(values)


def _refuse(name: str, value: object, allowed: str) -> None:
    raise UserError(f"{name}={value!r} is not allowed: it must be {allowed}")
