"""The fields of supervised fine-tuning: those of `GRPOConfig` that it uses, and its own under TRL's names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from grpo_fast.config.fields import GRPOConfig, names_checked, refuse_unused, with_inherited_fields
from grpo_fast.config.sizes import UNSET, completions_per_step
from grpo_fast.errors import UserError, shown

# Passes over the data of a run that sets no length (TRL's default).
DEFAULT_EPOCHS = 3.0
# All that supervised fine-tuning uses of `GRPOConfig`, so that a new field of sampling, rewards or the objective is
# refused here until it has an effect.
_USED = {
    "model_name_or_path", "dtype", "attn_implementation", "trust_remote_code", "model_init_kwargs", "use_peft",
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "use_rslora", "load_in_4bit", "bnb_4bit_quant_type",
    "use_bnb_nested_quant", "gradient_checkpointing", "activation_offloading", "layers_on_host", "use_liger_kernel",
    "tiled_mlp", "dataset_name", "dataset_config", "dataset_kwargs", "dataset_train_split", "dataset_test_split",
    "eval_dataset_name", "answer_column", "prompt_template", "prompt_file", "system_prompt", "apply_chat_template",
    "chat_template_kwargs", "max_train_samples", "max_eval_samples", "shuffle_dataset", "eval_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "optim_offload", "learning_rate",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "max_skipped_updates", "max_steps",
    "num_train_epochs", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "max_tokens_per_microbatch", "fsdp",
    "padding_free", "max_buffer_mib", "bf16", "use_cpu", "seed", "output_dir", "run_name", "logging_steps",
    "logging_first_step", "report_to", "save_steps", "save_total_limit", "keep_best", "resume_from_checkpoint",
}  # fmt: skip
UNUSED_FIELDS = frozenset(f.name for f in dataclasses.fields(GRPOConfig)) - _USED


@with_inherited_fields
@names_checked
@dataclass
class SFTConfig(GRPOConfig):
    """A run of supervised fine-tuning.

    Args:
        max_length: longest example, in tokens; a longer one is cut at its end, and one that has nothing to learn from
            left is left out. The run says how many. None: the model's positions.
        packing: put examples side by side in one row without padding. Each attends to itself alone, so the loss does
            not change; a batch counts examples, whatever rows they are in. False pads them.
        dataset_text_field: the column of plain text to learn from, in data without prompts.
        completion_only_loss: learn the completion alone (default, for a prompt with its completion), or the prompt,
            too. Text and messages without a prompt have no completion.
        assistant_only_loss: in messages, learn the assistant's turns alone.
        min_reward: use only the rows whose column ``reward`` is at least this, and each of them once: rejection
            sampling, from the samples that ``grpo-fast eval --split train`` leaves.
        answer_column: the column that is learned, where there is no ``completion`` (default: ``answer``; in Alpaca's
            data ``output``); ``reward_model.ground_truth`` is part of a column.
        per_device_train_batch_size: examples of one process in an optimizer step, times gradient_accumulation_steps.
            How many are computed at once follows from max_tokens_per_microbatch.
        gradient_accumulation_steps: see per_device_train_batch_size.
        max_steps: number of optimizer steps (default, -1: those of num_train_epochs).
        num_train_epochs: length of the run in passes over the training rows, if max_steps is not set (default: 3).
        keep_best: also keep the checkpoint with the lowest loss on the held-out rows, measured every eval_steps.
    """

    max_length: int | None = 1024
    packing: bool = True
    dataset_text_field: str = "text"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    min_reward: float | None = None

    learning_rate: float = 2e-5
    per_device_train_batch_size: int | None = 8
    num_generations: int = 1
    loss_type: str = "reinforce"

    command: ClassVar[str] = "sft"
    unused_fields: ClassVar[frozenset[str]] = UNUSED_FIELDS
    needs_rewards: ClassVar[bool] = False

    def __post_init__(self):
        refuse_unused(self, UNUSED_FIELDS, "supervised fine-tuning")
        if self.max_steps == UNSET and self.num_train_epochs is None:
            self.num_train_epochs = DEFAULT_EPOCHS
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"max_length={shown(self.max_length)} is not allowed: it must be at least 2")
        if self.packing and self.padding_free == "never":
            raise UserError("padding_free='never' pads the examples, so it requires packing=False")
        if not self.packing:
            if self.padding_free == "always":
                raise UserError("padding_free='always' requires packing=True")
            self.padding_free = "never"
        super().__post_init__()
        # Other fields decide it.
        self.generation_batch_size = UNSET

    @property
    def prompts_per_step(self) -> int:
        """The examples of an optimizer step."""
        return completions_per_step(self)

    @property
    def parts_per_batch(self) -> int:
        return 1
