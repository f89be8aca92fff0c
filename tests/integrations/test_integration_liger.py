"""FusedLinearGRPOLoss compared with Liger's class: value, gradients and metrics of the same calls."""

import inspect

import pytest
import torch

from grpo_fast.integrations.liger import FusedLinearGRPOLoss
from support.oracle import relative_error

pytest.importorskip("liger_kernel")
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

LENGTHS = [7, 1, 12, 4, 9, 10]
B, T, H, V = len(LENGTHS), max(LENGTHS), 24, 259
# Both are float32 inside, and the loss is a small difference of large terms.
TOLERANCE, LOSS_TOLERANCE = 1e-5, 1e-4

CASES = {
    **{name: {"loss_type": name, "beta": 0.0} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "vespo")},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.05, "beta": 0.0},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0, "epsilon_low": 0.02},
    **{f"kl, {name}": {"loss_type": name, "beta": 0.1} for name in ("grpo", "dapo", "sapo", "vespo")},
    "corrected kl": {"beta": 0.1, "use_bias_correction_kl": True},
    "sequence": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.05, "beta": 0.0},
    "sequence, corrected kl": {"importance_sampling_level": "sequence", "beta": 0.1, "use_bias_correction_kl": True},
    "delta": {"loss_type": "bnpo", "delta": 1.3, "beta": 0.0},
    "asymmetric": {"epsilon_low": 0.1, "epsilon_high": 0.3, "temperature": 0.8},
    "sapo's temperatures": {"loss_type": "sapo", "sapo_temperature_pos": 0.5, "sapo_temperature_neg": 3.0},
    "vespo's shape": {"loss_type": "vespo", "beta": 0.0, "vespo_k_pos": 1.5, "vespo_lambda_neg": 0.7},
    "no reference": {"use_ref_model": False, "beta": 0.1},
}


def make(dtype=torch.float32):
    arguments = {
        "_input": 2 * torch.randn(B, T, H, dtype=dtype),
        "lin_weight": torch.randn(V, H, dtype=dtype) / H**0.5,
        "selected_token_ids": torch.randint(0, V, (B, T)),
        "bias": torch.randn(V, dtype=dtype),
        "attention_mask": (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).float(),
        "advantages": torch.tensor([0.7, -0.9, -1.3, 0.4, 0.0, -0.2]),
    }
    logits = (arguments["_input"] @ arguments["lin_weight"].T + arguments["bias"]).float()
    logprobs = logits.log_softmax(-1).gather(2, arguments["selected_token_ids"][..., None]).squeeze(2)
    shift = 0.3 * torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 1.0])[:, None]
    arguments["old_per_token_logps"] = logprobs - shift + 0.3 * torch.randn(B, T)
    arguments["ref_per_token_logps"] = logprobs + 0.5 * torch.randn(B, T)
    return arguments


def call(kind, arguments, frozen=False, **options):
    """(loss, metrics, gradients) of one of the two classes."""
    leaves = {
        name: arguments[name].clone().requires_grad_(name == "_input" or not frozen)
        for name in ("_input", "lin_weight", "bias")
        if arguments.get(name) is not None
    }
    loss, metrics = kind(compiled=False, max_completion_length=16, **options)(**{**arguments, **leaves})
    (1.7 * loss).backward()
    return loss.detach(), metrics, {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}


def compare(arguments, **options):
    wanted, got = (call(kind, arguments, **options) for kind in (LigerFusedLinearGRPOLoss, FusedLinearGRPOLoss))
    assert relative_error(got[0], wanted[0]) < LOSS_TOLERANCE
    assert len(got[1]) == len(wanted[1])
    for a, b in zip(got[1], wanted[1], strict=True):
        assert a.shape == b.shape
        assert a.item() == pytest.approx(b.item(), rel=1e-4, abs=1e-7)
    assert got[2].keys() == wanted[2].keys()
    for name, gradient in wanted[2].items():
        assert gradient.any(), name
        assert relative_error(got[2][name], gradient) < TOLERANCE, name
    return got


def test_signatures_equal_those_of_liger():
    for name in ("__init__", "forward"):
        ours, theirs = (
            list(inspect.signature(getattr(kind, name)).parameters.items())
            for kind in (FusedLinearGRPOLoss, LigerFusedLinearGRPOLoss)
        )
        assert [(key, value.default) for key, value in ours] == [(key, value.default) for key, value in theirs]


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", CASES)
def test_loss_equals_liger(name, frozen):
    _, metrics, _ = compare(make(), frozen=frozen, **CASES[name])
    if CASES[name].get("loss_type") not in ("sapo", "vespo"):
        assert metrics[-1] > 0


CORRECTED = ("grpo", "dapo", "cispo", "vespo", "kl, grpo", "sequence")
# "luspo" with one ratio a token is refused, see below.
RATIOS = [(name, ratio) for name in CORRECTED for ratio in ("tokens", "sequences", "flat")] + [("luspo", "sequences")]


@pytest.mark.parametrize(("name", "ratio"), RATIOS)
@pytest.mark.parametrize("fresh", [False, True], ids=["", "fresh"])
def test_sampler_correction_equals_liger(name, ratio, fresh):
    arguments = make()
    ratios = torch.rand(B, T) + 0.5
    arguments["vllm_is_ratio"] = {"tokens": ratios, "sequences": ratios[:, :1], "flat": ratios[:, 0]}[ratio]
    if fresh:
        arguments["old_per_token_logps"] = None
    compare(arguments, **CASES[name])


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo", "grpo"])
@pytest.mark.parametrize("items", [90, torch.tensor(90), torch.tensor(0)], ids=["number", "tensor", "none"])
def test_num_items_in_batch_equals_liger(loss_type, items):
    compare({**make(), "num_items_in_batch": items}, loss_type=loss_type, beta=0.0)


@pytest.mark.parametrize("items", [None, 90])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_loss_of_several_processes_equals_liger(loss_type, items, monkeypatch):
    """Two processes; the other one has twice as many tokens."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, **_: tensor.mul_(3))
    torch.manual_seed(0)
    loss, *_ = compare({**make(), "num_items_in_batch": items}, loss_type=loss_type, beta=0.0)
    monkeypatch.undo()
    torch.manual_seed(0)
    alone, *_ = compare({**make(), "num_items_in_batch": items}, loss_type=loss_type, beta=0.0)
    assert torch.equal(loss, alone) == (loss_type == "grpo")


def test_reference_from_hidden_states_equals_liger():
    arguments = make()
    arguments["ref_per_token_logps"] = None
    arguments |= {
        "ref_input": 2 * torch.randn(B, T, H),
        "ref_weight": torch.randn(V, H) / 5,
        "ref_bias": torch.randn(V),
    }
    compare(arguments, beta=0.1, temperature=0.7)


def test_empty_sequence_equals_liger():
    arguments = make()
    arguments["attention_mask"][1] = 0
    for name in ("grpo", "bnpo", "dr_grpo", "vespo"):
        compare(arguments, loss_type=name, beta=0.1)


def test_loss_without_bias_in_16_bits():
    """Liger's error is larger; the gradients have the dtype of the leaves."""
    arguments = {**make(torch.bfloat16), "bias": None}
    loss, _, grads = call(FusedLinearGRPOLoss, arguments)
    exact = {name: v.float() if v is not None and v.is_floating_point() else v for name, v in arguments.items()}
    wanted, _, wanted_grads = call(LigerFusedLinearGRPOLoss, exact)
    assert relative_error(loss, wanted) < 1e-2
    for name, gradient in grads.items():
        assert gradient.dtype == torch.bfloat16
        assert relative_error(gradient.float(), wanted_grads[name]) < 2e-2


REFUSED = {
    "loss_type='ppo'": {"loss_type": "ppo"},
    "importance_sampling_level='turn'": {"importance_sampling_level": "turn"},
    "importance_sampling_level='token'": {"loss_type": "sapo", "importance_sampling_level": "sequence"},
    "luspo": {"loss_type": "luspo"},
    "vespo": {"loss_type": "vespo", "use_bias_correction_kl": True},
    "max_completion_length": {"loss_type": "dr_grpo"},
    "delta must be at least": {"delta": 1.1},
    "sapo_temperature_pos": {"loss_type": "sapo", "sapo_temperature_pos": 0.0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_constructor_refuses_unsupported_options(message):
    with pytest.raises(ValueError, match=message) as caught:
        FusedLinearGRPOLoss(**REFUSED[message])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["dapo", "kl, grpo", "cispo", "sapo", "sequence", "vespo", "luspo"])
def test_equal_advantages_per_token_equal_liger(name):
    """Advantages per token give Liger's loss if those of a row are the same."""
    arguments, shape = make(), (B, T)
    per_token = {**arguments, "advantages": arguments["advantages"][:, None].expand(shape).contiguous()}
    expected, metrics, gradients = call(LigerFusedLinearGRPOLoss, arguments, **CASES[name])
    loss, found, ours = call(FusedLinearGRPOLoss, per_token, **CASES[name])
    assert relative_error(loss, expected) < LOSS_TOLERANCE
    assert [m.item() for m in found] == pytest.approx([m.item() for m in metrics], rel=1e-4, abs=1e-7)
    for key, gradient in gradients.items():
        assert relative_error(ours[key], gradient) < TOLERANCE, key


def test_different_advantages_per_token_equal_plain_logits():
    """The clipped loss, its gradients and the fraction that is clipped, from plain logits in float64."""
    arguments = {name: x.double() if x.is_floating_point() else x for name, x in make().items()}
    arguments["advantages"] = advantages = torch.randn(B, T, dtype=torch.float64)
    leaves = {name: arguments[name].clone().requires_grad_() for name in ("_input", "lin_weight", "bias")}
    logits = (leaves["_input"] @ leaves["lin_weight"].T + leaves["bias"]) / 0.8
    targets, mask = arguments["selected_token_ids"], arguments["attention_mask"]
    logprobs = logits.log_softmax(-1).gather(2, targets[..., None]).squeeze(2)
    ratio = (logprobs - arguments["old_per_token_logps"]).exp()
    bounded = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.3) * advantages)
    expected = -(bounded * mask).sum() / mask.sum()
    (1.7 * expected).backward()
    clipped = torch.where(advantages > 0, ratio > 1.3, ratio < 0.9) & (advantages != 0)
    options = {"epsilon_low": 0.1, "epsilon_high": 0.3, "temperature": 0.8, "beta": 0.0}
    loss, metrics, gradients = call(FusedLinearGRPOLoss, arguments, **options)
    torch.testing.assert_close(loss, expected.detach())
    assert metrics[0].item() == pytest.approx(((clipped * mask).sum() / mask.sum()).item())
    for name, leaf in leaves.items():
        torch.testing.assert_close(gradients[name], leaf.grad)


WRONG = {
    "advantages": ([0.5] * B, "advantages must be a tensor, got list"),
    "attention_mask": ([[1] * T] * B, "attention_mask must be a tensor, got list"),
    "lin_weight": (torch.zeros(V, H).to(torch.float8_e4m3fn), r"lin_weight is quantised \(torch.float8_e4m3fn\)"),
}


def test_arguments_of_wrong_type_are_refused_in_one_line():
    wrong = [(name, *case) for name, case in WRONG.items()]
    wrong += [
        ("advantages", torch.ones(B, 1), r"advantages must have shape \[6\] or \[6, 12\], got \[6, 1\]"),
        ("advantages", torch.ones(B + 1), r"advantages must have shape \[6\] or \[6, 12\], got \[7\]"),
        ("lin_weight", torch.zeros(V, H, device="meta"), "weight is on meta"),
    ]
    for name, value, message in wrong:
        with pytest.raises(ValueError, match=message) as caught:
            FusedLinearGRPOLoss()(**{**make(), name: value})
        assert "\n" not in str(caught.value)
    for temperature in (0, None, "0.7", float("nan"), float("inf"), 1e-45, True):
        with pytest.raises(ValueError, match="temperature must be a number from 1e-6 to 1e6"):
            FusedLinearGRPOLoss(temperature=temperature)


def test_forward_refuses_wrong_shapes():
    arguments = make()
    with pytest.raises(ValueError, match=r"vllm_is_ratio must have shape \[6\]"):
        FusedLinearGRPOLoss()(**arguments, vllm_is_ratio=torch.ones(2, T))
    with pytest.raises(ValueError, match="luspo"):
        FusedLinearGRPOLoss(**CASES["luspo"])(**arguments, vllm_is_ratio=torch.ones(B, T))
    with pytest.raises(ValueError, match="use_ref_model=True needs"):
        FusedLinearGRPOLoss()(**{**arguments, "ref_per_token_logps": None})
    with pytest.raises(ValueError, match="_input must have shape"):
        FusedLinearGRPOLoss()(**{**arguments, "_input": arguments["_input"].flatten(0, 1)})
