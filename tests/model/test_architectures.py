"""FusedPolicy compared with the model's own logits, from random weights, for many architectures."""

from typing import NamedTuple

import pytest
import torch
import transformers
from packaging.version import Version

from grpo_fast.errors import UserError
from grpo_fast.model.policy import FusedPolicy
from support.architectures import HEADS, IMAGE, MULTIMODAL, ROUTER, VOCAB, WINDOW
from support.tiny import SMALL

LENGTHS = (11, 6, 9)
WIDTH = 12
SEGMENTS = torch.tensor([0, 11, 17, 26])

EXPERTS = {**ROUTER, "num_experts": 4, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {**ROUTER, "num_local_experts": 4}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}  # fmt: skip
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_groups": 1}


class Case(NamedTuple):
    """A model's configuration, its dtype, and why packed input is refused."""

    config: str
    fields: dict
    refused: str = ""
    dtype: torch.dtype = torch.float64


REPLACED = "its attention cannot be replaced"
DIFFERS = "from those of separate rows"
CASES = {
    "Llama": Case("Llama", {}),
    "Llama, tied": Case("Llama", {"tie_word_embeddings": True}),
    "Qwen2": Case("Qwen2", {}),
    "Qwen3": Case("Qwen3", HEADS),
    "Qwen3-MoE": Case("Qwen3Moe", HEADS | EXPERTS),
    "Qwen2-MoE": Case("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 16}),
    "Qwen3-Next": Case("Qwen3Next", HEADS | LINEAR | EXPERTS | {"shared_expert_intermediate_size": 16}, REPLACED),
    "Qwen3.5": Case("Qwen3_5Text", HEADS | LINEAR, REPLACED),
    "Mixtral": Case("Mixtral", LOCAL_EXPERTS),
    # Attention that takes its softmax in float32 needs masks in float32.
    "GPT-OSS": Case("GptOss", HEADS | WINDOW | LOCAL_EXPERTS, "adds s_aux to its scores", torch.float32),
    "Gemma": Case("Gemma", HEADS),
    "Gemma 2": Case("Gemma2", HEADS | WINDOW | {"final_logit_softcapping": 3.0}, dtype=torch.float32),
    "Gemma 3": Case("Gemma3Text", HEADS | WINDOW),
    "Gemma 3, capped": Case("Gemma3Text", HEADS | WINDOW | {"final_logit_softcapping": 4.0}),
    "Phi": Case("Phi", {}),
    "Phi-3": Case("Phi3", {}),
    "Mistral": Case("Mistral", WINDOW),
    "Ministral": Case("Ministral", WINDOW | HEADS),
    "Granite": Case("Granite", {"logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "Granite MoE": Case("GraniteMoe", LOCAL_EXPERTS | {"logits_scaling": 3.0}),
    "Cohere": Case("Cohere", {"logit_scale": 0.3}),
    "Cohere 2": Case("Cohere2", WINDOW | {"logit_scale": 0.3}),
    "SmolLM3": Case("SmolLM3", {}),
    "Falcon-H1": Case("FalconH1", MAMBA | {"lm_head_multiplier": 0.5}, REPLACED),
    "OLMo 2": Case("Olmo2", {}),
    "OLMo 3": Case("Olmo3", WINDOW),
    "OLMoE": Case("Olmoe", EXPERTS),
    "GLM-4": Case("Glm4", HEADS),
    "GLM-4 MoE": Case("Glm4Moe", HEADS | ROUTED),
    "DeepSeek V3": Case("DeepseekV3", LATENT | ROUTED),
    "MiniCPM3": Case("MiniCPM3", LATENT | {"dim_model_base": 8}),
    "Nemotron": Case("Nemotron", {}, DIFFERS),
    "StarCoder 2": Case("Starcoder2", {}),
    "Llama 4": Case("Llama4Text", HEADS | {"num_local_experts": 4, "intermediate_size_mlp": 48}, REPLACED),
    "LFM 2": Case("Lfm2", {"layer_types": ["conv", "full_attention"]}, REPLACED),
    "EXAONE 4": Case("Exaone4", WINDOW),
    "HunYuan": Case("HunYuanDenseV1", HEADS),
    "Seed-OSS": Case("SeedOss", HEADS),
    "Apertus": Case("Apertus", {}),
    "ERNIE 4.5": Case("Ernie4_5", HEADS),
    "NanoChat": Case("NanoChat", {}),
    "StableLM": Case("StableLm", {}, DIFFERS),
    "GPT-2": Case("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "GPT-NeoX": Case("GPTNeoX", {}),
    "OPT": Case("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}


def small_model(case: Case):
    fields = {**SMALL, "vocab_size": VOCAB, "max_position_embeddings": 64, **case.fields}
    torch.manual_seed(0)
    config = getattr(transformers, f"{case.config}Config")(**fields)
    # Grouped products of experts have no float64.
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    return model.to(case.dtype).eval()


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCAB, (length,), generator=generator) for length in LENGTHS]


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.zeros(2, len(LENGTHS), WIDTH, dtype=torch.int64)
    for row, sequence in enumerate(sequences()):
        places = slice(0, len(sequence)) if side == "right" else slice(WIDTH - len(sequence), WIDTH)
        ids[row, places], mask[row, places] = sequence, 1
    return ids, mask


def own(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies from the model's own logits, one sequence at a time."""
    logprobs, entropies = [], []
    for sequence in sequences():
        log_p = model(input_ids=sequence[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        logprobs.append(log_p.gather(1, sequence[1:, None]).squeeze(1))
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def fused(model, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    policy = FusedPolicy(model)
    if layout == "packed":
        logprobs, entropy = policy(torch.cat(sequences())[None], cu_seqlens=SEGMENTS, return_entropy=True)
        scored = torch.ones_like(logprobs, dtype=torch.bool)
        scored[0, SEGMENTS[1:-1] - 1] = False
    else:
        ids, mask = padded(layout)
        logprobs, entropy = policy(ids, mask, return_entropy=True)
        scored = (mask[:, 1:] * mask[:, :-1]).bool()
    assert not logprobs[~scored].any()
    assert not entropy[~scored].any()
    return logprobs[scored], entropy[scored]


def gradients(model, logprobs, entropy) -> dict[str, torch.Tensor]:
    """Of a weighted sum of both, for every parameter that has one."""
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, len(logprobs), generator=generator, dtype=logprobs.dtype)
    model.zero_grad()
    (logprobs * a + entropy * b).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.norm() > 0}


@pytest.mark.parametrize("name", CASES)
def test_fused_policy_equals_the_models_own_logits(name):
    case = CASES[name]
    model = small_model(case)
    expected = own(model)
    expected_grads = gradients(model, *expected)
    assert model.get_output_embeddings().weight.grad.norm() > 0
    # Norms, rotary embeddings, routers and recurrences compute in float32 for any dtype.
    tolerance = 1e-5 if case.dtype == torch.float64 else 1e-4
    for layout in ("right", "left", *(() if case.refused else ("packed",))):
        got = fused(model, layout)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        grads = gradients(model, *got)
        assert grads.keys() == expected_grads.keys()
        for key, grad in expected_grads.items():
            assert (grads[key] - grad).norm() <= 10 * tolerance * grad.norm() + 1e-9, (layout, key)
    if case.refused:
        policy = FusedPolicy(model)
        for _ in range(2):
            with pytest.raises(UserError, match=f"packed input is not possible with .*{case.refused}"):
                policy(torch.cat(sequences())[None], cu_seqlens=SEGMENTS)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "output_router_logits" in case.fields])
def test_router_loss_equals_that_of_transformers(name):
    """As part of the loss, times its coefficient and share, and by itself; its gradient reaches the routers."""
    case = CASES[name]
    model = small_model(case)
    policy = FusedPolicy(model)
    ids, mask = padded("left")
    own_loss = 0.1 * model(input_ids=ids, attention_mask=mask, use_cache=False).aux_loss
    if not isinstance(own_loss, torch.Tensor):
        with pytest.raises(UserError, match="gives no router logits"):
            policy(ids, mask, return_aux_loss=True)
        return
    own_loss.backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    assert expected
    model.zero_grad()
    zeros = torch.zeros(3, dtype=case.dtype)
    result = policy(ids, mask, advantages=zeros, share=0.5)
    result.loss.backward()
    torch.testing.assert_close(2 * result.loss, own_loss.to(result.loss), rtol=1e-5, atol=1e-5)
    for key, p in model.named_parameters():
        if key in expected:
            assert (2 * p.grad - expected[key]).norm() <= 1e-4 * expected[key].norm() + 1e-9, key
    _, alone = policy(ids, mask, return_aux_loss=True)
    torch.testing.assert_close(alone, own_loss.to(alone), rtol=1e-5, atol=1e-5)
    model.config.output_router_logits = False
    assert policy(ids, mask, advantages=zeros).loss == 0


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("name", MULTIMODAL)
def test_images_are_passed_to_the_model(name, images):
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(MULTIMODAL[name]).eval()
    ids = torch.randint(2, 250, (2, WIDTH))
    inputs = {}
    if images:
        ids[:, 2], ids[:, 3:7] = 256, IMAGE
        inputs = {"pixel_values": torch.randn(2, 3, 28, 28), "token_type_ids": (ids == IMAGE).long()}
        if name == "Qwen2.5-VL":
            inputs = {"pixel_values": torch.randn(32, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
            inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    mask = torch.ones_like(ids)
    log_p = model(input_ids=ids, attention_mask=mask, **inputs).logits[:, :-1].log_softmax(-1)
    expected = log_p.gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(FusedPolicy(model)(ids, mask, **inputs), expected, rtol=1e-5, atol=1e-5)


UNKNOWN = {
    "a layer after the body's": Case(
        "ModernBertDecoder", {"bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1, "global_attn_every_n_layers": 1}
    ),
}


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.17"),
    reason="older transformers reject this configuration themselves",
)
@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_logit_transforms_are_refused(name):
    policy = FusedPolicy(small_model(UNKNOWN[name]))
    for _ in range(2):
        with pytest.raises(UserError, match="transforms its logits in a way that is not supported"):
            policy(*padded("right"))
