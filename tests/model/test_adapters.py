"""LoRA and QLoRA: what is trained, what is refused, and what the reference policy is."""

import copy
import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from grpo_fast.cli import main, parse_config
from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.model.loading import adapter_fields, add_adapter, base_config, digit_tokenizer, load_model, load_trained
from grpo_fast.rollout.vllm import serve
from grpo_fast.trainer import GRPOTrainer
from support.small import SMALL, weights
from support.tiny import tiny_model


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "model")


def save_model(folder):
    """Save a model for digit tasks, large enough for 4-bit blocks of 64 weights."""
    tokenizer = digit_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=0, pad_token_id=0, bos_token_id=None, initializer_range=0.1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config(**fields):
    return GRPOConfig(**{**SMALL, "use_peft": True, **fields})


def frozen(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def test_add_adapter_covers_every_linear_layer_except_the_head():
    model = tiny_model()
    add_adapter(model, config(lora_r=4, lora_alpha=8))
    trained = {
        name.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad
    }
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    q = model.model.layers[0].self_attn.q_proj
    assert q.lora_A["default"].weight.shape == (4, 32)
    assert q.scaling["default"] == 2


@pytest.mark.parametrize(
    ("targets", "tied", "message"),
    [
        (["lm_head"], False, "lm_head is the output head"),
        (["q_proj", "lm_head"], True, "lm_head is the output head"),
        (["embed_tokens"], True, "embed_tokens is tied to the output head"),
        (["no_such"], False, "no_such"),
    ],
)
def test_add_adapter_refuses_the_head_and_unknown_modules(targets, tied, message):
    with pytest.raises(UserError, match=message):
        add_adapter(tiny_model(tie_word_embeddings=tied), config(lora_target_modules=targets))


@pytest.mark.parametrize("four_bit", [False, True], ids=["lora", "qlora"])
def test_run_trains_the_adapter_only_and_its_reference_has_none(tmp_path, folder, four_bit):
    fields = {"model_name_or_path": str(folder), "model_init_kwargs": None, "output_dir": str(tmp_path / "run")}
    made = GRPOTrainer(config(**fields, load_in_4bit=four_bit, beta=0.1, learning_rate=1e-2))
    if four_bit:
        import bitsandbytes

        assert isinstance(made.model.model.layers[0].mlp.up_proj.base_layer, bitsandbytes.nn.Linear4bit)
    assert made.learner.reference is None
    before = frozen(made.model)
    batch, _ = made.collect()
    own = made.learner.score(made.learner.policy.eval(), batch)
    torch.testing.assert_close(batch.ref_logprobs, own)
    made.learner.update(batch)
    torch.testing.assert_close(made.learner.score_reference(batch), batch.ref_logprobs, rtol=0, atol=0)
    assert (made.learner.score(made.learner.policy.eval(), batch) - own).abs().max() > 1e-3
    assert all(torch.equal(before[name], value) for name, value in frozen(made.model).items())


def test_four_bit_weights_propagate_gradients(folder):
    """After sampling, too: every adapter's gradient is the one with the same weights, dequantised."""
    import bitsandbytes

    fields = {"model_name_or_path": str(folder), "model_init_kwargs": None}
    gradients = []
    for widened in (False, True):
        model, _ = load_model(config(**fields, load_in_4bit=True))
        if widened:
            for name, module in list(model.named_modules()):
                if isinstance(module, bitsandbytes.nn.Linear4bit):
                    weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                    linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
                    linear.weight.data = weight.float()
                    model.set_submodule(name, linear)
        torch.manual_seed(1)
        add_adapter(model, config(**fields, lora_r=4))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter) / 8
        ids = torch.tensor([[3, 4, 1, 4, 3, 7]])
        with torch.no_grad():
            model.eval()(input_ids=ids)
        model.train()(input_ids=ids).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[1].items():
        assert expected.norm() > 0
        assert (gradients[0][name] - expected).norm() <= 1e-4 * expected.norm(), name


def test_run_with_an_adapter_saves_one_that_loads(tmp_path, folder):
    run = config(
        model_name_or_path=str(folder), model_init_kwargs=None, learning_rate=1e-2, max_steps=2,
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    made = GRPOTrainer(run)
    made.train()
    base, _ = load_model(run)
    loaded = PeftModel.from_pretrained(base, tmp_path / "run" / "checkpoint-2").eval()
    ids = torch.tensor([[3, 4, 1, 4, 3]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, made.model.eval()(input_ids=ids).logits)
    files = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files


def test_load_in_4bit_requires_a_folder_and_an_adapter(tmp_path, capsys):
    with pytest.raises(UserError, match="load_in_4bit requires a folder or hub name, got the built-in"):
        load_model(config(load_in_4bit=True))
    assert main(["train", "--dataset_name", "sort_digits", "--reward_funcs", "[exact_answer]", "--load_in_4bit", "true",
                 "--model_name_or_path", "x"]) == 2  # fmt: skip
    assert "load_in_4bit requires use_peft" in capsys.readouterr().err


def base_fields(folder, output_dir, **fields):
    return {"model_name_or_path": str(folder), "model_init_kwargs": None, "output_dir": str(output_dir), **fields}


def adapter_tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def active_tensors(made):
    return get_peft_model_state_dict(made.learner.adapter, save_embedding_layers=False)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run with an adapter of rank 4 on a model in a folder; tests must not change it."""
    place = tmp_path_factory.mktemp("begun")
    folder = save_model(place / "model")
    fields = {"lora_r": 4, "lora_alpha": 12, "lora_target_modules": ["q_proj", "up_proj"], "learning_rate": 0.05}
    GRPOTrainer(config(**base_fields(folder, place / "run", max_steps=2, **fields))).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return place


def test_training_continues_from_an_adapter(begun, tmp_path, capsys):
    first, run = begun / "run" / "checkpoint-2", tmp_path / "run"
    fields = base_fields(first, run, learning_rate=0.05, max_steps=2, save_steps=1)
    made = GRPOTrainer(config(**fields))
    assert_same(active_tensors(made), adapter_tensors(first))
    assert any(tensor.abs().max() > 0 for name, tensor in adapter_tensors(first).items() if "lora_B" in name)
    assert (made.config.lora_r, made.config.lora_alpha) == (4, 12)
    assert made.config.lora_target_modules == ["q_proj", "up_proj"]
    kept = frozen(made.model)
    made.train()
    printed = capsys.readouterr().out.replace("\n", " ")
    assert f"training the adapter {first} of {begun / 'model'} further, with its own lora_r 4, lora_alpha 12" in printed
    assert all(torch.equal(kept[name], value) for name, value in frozen(made.model).items())
    trained = adapter_tensors(run / "checkpoint-2")
    assert all((tensor != adapter_tensors(first)[name]).any() for name, tensor in trained.items())
    written = json.loads((run / "checkpoint-2" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["r"]) == (str(begun / "model"), 4)
    assert parse_config([str(run / "config.yaml")]).lora_r == 4
    base, _ = load_model(config(**base_fields(begun / "model", run)))
    loaded = PeftModel.from_pretrained(base, run / "checkpoint-2").eval()
    ids = torch.tensor([[3, 4, 1, 4, 3]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, made.model.eval()(input_ids=ids).logits)
    # Truncated to its first step and resumed, the run ends with the same weights.
    shutil.rmtree(run / "checkpoint-2")
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed = GRPOTrainer(config(**fields, resume_from_checkpoint=True))
    assert resumed.step == 1
    resumed.train()
    assert_same(adapter_tensors(run / "checkpoint-2"), trained)


def test_reference_is_the_adapter_at_the_start(begun, tmp_path):
    first = begun / "run" / "checkpoint-2"
    made = GRPOTrainer(config(**base_fields(first, tmp_path / "run", beta=0.1, learning_rate=0.05, max_steps=1)))
    assert made.learner.reference is None
    batch, _ = made.collect()
    policy = made.learner.policy.eval()
    torch.testing.assert_close(batch.ref_logprobs, made.learner.score(policy, batch))
    with made.learner.adapter.disable_adapter():
        assert (batch.ref_logprobs - made.learner.score(policy, batch)).abs().max() > 1e-3
    made.learner.update(batch)
    policy.eval()
    torch.testing.assert_close(made.learner.score_reference(batch), batch.ref_logprobs, rtol=0, atol=0)
    assert (made.learner.score(policy, batch) - batch.ref_logprobs).abs().max() > 1e-3
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".default." in name for name in trained)
    made.train()
    saved = tmp_path / "run" / "checkpoint-1"
    assert not [path for path in saved.iterdir() if path.is_dir()]
    assert_same(adapter_tensors(saved), active_tensors(made))


KINDS = {
    "dora": LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True, lora_dropout=0.1),
    "ranks": LoraConfig(r=2, target_modules=r".*\.(q|v)_proj", rank_pattern={"v_proj": 3}, bias="lora_only"),
    "embedding": LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], modules_to_save=["norm"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def foreign(begun, folder, kind):
    """An adapter that was saved elsewhere, with weights that are not zero."""
    base, _ = load_model(config(**base_fields(begun / "model", folder)))
    kind = copy.deepcopy(kind)
    kind.task_type = "CAUSAL_LM"
    adapted = get_peft_model(base, kind)
    torch.manual_seed(3)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("kind", KINDS)
def test_training_continues_from_adapters_of_other_kinds(begun, tmp_path, kind):
    theirs = foreign(begun, tmp_path / "theirs", KINDS[kind]).eval()
    fields = base_fields(tmp_path / "theirs", tmp_path / "run", learning_rate=0.05, max_steps=2)
    if kind == "ranks":
        with pytest.raises(UserError, match=r"beta=0.1 needs a copy of the adapter .* peft refuses: .*1 adapter"):
            GRPOTrainer(config(**fields, beta=0.1))
    made = GRPOTrainer(config(**fields, beta=0.0 if kind == "ranks" else 0.1))
    ids = torch.tensor([[3, 4, 1, 4, 3]])
    with torch.no_grad():
        torch.testing.assert_close(made.model.eval()(input_ids=ids).logits, theirs(input_ids=ids).logits)
    before = {name: tensor.clone() for name, tensor in active_tensors(made).items()}
    made.train()
    assert all((tensor != before[name]).any() for name, tensor in active_tensors(made).items())
    assert_same(adapter_tensors(tmp_path / "run" / "checkpoint-2"), active_tensors(made))
    base, _ = load_model(config(**base_fields(begun / "model", tmp_path)))
    again = PeftModel.from_pretrained(base, tmp_path / "run" / "checkpoint-2").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, made.model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"use_peft": False},
            r"checkpoint-2' is an adapter of '.*model': set use_peft to train it further; to train all",
        ),
        (
            {"lora_r": 3},
            "lora_r=3 differs from 4 of the adapter .*checkpoint-2, which is trained as it is; leave lora_r out",
        ),
        ({"lora_alpha": 8}, "lora_alpha=8 differs from 12 of the adapter"),
        (
            {"lora_target_modules": ["q_proj"]},
            r"lora_target_modules=\['q_proj'\] differs from \['q_proj', 'up_proj'\] of",
        ),
        ({"use_rslora": True}, "use_rslora=True differs from False of the adapter"),
        ({"lora_dropout": 0.5}, "lora_dropout=0.5 differs from 0.0 of the adapter"),
    ],
)
def test_adapter_fields_that_differ_are_refused(begun, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        GRPOTrainer(config(**base_fields(begun / "run" / "checkpoint-2", tmp_path), **fields))


def test_adapter_fields_that_agree_are_accepted(begun, tmp_path):
    fields = {"lora_r": 4, "lora_alpha": 12, "lora_target_modules": ["up_proj", "q_proj"]}
    run = adapter_fields(config(**base_fields(begun / "run" / "checkpoint-2", tmp_path), **fields))
    assert (run.lora_r, run.lora_target_modules) == (4, ["q_proj", "up_proj"])
    assert adapter_fields(config()) == config()


def test_adapter_fields_of_all_linear_layers_are_names(begun, tmp_path):
    """peft saves the path of every module."""
    foreign(begun, tmp_path / "theirs", LoraConfig(r=2, target_modules="all-linear"))
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    for given in (None, names[::-1]):
        run = adapter_fields(config(**base_fields(tmp_path / "theirs", tmp_path), lora_target_modules=given))
        assert run.lora_target_modules == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": "gone"}, "the base model of the adapter .*: model_name_or_path='gone' is neither"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "SELF"}, "the base of the adapter .* is itself an adapter; merge that one"),
        ({"r": 5}, "the adapter .* does not fit '.*model': .*size mismatch"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, "PROMPT_TUNING adds virtual tokens to the input"),
        ({"peft_type": "NO_SUCH"}, "adapter_config.json is not valid"),
    ],
)
@pytest.mark.parametrize("use", [GRPOTrainer, load_trained], ids=["train", "eval"])
def test_adapter_errors_name_the_adapter(begun, tmp_path, change, message, use):
    folder = tmp_path / "adapter"
    shutil.copytree(begun / "run" / "checkpoint-2", folder)
    path = folder / "adapter_config.json"
    text = json.dumps({**json.loads(path.read_text()), **change}).replace("SELF", str(folder))
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        use(config(**base_fields(folder, tmp_path / "run")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("targets", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_train_adapter_refuses_an_adapter_of_the_head(begun, tmp_path, targets):
    foreign(begun, tmp_path / "theirs", LoraConfig(r=2, **{"target_modules": ["q_proj"], **targets}))
    with pytest.raises(UserError, match=r"the adapter .*theirs: lm_head is the output head, which the fused loss"):
        GRPOTrainer(config(**base_fields(tmp_path / "theirs", tmp_path / "run")))


def test_load_model_prefers_the_adapters_tokenizer(begun, tmp_path):
    foreign(begun, tmp_path / "theirs", LoraConfig(r=2, target_modules=["q_proj"]))
    fields = base_fields(tmp_path / "theirs", tmp_path)
    assert load_model(config(**fields))[1].chat_template is None
    tokenizer = digit_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}>"
    tokenizer.save_pretrained(tmp_path / "theirs")
    assert load_model(config(**fields))[1].chat_template == tokenizer.chat_template


def test_load_trained_finds_random_base_weights_for_any_seed(tmp_path):
    name, fields = "random-llama", {"learning_rate": 0.05, "max_steps": 1}
    for number in (1, 2):
        folder = tmp_path / str(number)
        made = GRPOTrainer(config(**fields, model_name_or_path=name, seed=number, output_dir=str(folder)))
        made.train()
        AcceleratorState._reset_state(reset_partial_state=True)
        name = str(folder / "checkpoint-1")
        fields["model_init_kwargs"] = None
        found, _ = load_trained(config(**fields, model_name_or_path=name, seed=7))
        assert torch.equal(weights(found), weights(made.model))


def test_plan_reads_the_base_of_an_adapter(begun, capsys):
    arguments = ["--model", str(begun / "run" / "checkpoint-2"), "--vram", "24GiB", "--prompt_tokens", "8"]
    assert main(["plan", *arguments, "--use_peft", "true", "--max_completion_length", "8"]) == 0
    trained = sum(tensor.numel() for tensor in adapter_tensors(begun / "run" / "checkpoint-2").values())
    assert f"{trained:,} trained" in capsys.readouterr().out
    assert main(["plan", *arguments]) == 2
    assert "set use_peft to train it further" in capsys.readouterr().err
    assert base_config(config(**base_fields(begun / "run" / "checkpoint-2", begun))).model_name_or_path == str(
        begun / "model"
    )


def test_server_loads_the_base_of_an_adapter(begun, tmp_path, monkeypatch):
    # vLLM, which need not be installed here, says whether it takes adapters.
    monkeypatch.setattr(serve, "require_extra", lambda *_: None)
    monkeypatch.setattr(serve, "_adapter_options", lambda *_: {})
    fields = base_fields(begun / "run" / "checkpoint-2", tmp_path, use_vllm=True, vllm_mode="server")
    command = serve.server_command(config(**fields, trust_remote_code=True), tmp_path)
    assert command[command.index("--model") + 1] == str(begun / "model")
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 64
    with pytest.raises(UserError, match="set use_peft to train it further"):
        serve.server_command(config(**fields | {"use_peft": False}), tmp_path)
