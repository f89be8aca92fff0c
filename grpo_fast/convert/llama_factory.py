"""LLaMA-Factory's fields, and its ``dataset_info.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_fast.convert.rows import NoCounterpart, Row, Theirs, Trainer, choice, fixed
from grpo_fast.convert.trl import TRAINER_NOT_NEEDED, TRAINER_ROWS, epochs
from grpo_fast.errors import one_line, shown
from grpo_fast.files import parse_json

# The folder of the file that is converted, and the number of processes, put among its fields by the command.
FOLDER, PROCESSES = "folder", "processes"
# ShareGPT's tags that are read without being told.
_TAGS = {
    "role_tag": ("from", "role"), "content_tag": ("value", "content"), "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"), "system_tag": ("system",),
}  # fmt: skip


def _dataset(theirs: Theirs) -> dict[str, Any]:
    """What ``dataset_info.json`` says about the dataset."""
    if "dataset" not in theirs:
        return {}
    names = theirs["dataset"] if isinstance(theirs["dataset"], list) else str(theirs["dataset"]).split(",")
    if len(names) > 1:
        raise NoCounterpart("dataset_name takes one file: write the rows of all datasets to one")
    name, folder = str(names[0]).strip(), str(theirs.get("dataset_dir", "data"))
    # Relative to the current folder, as there; or to the file's own.
    places = [path / folder / "dataset_info.json" for path in (Path(), Path(theirs[FOLDER]))]
    place = next((path for path in places if path.is_file()), None)
    if place is None:
        raise NoCounterpart(f"set dataset_name to the data's file: {places[0]} does not exist")
    try:
        known = parse_json(place.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise NoCounterpart(f"set dataset_name to the data's file: {place} is not JSON: {one_line(error)}") from None
    info = known.get(name) if isinstance(known, dict) else None
    if not isinstance(info, dict):
        raise NoCounterpart(f"set dataset_name to the data's file: {place} has no {shown(name)}")
    return _source(info, place.parent) | _columns(info)


def _source(info: dict[str, Any], folder: Path) -> dict[str, Any]:
    if info.get("ranking") or info.get("columns", {}).get("kto_tag"):
        raise NoCounterpart("preference data has no right answers; use data with prompts and answers")
    if info.get("hf_hub_url"):
        made = {"dataset_name": info["hf_hub_url"]}
        fields = {"subset": "dataset_config", "split": "dataset_train_split"}
        return made | {ours: info[name] for name, ours in fields.items() if info.get(name)}
    if not info.get("file_name"):
        raise NoCounterpart("set dataset_name to a file or a hub name; scripts and ModelScope are not read")
    return {"dataset_name": str(folder / info["file_name"])}


def _columns(info: dict[str, Any]) -> dict[str, Any]:
    columns = {name: column for name, column in info.get("columns", {}).items() if column}
    if info.get("formatting", "alpaca") == "sharegpt":
        odd = [name for name, tag in info.get("tags", {}).items() if tag not in _TAGS.get(name, (tag,))]
        if odd or columns.get("messages", "conversations") not in ("conversations", "messages"):
            raise NoCounterpart("rename the columns and tags of the data to ShareGPT's: conversations, from, value")
        return {}
    prompt, query, response = (
        columns.get(name, usual)
        for name, usual in (("prompt", "instruction"), ("query", "input"), ("response", "output"))
    )
    made = {} if response == "output" else {"answer_column": response}
    if prompt == "instruction" and query == "input":
        return made
    used = f"{{{prompt}}}\n{{{query}}}" if "query" in columns else f"{{{prompt}}}"
    return made | {"prompt_template": used, "answer_column": response}


def _templates(theirs: Theirs) -> dict[str, Any]:
    return {} if theirs["template"] == "empty" else {"apply_chat_template": True}


def _target(theirs: Theirs) -> dict[str, Any]:
    given = theirs["lora_target"]
    names = given if isinstance(given, list) else [name.strip() for name in str(given).split(",")]
    return {} if names == ["all"] else {"lora_target_modules": names}


def _bits(theirs: Theirs) -> dict[str, Any]:
    if theirs.get("quantization_bit") is None:
        return {}
    if int(theirs["quantization_bit"]) != 4:
        raise NoCounterpart("use 4 bits (load_in_4bit), or none")
    made = {"load_in_4bit": True, "bnb_4bit_quant_type": theirs.get("quantization_type", "nf4")}
    return made | {"use_bnb_nested_quant": theirs.get("double_quantization", True)}


def _val_size(theirs: Theirs) -> dict[str, Any]:
    if theirs.get("eval_dataset") is not None:
        raise NoCounterpart("set eval_dataset_name to the file")
    return {}


def _completions(theirs: Theirs) -> dict[str, Any]:
    each = int(theirs.get("per_device_train_batch_size", 8)) * int(theirs.get("gradient_accumulation_steps", 1))
    return {"generation_batch_size": each * int(theirs.get("ppo_buffer_size", 1)) * theirs[PROCESSES]}


def _repetition(theirs: Theirs) -> dict[str, Any]:
    return {"generation_kwargs": {"repetition_penalty": theirs["repetition_penalty"]}}


def _attention(theirs: Theirs) -> dict[str, Any]:
    names = {"auto": {}, "disabled": {"attn_implementation": "eager"}, "sdpa": {"attn_implementation": "sdpa"}}
    return names | {"fa2": {"attn_implementation": "flash_attention_2"}}


def _precision(theirs: Theirs) -> dict[str, Any]:
    return {"dtype": "bfloat16"} if theirs["pure_bf16"] else {}


def _defaults(theirs: Theirs) -> dict[str, Any]:
    made: dict[str, Any] = {"logging_steps": 500, "save_steps": 500, **epochs(theirs)}
    if theirs.get("stage") == "ppo":
        # A learning rate of supervised fine-tuning means nothing here.
        made["learning_rate"] = 5e-5
    if not {"per_device_train_batch_size", "gradient_accumulation_steps"} & set(theirs):
        made |= _completions(theirs)
    made["gradient_checkpointing"] = not theirs.get("disable_gradient_checkpointing", False)
    if theirs.get("finetuning_type", "lora") == "lora":
        rank = theirs.get("lora_rank", 8)
        made |= {"use_peft": True, "lora_r": rank, "lora_alpha": theirs.get("lora_alpha") or 2 * int(rank)}
    return made


LLAMA_FACTORY = Trainer(
    "LLaMA-Factory",
    ("stage", "finetuning_type", "template", "cutoff_len", "dataset_dir", "lora_target"),
    (
        Row(("adapter_name_or_path",), ("model_name_or_path",), "with `use_peft: true`"),
        Row(("stage",), (), "GRPO takes the place of `ppo` and follows on `sft`; set `reward_funcs`",
            choice("stage", {"ppo": {}, "sft": {}},
                   "GRPO needs prompts and reward_funcs: convert the file of an sft or ppo run")),
        Row(("finetuning_type",), ("use_peft",), "`lora` or `full`",
            choice("finetuning_type", {"lora": {"use_peft": True}, "full": {"use_peft": False}},
                   "set use_peft: true for LoRA, or false for all weights")),
        Row(("lora_rank",), ("lora_r",), "8 by default there"),
        Row(("lora_target",), ("lora_target_modules",), "`all`, the default: all linear layers but the head", _target),
        Row(("quantization_bit", "quantization_type", "double_quantization"),
            ("load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"), "4 bits", _bits),
        Row(("template",), ("apply_chat_template",),
            "the tokenizer's own chat template; `empty` leaves the text as it is", _templates),
        Row(("default_system",), ("system_prompt",)),
        Row(("enable_thinking",), ("chat_template_kwargs",), "`{enable_thinking: false}`",
            lambda theirs: {"chat_template_kwargs": {"enable_thinking": theirs["enable_thinking"]}}),
        Row(("dataset", "dataset_dir"), ("dataset_name", "answer_column"),
            "the file or hub name that `dataset_info.json` gives; Alpaca's and ShareGPT's columns are "
            "[read as they are](rewards-and-data.md#data)", _dataset),
        Row(("eval_dataset", "val_size"), ("eval_dataset_name",),
            "a file; without it about a tenth of the rows, at most 200", _val_size),
        Row(("max_samples",), ("max_train_samples",)),
        Row(("cutoff_len",), ("long_prompts",), "never cut: `error` or `drop`", lambda _: {}),
        Row(("max_new_tokens",), ("max_completion_length",)),
        Row(("repetition_penalty",), ("generation_kwargs",),
            "beside `temperature`, `top_p` and `top_k`, whose defaults differ: here 1.0, 1.0, 0", _repetition),
        Row(("per_device_train_batch_size", "gradient_accumulation_steps", "ppo_buffer_size"),
            ("generation_batch_size",), "completions of a step: their product times the number of processes",
            _completions),
        Row(("ppo_epochs",), ("num_iterations",)),
        Row(("ppo_target",), ("beta",), "a constant weight of the KL term",
            lambda _: _refuse("set beta, a constant weight of the KL term; there is no target")),
        Row(("ppo_score_norm", "ppo_whiten_rewards"), ("scale_rewards",), "`batch` whitens",
            lambda theirs: {"scale_rewards": "batch"} if theirs.get("ppo_whiten_rewards") else {}),
        Row(("ref_model",), (), "the reference is the initial policy"),
        Row(("reward_model", "reward_model_type"), ("reward_funcs",),
            "a sequence classifier as `owner/name`, besides functions",
            lambda _: _refuse("name a sequence classifier in reward_funcs, as owner/name or as a folder")),
        Row(("flash_attn",), ("attn_implementation",), "packed attention uses flash-attn where it is installed",
            lambda theirs: choice("flash_attn", _attention(theirs))(theirs)),
        Row(("enable_liger_kernel",), ("use_liger_kernel",)),
        Row(("disable_gradient_checkpointing",), ("gradient_checkpointing",), "off by default here",
            lambda theirs: {"gradient_checkpointing": not theirs["disable_gradient_checkpointing"]}),
        Row(("upcast_lmhead_output",), (), "logits are float32 in any case", lambda _: {}),
        Row(("rope_scaling",), ("model_init_kwargs",),
            "as in [`qwen3_8b_gsm8k_80gb_lora_64k`](../grpo_fast/recipes/qwen3_8b_gsm8k_80gb_lora_64k.yaml)",
            lambda theirs: {} if theirs["rope_scaling"] is None else _refuse(
                "set model_init_kwargs, as the recipe qwen3_8b_gsm8k_80gb_lora_64k does")),
        Row(("pure_bf16",), ("dtype",), "weights in bfloat16; `bf16` is mixed precision", _precision),
        Row(("infer_backend",), ("use_vllm",), "`vllm`, or transformers",
            choice("infer_backend", {"vllm": {"use_vllm": True}, "huggingface": {}}, "set use_vllm: true")),
        Row(("vllm_maxlen", "vllm_gpu_util"), ("vllm_max_model_length", "vllm_gpu_memory_utilization")),
        Row(("packing", "neat_packing"), ("padding_free",), "on where the model allows it", lambda _: {}),
        Row(("use_galore", "use_apollo", "use_badam", "use_muon"), ("optim",), "AdamW in four forms"),
        Row(("use_dora",), (), "use `use_rslora`, or neither", fixed("use_dora", False, "use use_rslora, or neither")),
        *TRAINER_ROWS,
    ),
    (*TRAINER_NOT_NEEDED, "plot_loss", "tokenized_path", "do_predict", "predict_with_generate", "run_eval"),
    _defaults,
)  # fmt: skip


def _refuse(advice: str) -> dict[str, Any]:
    raise NoCounterpart(advice)
