"""LoRA and QLoRA: what is trained, what is refused, and what the reference policy is."""

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig

from grpo_fast.cli import main
from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.models import add_adapter, digit_tokenizer, load_model
from grpo_fast.trainer import GRPOTrainer
from test_trainer import SMALL
from tiny import tiny_model


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    # accelerate keeps its precision for the life of a process.
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def folder(tmp_path):
    """A saved model for digit tasks, large enough for 4-bit blocks of 64 weights."""
    tokenizer = digit_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=0, pad_token_id=0, bos_token_id=None, initializer_range=0.1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def config(**fields):
    return GRPOConfig(**{**SMALL, "use_peft": True, **fields})


def frozen(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def test_every_linear_layer_but_the_head_has_an_adapter():
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
        (["q_proj", "lm_head"], True, "lm_head is tied to the output head|lm_head.*is tied to the output head"),
        (["embed_tokens"], True, "embed_tokens is tied to the output head"),
        (["no_such"], False, "no_such"),
    ],
)
def test_adapters_that_would_stay_untrained_are_refused(targets, tied, message):
    with pytest.raises(UserError, match=message):
        add_adapter(tiny_model(tie_word_embeddings=tied), config(lora_target_modules=targets))


@pytest.mark.parametrize("four_bit", [False, True], ids=["lora", "qlora"])
def test_only_the_adapter_is_trained_and_the_reference_is_the_model_without(tmp_path, folder, four_bit):
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


def test_four_bit_weights_pass_the_gradient_on(folder):
    """After sampling too: the gradient of every adapter is that beside the same weights, widened."""
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


def test_a_run_with_an_adapter_ends_in_one_that_loads(tmp_path, folder):
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


def test_four_bits_need_a_folder_and_an_adapter(tmp_path, capsys):
    with pytest.raises(UserError, match="load_in_4bit goes with a folder or hub name"):
        load_model(config(load_in_4bit=True))
    assert main(["train", "--dataset_name", "sort_digits", "--reward_funcs", "[exact_answer]", "--load_in_4bit", "true",
                 "--model_name_or_path", "x"]) == 2  # fmt: skip
    assert "load_in_4bit goes with use_peft" in capsys.readouterr().err
