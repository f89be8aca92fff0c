"""The fields of a run's configuration: one flat dataclass, with TRL's names where TRL has one.

`grpo-fast train CONFIG.yaml --field value` fills it. The loss keeps TRL's names here and `PolicyObjective`'s names from
:meth:`GRPOConfig.objective` on, with nothing in between.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, Literal, TypeVar

from grpo_fast.config.checks import check_config, check_kinds, check_objective_settings
from grpo_fast.config.sizes import UNSET, completions_per_step, resolve_sizes
from grpo_fast.config.trl import check_names, translate
from grpo_fast.errors import UserError, one_line, shown
from grpo_fast.named_functions import load_function, split_names, time_of_change
from grpo_kernels import PRESETS, PolicyObjective
from grpo_kernels.objective import function_objective

T = TypeVar("T")
# Not Any: jsonargparse would import the class that a dictionary with a ``class_path`` names.
Value = bool | int | float | str | list | dict | None

# Fields that a resumed run may change: where and how much it writes, how long it runs, and how it computes the same
# values. The learning rate follows the schedule of the new max_steps.
FREE_FIELDS = frozenset(
    (
        "output_dir", "run_name", "max_steps", "num_train_epochs", "logging_steps", "logging_first_step",
        "log_completions_steps", "script_objects", "eval_steps", "keep_best",
        "report_to", "reward_timeout", "on_reward_error", "code_isolation", "save_steps", "save_total_limit",
        "resume_from_checkpoint", "max_tokens_per_microbatch", "max_tokens_per_generation_batch", "max_buffer_mib",
        "gradient_checkpointing", "activation_offloading", "layers_on_host", "use_liger_kernel", "tiled_mlp",
        "attn_implementation", "fsdp", "padding_free", "share_prompts", "use_cpu", "trust_remote_code", "vllm_mode",
        "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_max_model_length",
        "vllm_gpu_memory_utilization", "vllm_enable_sleep_mode", "sync_tolerance",
    )
)  # fmt: skip

# Fields that may hold a path, in which ``~`` is the home folder. The files in reward_funcs are expanded when loaded.
_PATH_FIELDS = ("model_name_or_path", "dataset_name", "eval_dataset_name", "prompt_file", "pass_rates", "output_dir")

# What `PolicyObjective` calls otherwise than TRL; its other settings have TRL's names.
_TRL_NAMES = {
    "level": "importance_sampling_level",
    "kl": "kl_estimator",
    "kl_bias_correction": "use_bias_correction_kl",
}


def names_checked(cls: type[T]) -> type[T]:
    """`cls` with a constructor that names all unknown fields, and what to use instead, where Python names the first."""
    init = cls.__init__

    @functools.wraps(init)
    def checked(self, *args, **fields):
        check_names(fields, cls.__dataclass_fields__, cls.__name__)
        init(self, *args, **fields)

    cls.__init__ = checked
    return cls


def described_fields(docstring: str) -> dict[str, str]:
    """The fields that the docstring of a configuration describes, each with its lines."""
    parts = re.split(r"^ {8}(?=\w+: )", docstring.partition("Args:\n")[2], flags=re.MULTILINE)[1:]
    return {part.partition(":")[0]: f"        {part.rstrip()}\n" for part in parts}


def with_inherited_fields(cls: type[T]) -> type[T]:
    """`cls`, a subclass of `GRPOConfig`, whose docstring, and so its help, also describes the inherited fields."""
    own = described_fields(cls.__doc__ or "")
    shared = described_fields(GRPOConfig.__doc__ or "")
    lines = [text for name, text in shared.items() if name not in cls.unused_fields | own.keys()]
    cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n{''.join(lines)}"
    return cls


def refuse_unused(config: GRPOConfig, names: Iterable[str], what: str) -> None:
    """Refuse values other than the default for fields that have no effect in `what`."""
    for name in names:
        own = type(config).__dataclass_fields__[name]
        default = own.default if own.default_factory is dataclasses.MISSING else own.default_factory()
        if getattr(config, name) != default:
            raise UserError(f"{name}={shown(getattr(config, name))} has no effect in {what}; leave it out")


@names_checked
@dataclass
class GRPOConfig:
    """A GRPO run.

    Args:
        model_name_or_path: a folder or hub name for `from_pretrained`, or a built-in: ``smollm2-135m-instruct`` (extra
            `smollm2`) or ``random-llama`` (random weights for digit tasks). It may name an adapter saved by peft, such
            as ``RUN/checkpoint-N``, with its base model in adapter_config.json; use_peft then trains that adapter
            further.
        dtype: dtype of the weights.
        attn_implementation: attention of the model; None leaves the choice to transformers.
        trust_remote_code: run code that comes with the model.
        model_init_kwargs: more arguments for the model (for ``random-llama``: fields of its LlamaConfig).
        use_peft: train LoRA adapters instead of the weights (extra `train`); the reference policy is the model without
            them, or with a loaded adapter's initial state.
        lora_r: rank of a new adapter. A loaded adapter keeps its own values of this field and the next four.
        lora_alpha: its scale is lora_alpha / lora_r (with use_rslora, / sqrt(lora_r)).
        lora_dropout: dropout before the adapter.
        lora_target_modules: names of the modules that get an adapter (default: all linear layers except the head).
        use_rslora: rank-stabilised scale.
        load_in_4bit: quantise the frozen weights to 4 bits (QLoRA, extra `lowbit`).
        bnb_4bit_quant_type: the 4-bit format.
        use_bnb_nested_quant: also quantise the scales of the 4-bit blocks.
        gradient_checkpointing: recompute activations in the backward instead of storing them.
        activation_offloading: with gradient_checkpointing, keep the layers' inputs in pinned host memory.
        layers_on_host: number of decoder layers whose frozen weights stay in pinned host memory and are copied to the
            GPU one layer ahead of the computation; with use_peft and gradient_checkpointing.
        use_liger_kernel: fused norms, rotary embedding and SwiGLU from liger-kernel (extra `liger`, GPU).
        tiled_mlp: compute MLPs in tiles of 2048 tokens, recomputed in the backward, to bound their intermediates.
        dataset_name: a .jsonl, .json, .csv (each also .gz) or .parquet file, a hub name, or a built-in:
            ``sort_digits``, ``addition``, ``arithmetic``, ``countdown`` (generated), ``gsm8k`` or ``math`` (from the
            hub or files).
        dataset_config: configuration of a hub dataset.
        dataset_kwargs: arguments of a built-in dataset, such as ``{digits: 3}`` for arithmetic or ``{path: FOLDER}``
            for gsm8k and math.
        dataset_train_split: split of a hub dataset to train on.
        dataset_test_split: split of a hub dataset to evaluate on.
        eval_dataset_name: file to evaluate on; without it, dataset_test_split, or about a tenth of a file's rows, at
            most 200, chosen by their content and so the same in every run.
        answer_column: the column that reward functions get as ``answer`` (default: ``answer``; in Alpaca's data
            ``output``, in ShareGPT's the assistant's last message); ``reward_model.ground_truth`` is part of a column.
        prompt_template: makes the prompt from a row's columns, as in ``"{question}"``; None uses column ``prompt``, or
            those of Alpaca's or ShareGPT's data. Columns must be text, numbers, dates or lists of numbers.
        prompt_file: the same from a file (text, or a YAML list of chat messages), or a built-in one: ``r1_zero``,
            ``question_only``, ``countdown`` or ``countdown_short`` (two answers shown, the third opened).
        system_prompt: system message put before a prompt made from columns, which then is a chat.
        apply_chat_template: turn a prompt made from columns into a chat even without a system message.
        chat_template_kwargs: more arguments for the tokenizer's chat template.
        max_train_samples: use only the first rows of the training split.
        max_eval_samples: use only the first rows of the evaluation split; it does not change what is held out.
        long_prompts: a prompt that leaves no room for max_completion_length in the model's positions or in
            max_tokens_per_microbatch is an error before the run (error), or its row is left out (drop).
        shuffle_dataset: draw the training prompts in a random order (by the seed); false keeps the order of the data.
        pass_rates: folder of ``grpo-fast eval --split train``, which measured how often each training prompt is solved.
        min_pass_rate: with pass_rates, train only on prompts that are solved at least this often.
        max_pass_rate: with pass_rates, train only on prompts that are solved at most this often.
        prompt_sampling: draw all training prompts equally often (uniform); with pass_rates, in proportion to how often
            they are not solved (prioritized), or every epoch from the easiest to the hardest (curriculum).
        reward_funcs: names of built-in rewards, dotted paths (``package.module.function``) or ``file.py:function``; a
            list, or a text with commas between them.
        reward_weights: a weight for each of them (default: 1 each).
        reward_timeout: seconds that a reward function may take for a completion.
        on_reward_error: if a function fails on a completion, it gives it no reward (none) or ends the run (raise).
        code_isolation: how `unit_tests` contains generated code: the best level of this machine (available), only
            namespaces with a system call filter (strict: otherwise no start), or only resource limits (none).
        eval_metric: the reward function whose mean is the run's score, by name (default: the last one).
        eval_steps: measure the held-out prompts every N steps; 0 for before and after training only.
        num_generations: completions sampled for each prompt, G.
        generation_batch_size: completions that are sampled at once, over all processes; one optimizer step takes them
            all, unless the next three fields say otherwise. num_generations must divide it (default: 64, or what those
            fields give).
        per_device_train_batch_size: as in TRL, this times the processes times gradient_accumulation_steps are the
            completions of an optimizer step. How many are computed at once follows from max_tokens_per_microbatch.
        gradient_accumulation_steps: see per_device_train_batch_size.
        steps_per_generation: as in TRL, per_device_train_batch_size times the processes times this are the completions
            of a generation batch, which is divided among several optimizer steps if this is a multiple of
            gradient_accumulation_steps (default: that number, so one step).
        max_completion_length: longest completion, tokens.
        temperature: sampling temperature, also applied to the log-probabilities of the loss.
        top_p: nucleus sampling.
        top_k: sample among the k likeliest tokens; 0 for all.
        min_p: drop tokens below this fraction of the likeliest one's probability.
        truncated_support: with top_p, top_k or min_p, normalise the loss's log-probabilities over the tokens that they
            kept, as the sampler does, instead of over the whole vocabulary.
        generation_kwargs: more of GenerationConfig's filters, such as ``repetition_penalty``, and ``stop``: a text or
            a list of texts, each of which ends a completion.
        thinking_budget: after so many tokens within ``<think>``, ``</think>`` is forced; its tokens carry no loss.
        num_generations_eval: completions for each evaluation prompt.
        use_vllm: sample with vLLM instead of transformers' generate (extra `vllm`).
        vllm_mode: vLLM runs in this process and sleeps during training (colocate), or on a server (server).
        vllm_server_base_url: the server's address, such as ``http://127.0.0.1:8000`` (default: from host and port).
        vllm_server_host: the server's host; any but loopback requires VLLM_API_KEY in the environment of both sides.
        vllm_server_port: the server's port.
        vllm_server_timeout: seconds to wait for the server when the run starts.
        vllm_max_model_length: longest prompt plus completion in vLLM (default: what the data need).
        vllm_gpu_memory_utilization: share of the GPU that vLLM may take for weights and KV cache (colocate; default:
            planned from the prompts, num_generations and max_completion_length).
        vllm_enable_sleep_mode: free vLLM's memory during training (colocate).
        vllm_importance_sampling_correction: weight the loss by the ratio of the trainer's to vLLM's probabilities.
        vllm_importance_sampling_mode: a ratio for each token or for the whole sequence (product, or geometric: its
            length-normalised form), cut off at the bounds (truncate) or zero outside (mask).
        vllm_importance_sampling_clip_max: upper bound of the ratio; None for none.
        vllm_importance_sampling_clip_min: lower bound of the ratio; None for none.
        rollout_rs: leave out tokens (token) or sequences (seq) where vLLM's probabilities differ too much from the
            trainer's, by the estimate k1, k2 or k3 of a token's divergence, or its sum, mean or max over a sequence.
        rollout_rs_threshold: the largest k2 or k3 that is kept; for k1 the largest ratio of vLLM's probability to the
            trainer's.
        rollout_rs_threshold_lower: the smallest such ratio (k1 alone; default: 1 / rollout_rs_threshold).
        sync_tolerance: end the run if, after a weight sync, log-probabilities of sampler and trainer on a probe differ
            by more than this (default: 1e-3 in float32, 0.3 in bfloat16 and with `bf16`).
        sample_ahead: sample the next batch on a vLLM server while training on this one. Its completions are then one
            step old, which the correction accounts for. A resumed run samples its first batch again and is not
            bit-identical.
        max_staleness: sample ahead on a vLLM server from a queue: the weights that sampled a token may be up to this
            many syncs older than those it trains. Answers that a sync interrupts continue with the new weights; each
            token keeps the log-probability under the weights that sampled it. 0 for none.
        max_tokens_per_generation_batch: most tokens in the KV cache when sampling with transformers; others wait.
        speculative_tokens: with transformers, verify up to this many tokens at once, drafted from other answers to the
            prompt, where that is faster; the distribution stays the same (docs/sampling.md). 0 for none.
        loss_type: a preset of the objective: grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo, gspo, rloo,
            dual_clip, reinforce, unclipped, gpg, dppo_tv, dppo_kl, gmpo, kimi, dro, clip_cov or kl_cov
            (docs/objectives.md); or a loss function of your own, by dotted path or as ``file.py:function``
            (docs/how-to/add-an-objective.md).
        epsilon: lower clip distance (default: the preset's).
        epsilon_high: upper clip distance (default: the preset's).
        delta: upper bound of the unclipped ratio, for two-sided clipping.
        importance_sampling_level: whether a ratio is a token's, or a sequence's: the geometric mean (sequence) or the
            product of its tokens' ratios (default: the preset's).
        beta: weight of the KL term to the initial policy.
        use_bias_correction_kl: multiply the KL estimate by the ratio.
        kl_estimator: estimate of the KL term in the loss: k1, k2 or k3.
        kl_clip: largest magnitude of that estimate, beyond which it has no gradient (default: none).
        off_policy_mask_threshold: leave out the negative advantages of a completion whose log-probabilities have fallen
            by more than this, nats per token, since it was sampled (DeepSeek-V3.2; default: leave out none).
        covariance_ratio: share of the tokens that clip_cov and kl_cov select (default: 2e-4).
        covariance_low: clip_cov's lower bound of the covariance (default: 1).
        covariance_high: clip_cov's upper bound of the covariance (default: 5).
        covariance_kl: kl_cov's weight of the penalty on the selected tokens (default: 1).
        entropy_coef: weight of the entropy bonus.
        use_adaptive_entropy: adapt that weight after each update, and give the bonus only while the entropy is at most
            entropy_target (Skywork-OR1).
        entropy_target: nats per token.
        entropy_coef_delta: how much the weight rises or falls with each update.
        entropy_coef_min: lower bound of the weight.
        entropy_coef_max: upper bound of the weight.
        top_entropy_quantile: share of the step's tokens, those of highest entropy, that carry the policy gradient;
            below 1, each update costs one more forward.
        sapo_temperature_pos: sapo's temperature for positive advantages.
        sapo_temperature_neg: sapo's temperature for the other advantages.
        vespo_k_pos: vespo's power of the ratio for positive advantages.
        vespo_lambda_pos: vespo's decay with the ratio for positive advantages.
        vespo_k_neg: vespo's power of the ratio for the other advantages.
        vespo_lambda_neg: vespo's decay with the ratio for the other advantages.
        num_iterations: optimizer steps on each generation batch.
        kl_in_reward: subtract beta times a sequence's KL to the reference (k1) from its reward; the loss has no KL.
        sync_ref_model: move the reference policy towards the trained one during training.
        ref_model_sync_steps: steps between two such moves.
        ref_model_mixup_alpha: share of the way that each moves; 1 copies the trained policy.
        reward_baseline: what is subtracted from a reward: the mean of its group or of the others (leave_one_out), the
            group's highest reward (max), or nothing (none); best_only sets all rewards below the highest to 0.
        scale_rewards: divide advantages by the standard deviation of the group, of the batch, of the batch once rewards
            are centred in their groups (whiten), or not at all (none).
        advantage_eps: added to that standard deviation.
        advantage_std: standard deviation with Bessel's correction (sample), as in torch, or without (population), as in
            NumPy.
        relative_weight: weight of a completion's advantage over its group in the sum with the next one.
        baseline_weight: weight of its advantage over the mean reward of the whole batch (scaled like the former, but by
            the batch's deviation), which tells prompts apart and lets groups of equal rewards count.
        incomplete_groups: a completion that no function rewarded has no advantage itself (keep), or its whole group is
            left out of the loss (drop), or it ends the run (error).
        advantage_estimator: advantages in place of reward_baseline and scale_rewards: reinforce_plus_plus,
            reinforce_plus_plus_baseline, opo, gpg, maxrl, remax, pass_at_k, pkpo, grpo_passk, length_penalised or
            grpo_lambda (docs/objectives.md); raft or rejection_sampling, which train only on the best or the correct
            completions; or a function of your own, by dotted path or as ``file.py:function``.
        advantage_k: k of pass_at_k and pkpo (default: 4).
        length_penalty: largest share of a reward that length_penalised and grpo_lambda deduct for length
            (default: 0.2).
        length_penalty_share: share of the prompts, those answered best, in which grpo_lambda penalises length
            (default: 0.2).
        multi_objective_aggregation: sum rewards, then normalise; or normalise each in its group, then their sum in the
            batch (normalize_then_sum, GDPO).
        dynamic_sampling: replace prompts whose completions all have the same reward by others (DAPO).
        max_num_gen_batches: most generation batches for one step, including the first.
        num_generations_kept: train on this many of each prompt's completions only, chosen after they were rewarded
            (default: all).
        keep_generations: which ones: the subset whose rewards vary most (max_variance, PODS), or the shortest or those
            of the highest reward per token (shortest, token_efficiency, GFPO).
        mask_truncated_completions: leave truncated completions out of the loss.
        optim: adamw_torch_fused; adamw_torch_8bit (torchao: 8-bit moments, stochastic rounding of bfloat16 weights);
            adamw_8bit or paged_adamw_8bit (bitsandbytes, GPU). The last three need the extra `lowbit`.
        optim_offload: keep the optimizer's state on the CPU and step there, while the model trains on a GPU.
        learning_rate: peak learning rate of AdamW.
        weight_decay: AdamW's weight decay, on matrices only.
        adam_beta1: AdamW's first decay rate.
        adam_beta2: AdamW's second decay rate.
        adam_epsilon: AdamW's epsilon.
        max_grad_norm: clip the gradient to this norm; 0 for no clipping.
        max_skipped_updates: skip an update whose loss or gradient is not finite, at most this often in a row; then, or
            with 0, the run stops.
        max_steps: number of optimizer steps (default, -1: those of num_train_epochs if that is set, otherwise 100).
        num_train_epochs: length of the run in passes over the training rows, if max_steps is not set.
        lr_scheduler_type: learning-rate schedule, one of transformers'.
        warmup_steps: steps of linear warm-up; below 1, a share of max_steps.
        warmup_ratio: the same as a share of max_steps, if warmup_steps is 0.
        max_tokens_per_microbatch: tokens of one forward and backward, which bound the memory for activations.
        fsdp: processes share weights, gradients and optimizer state (FSDP2) instead of holding all of them (DDP); also
            works with accelerate's own file, ``fsdp_version: 2``.
        padding_free: pack sequences of any length side by side (auto: wherever the model's attention allows it).
        share_prompts: compute a prompt once for all completions of its group (auto: wherever sequences are packed).
        max_buffer_mib: budget for temporary memory in the output head, MiB (default: 256 on CPU, 1024 on GPU, where the
            head may also use a quarter of the free memory).
        bf16: mixed precision with bfloat16 through accelerate.
        use_cpu: stay on the CPU even where there is a GPU.
        seed: seed of the weights, the data order and the sampling.
        output_dir: the run folder (default: runs/NAME-TIME).
        run_name: name of the run (default: the configuration file's).
        logging_steps: write metrics every N steps.
        logging_first_step: also write those of the first step.
        log_completions_steps: write sampled completions every N steps; 0 for never.
        report_to: trackers to log to beside the run folder: tensorboard, wandb, trackio.
        save_steps: write a checkpoint every N steps; 0 for the last step only.
        save_total_limit: number of newest checkpoints to keep.
        keep_best: also keep the checkpoint with the best score on the held-out prompts, measured every eval_steps.
        resume_from_checkpoint: continue from output_dir's newest checkpoint, if there is one (also: ``--resume``).
        script_objects: what a script gave `GRPOTrainer` as objects instead of names, by argument. The trainer writes it
            to config.yaml; the command line cannot repeat such a run.
    """

    model_name_or_path: str = ""
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
    layers_on_host: int = 0
    use_liger_kernel: bool = False
    tiled_mlp: bool = False

    dataset_name: str = ""
    dataset_config: str | None = None
    dataset_kwargs: dict[str, Value] | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    eval_dataset_name: str | None = None
    answer_column: str | None = None
    prompt_template: str | None = None
    prompt_file: str | None = None
    system_prompt: str | None = None
    apply_chat_template: bool = False
    chat_template_kwargs: dict[str, Value] | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    long_prompts: Literal["error", "drop"] = "error"
    shuffle_dataset: bool = True
    pass_rates: str | None = None
    min_pass_rate: float = 0.0
    max_pass_rate: float = 1.0
    prompt_sampling: Literal["uniform", "prioritized", "curriculum"] = "uniform"

    reward_funcs: list[str] | str = field(default_factory=list)
    reward_weights: list[float] | None = None
    reward_timeout: float = 10.0
    on_reward_error: Literal["none", "raise"] = "none"
    code_isolation: Literal["strict", "available", "none"] = "available"
    eval_metric: str | None = None
    eval_steps: int = 0

    num_generations: int = 8
    generation_batch_size: int = UNSET
    per_device_train_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    steps_per_generation: int | None = None
    max_completion_length: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    truncated_support: bool = False
    generation_kwargs: dict[str, Value] | None = None
    thinking_budget: int | None = None
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
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_truncate", "geometric_mask"
    ] = "sequence_mask"
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None
    rollout_rs: (
        Literal[
            "token_k1", "token_k2", "token_k3", "seq_sum_k1", "seq_sum_k2", "seq_sum_k3", "seq_mean_k1", "seq_mean_k2",
            "seq_mean_k3", "seq_max_k2", "seq_max_k3",
        ]
        | None
    ) = None  # fmt: skip
    rollout_rs_threshold: float | None = None
    rollout_rs_threshold_lower: float | None = None
    sync_tolerance: float | None = None
    sample_ahead: bool = False
    max_staleness: int = 0
    max_tokens_per_generation_batch: int = 65536
    speculative_tokens: int = 0

    loss_type: str = "dapo"
    epsilon: float | None = None
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: Literal["token", "sequence", "product"] | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_clip: float | None = None
    off_policy_mask_threshold: float | None = None
    covariance_ratio: float | None = None
    covariance_low: float | None = None
    covariance_high: float | None = None
    covariance_kl: float | None = None
    entropy_coef: float = 0.0
    use_adaptive_entropy: bool = False
    entropy_target: float = 0.2
    entropy_coef_delta: float = 0.005
    entropy_coef_min: float = 0.0
    entropy_coef_max: float = 1.0
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
    scale_rewards: Literal["group", "batch", "whiten", "none"] = "group"
    advantage_eps: float = 1e-4
    advantage_std: Literal["sample", "population"] = "sample"
    relative_weight: float = 1.0
    baseline_weight: float = 0.0
    incomplete_groups: Literal["keep", "drop", "error"] = "keep"
    advantage_estimator: str | None = None
    advantage_k: int | None = None
    length_penalty: float | None = None
    length_penalty_share: float | None = None
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    dynamic_sampling: bool = False
    max_num_gen_batches: int = 10
    num_generations_kept: int | None = None
    keep_generations: Literal["max_variance", "shortest", "token_efficiency"] = "max_variance"
    mask_truncated_completions: bool = False

    optim: Literal["adamw_torch_fused", "adamw_torch_8bit", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch_fused"
    optim_offload: bool = False
    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    max_skipped_updates: int = 0
    max_steps: int = UNSET
    num_train_epochs: float | None = None
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "linear"
    warmup_steps: float = 0
    warmup_ratio: float | None = None
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
    logging_first_step: bool = False
    log_completions_steps: int = 10
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    save_steps: int = 50
    save_total_limit: int = 2
    keep_best: bool = False
    resume_from_checkpoint: bool = False
    script_objects: dict[str, str] | None = None

    # The command that takes such a configuration, the fields that it does not use, and whether it trains on rewards.
    command: ClassVar[str] = "train"
    unused_fields: ClassVar[frozenset[str]] = frozenset()
    needs_rewards: ClassVar[bool] = True

    def __post_init__(self):
        check_kinds(self)
        translate(self)
        for name in _PATH_FIELDS:
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, os.path.expanduser(value))
        if isinstance(self.reward_funcs, str):
            self.reward_funcs = split_names(self.reward_funcs)
        resolve_sizes(self)
        check_config(self)

    @property
    def uses_reference(self) -> bool:
        """Whether the run has a reference policy, for a KL term in the loss or in the reward."""
        return self.kl_in_reward or self.objective().uses_reference

    @property
    def corrects_sampler(self) -> bool:
        """Whether the loss is weighted by the ratio of the trainer's to the sampler's probabilities."""
        return self.use_vllm and self.vllm_importance_sampling_correction

    @property
    def uses_sampling_logprobs(self) -> bool:
        """Whether the loss needs the sampler's log-probabilities."""
        masks = self.rollout_rs is not None or self.off_policy_mask_threshold is not None
        return self.corrects_sampler or (self.use_vllm and masks)

    @property
    def prompts_per_step(self) -> int:
        """The prompts of a generation batch."""
        return self.generation_batch_size // self.num_generations

    @property
    def parts_per_batch(self) -> int:
        """How many optimizer steps share the completions of a generation batch."""
        return self.generation_batch_size // completions_per_step(self)

    @property
    def updates_per_batch(self) -> int:
        """Optimizer steps on a generation batch, each part of which is used `num_iterations` times."""
        return self.parts_per_batch * self.num_iterations

    @property
    def max_buffer_bytes(self) -> int | None:
        return None if self.max_buffer_mib is None else self.max_buffer_mib << 20

    def objective(self) -> PolicyObjective:
        """The objective of `loss_type` with the fields that were set; with `kl_in_reward` the loss has no KL term.

        Loads the user's own function, if `loss_type` names one; a UserError refuses one that cannot be used.
        """
        if self.loss_type in PRESETS:
            preset = PRESETS[self.loss_type]
        else:
            preset = _own_objective(self.loss_type, os.getcwd(), time_of_change(self.loss_type))
        # A preset alone sets `kind` and `aggregation`, which are no fields here.
        changes = {
            field.name: getattr(self, _TRL_NAMES.get(field.name, field.name), None)
            for field in dataclasses.fields(preset)
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        if self.kl_in_reward:
            changes["beta"] = 0.0
        if self.use_adaptive_entropy:
            # The largest bonus of an update: all completions count for the entropy.
            changes["entropy_coef"] = self.entropy_coef_max
        check_objective_settings(self, preset)
        return dataclasses.replace(preset, **changes)


@lru_cache(maxsize=16)
def _own_objective(name: str, folder: str, changed: float) -> PolicyObjective:
    """The user's loss function, or the objective that was made of it, as of a working folder and a time of change."""
    found = load_function(name, "loss_type", lambda one: callable(one) or isinstance(one, PolicyObjective))
    if isinstance(found, PolicyObjective):
        return found
    try:
        return function_objective(found)
    except (TypeError, ValueError) as error:
        raise UserError(f"loss_type: {one_line(error)}") from None
