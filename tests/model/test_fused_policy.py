"""FusedPolicy in a training loop that is not ours: its arguments, its loss, and wrapped models."""

import copy
import math

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.model.policy import FusedPolicy
from grpo_fast.train.batch import build_step_batch
from grpo_fast.train.learner import Learner
from grpo_kernels import PRESETS, policy_loss, token_weights
from support.architectures import ROUTER
from support.small import SMALL
from support.tiny import VOCAB, random_samples, tiny_model

PROMPTS, KEPT = [3, 5, 1], 6
COMPLETIONS = [6, 2, 4]
WIDTH = max(PROMPTS) + KEPT


def batch():
    """Prompts padded on the left, completions on the right, as in TRL."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCAB, (3, WIDTH), generator=generator)
    places = torch.arange(WIDTH)
    prompts, completions = torch.tensor(PROMPTS)[:, None], torch.tensor(COMPLETIONS)[:, None]
    mask = (places >= max(PROMPTS) - prompts) & (places < max(PROMPTS) + completions)
    return ids.where(mask, 0), mask.long(), mask[:, -KEPT:].long()


def own_logprobs(model, temperature=1.0):
    """``[3, K]`` from the model's logits, 0 in the padding."""
    ids, mask, completion = batch()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -KEPT - 1 : -1]
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(2, ids[:, -KEPT:, None]).squeeze(2) * completion


def weight_gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_forward_with_trl_arguments():
    """`logits_to_keep` alone, `completion_mask` alone, and both; the last K tokens of each row."""
    model = tiny_model()
    policy = FusedPolicy(model, temperature=0.7)
    ids, mask, completion = batch()
    expected = own_logprobs(model, 0.7)
    torch.testing.assert_close(policy(ids, mask, logits_to_keep=KEPT), expected)
    torch.testing.assert_close(policy(ids, mask, completion_mask=completion, logits_to_keep=KEPT), expected)
    chosen = completion * torch.tensor([1, 0, 1, 1, 0, 1])
    torch.testing.assert_close(policy(ids, mask, completion_mask=chosen), expected * chosen)
    whole = policy(ids, mask, completion_mask=torch.ones_like(ids))
    assert whole.shape == ids.shape
    torch.testing.assert_close(whole[:, -KEPT:], expected)
    assert not whole[:, 0].any()


def test_forward_packs_where_positions_restart():
    model = tiny_model()
    policy = FusedPolicy(model)
    ids, mask, _ = batch()
    sequences = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    packed = torch.cat(sequences)[None]
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])[None]
    offsets = torch.tensor([0, *torch.tensor([len(sequence) for sequence in sequences]).cumsum(0)])
    got = policy(packed, position_ids=positions)
    assert torch.equal(got, policy(packed, cu_seqlens=offsets))
    torch.testing.assert_close(got[got != 0], torch.cat([policy(s[None])[0] for s in sequences]))
    assert (got == 0).sum() == 2


@pytest.mark.parametrize("preset", ["grpo", "dapo", "gspo", "cispo"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_loss_equals_that_of_the_models_own_logprobs(preset, layout):
    model, objective = tiny_model(), PRESETS[preset]
    ids, mask, completion = batch()
    advantages = torch.tensor([0.7, -1.2, 0.4], dtype=torch.float64)
    logprobs = own_logprobs(model)
    old = (logprobs + 0.2 * torch.randn_like(logprobs)).detach()
    expected = policy_loss(
        logprobs, advantages, token_weights(completion, objective.aggregation), objective, old_logprobs=old
    )
    expected.loss.backward()
    expected_grad = weight_gradients(model)
    model.zero_grad()
    policy = FusedPolicy(model)
    inputs = {"completion_mask": completion, "old_logprobs": old}
    if layout == "packed":
        keep, width = mask.bool(), int(mask.sum())
        offsets = torch.tensor([0, *mask.sum(1).cumsum(0)])
        tail = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.float64)
        for whole, part in zip(tail, (completion, old), strict=True):
            whole[:, -KEPT:] = part
        inputs = {name: whole[keep][None] for name, whole in zip(inputs, tail, strict=True)} | {"cu_seqlens": offsets}
        result = policy(ids[keep][None], **inputs, advantages=advantages, objective=objective)
        assert result.logprobs.shape == (1, width)
    else:
        result = policy(ids, mask, **inputs, advantages=advantages, objective=objective, return_entropy=True)
        torch.testing.assert_close(result.logprobs, logprobs.detach())
        assert result.entropy.shape == completion.shape
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(weight_gradients(model), expected_grad)
    for name, value in expected.stats.items():
        if name != "entropy":
            torch.testing.assert_close(result.stats[name], value)


def test_loss_with_weights_of_a_step_adds_up_over_calls():
    model, objective = tiny_model(), PRESETS["dapo"]
    policy = FusedPolicy(model)
    ids, mask, completion = batch()
    advantages = torch.tensor([0.7, -1.2, 0.4], dtype=torch.float64)
    weights = token_weights(completion, objective.aggregation)
    found = []
    for parts in ([[0, 1, 2]], [[0, 2], [1]]):
        model.zero_grad()
        for rows in parts:
            policy(
                ids[rows], mask[rows], completion_mask=completion[rows], advantages=advantages[rows],
                weights=weights[rows], objective=objective,
            ).loss.backward()  # fmt: skip
        found.append(weight_gradients(model))
    torch.testing.assert_close(*found)


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("packing", ["always", "never"])
def test_router_losses_are_weighted_by_tokens(accelerator, packing):
    """The trainer's router loss of a step is the mean over its microbatches, weighted by their tokens."""
    model = tiny_model(torch.float32, Qwen3MoeConfig, head_dim=8, num_experts=4, moe_intermediate_size=16, **ROUTER)
    config = GRPOConfig(**{**SMALL, "max_tokens_per_microbatch": 32, "padding_free": packing})
    learner = Learner(model, config, accelerator, [3, 4, 5], 0)
    samples = random_samples(groups=3, per_group=4)
    batch = build_step_batch(samples, torch.ones(12, dtype=torch.bool), learner.objective, learner.config)
    batch.set_advantages(torch.zeros_like(batch.weights), learner.objective)
    batch.active = list(range(12))
    expected, sizes = 0.0, []
    for microbatch in learner.microbatches(batch):
        inputs = {"input_ids": microbatch.input_ids, "position_ids": microbatch.position_ids}
        mask = {"attention_mask": microbatch.attention_mask}
        if microbatch.segments is not None:
            mask = {"attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool), "segments": microbatch.segments}
        gates = model.model(**inputs, **mask, output_router_logits=True).router_logits
        balance = load_balancing_loss_func(gates, 4, 2, microbatch.attention_mask)
        expected += 0.1 * balance * len(microbatch.tokens)
        sizes.append(len(microbatch.tokens))
    assert len(sizes) > 1
    figures = learner.accumulate_gradients(batch)
    assert figures["loss"] == pytest.approx((expected / sum(sizes)).item(), rel=1e-5)


def in_fsdp(model, outside):
    """Each layer by itself, and the rest around the layers: around the policy, or around the model."""
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(outside)


def in_groups(model):
    """The head in a group with the last norm, which is gathered where the body calls the norm."""
    tied = [model.model.embed_tokens] if model.config.tie_word_embeddings else []
    fully_shard([*tied, model.model.norm, model.lm_head])
    return fully_shard(model)


FORMS = {
    "compiled": lambda model: FusedPolicy(torch.compile(model)),
    "DDP of the policy": lambda model: DistributedDataParallel(FusedPolicy(model)),
    "policy of DDP": lambda model: FusedPolicy(DistributedDataParallel(model)),
    "FSDP2 of the policy": lambda model: in_fsdp(model, FusedPolicy(model)),
    "policy of FSDP2": lambda model: FusedPolicy(in_fsdp(model, model)),
    "policy of FSDP2 in groups": lambda model: FusedPolicy(in_groups(model)),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_wrapped_models_give_the_same_gradients(alone, form, tied):
    """The same log-probabilities and gradients, call after call, and the model's own forward afterwards."""
    ids, mask, completion = batch()
    model = tiny_model(tie_word_embeddings=tied)
    coefficients = torch.randn(completion.shape, dtype=torch.float64)
    expected = own_logprobs(model)
    (expected * coefficients).sum().backward()
    expected_grad = weight_gradients(model)
    model.zero_grad()
    policy = FORMS[form](model)
    for times in (1, 2):
        got = policy(ids, mask, completion_mask=completion)
        torch.testing.assert_close(got, expected)
        (got * coefficients).sum().backward()
        found = [p.grad for p in model.parameters()]
        found = torch.cat([(g.full_tensor() if hasattr(g, "full_tensor") else g).flatten() for g in found])
        torch.testing.assert_close(found, times * expected_grad)
        loss = policy(ids, mask, completion_mask=completion, advantages=torch.zeros(3)).loss
        assert loss == 0
        loss.backward()
    assert "forward" not in vars(model)
    if form != "FSDP2 of the policy":
        torch.testing.assert_close(own_logprobs(model), expected)


def test_ddp_reduces_gradients(alone):
    """The gradients pass through DDP's own reduction, whether it wraps the policy or the model."""
    ids, mask, completion = batch()
    for wrap in (FORMS["policy of DDP"], FORMS["DDP of the policy"]):
        model = tiny_model()
        policy = wrap(model)
        ddp = policy if isinstance(policy, DistributedDataParallel) else policy.model
        seen = []

        def hook(_, bucket, seen=seen):
            seen.append(bucket.buffer().numel())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        ddp.register_comm_hook(None, hook)
        for times in (1, 2, 3):
            policy(ids, mask, completion_mask=completion).sum().backward()
            assert sum(seen) == times * sum(p.numel() for p in model.parameters())


def _two_processes(rank, store):
    """Each process has some of the rows; DDP's and FSDP2's mean gradients are half of the whole batch's."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    ids, mask, completion = batch()
    rows = [[0, 2], [1]][rank]
    coefficients = torch.arange(1, completion.numel() + 1, dtype=torch.float64).view(completion.shape)
    for form in ("DDP of the policy", "policy of DDP", "FSDP2 of the policy", "policy of FSDP2"):
        model = tiny_model(tie_word_embeddings=True)
        expected = own_logprobs(model)
        (expected * coefficients).sum().backward()
        expected_grad = weight_gradients(model)
        model.zero_grad()
        policy = FORMS[form](model)
        for times in (1, 2):
            got = policy(ids[rows], mask[rows], completion_mask=completion[rows])
            torch.testing.assert_close(got, expected[rows])
            (got * coefficients[rows]).sum().backward()
            found = [p.grad for p in model.parameters()]
            found = torch.cat([(g.full_tensor() if hasattr(g, "full_tensor") else g).flatten() for g in found])
            torch.testing.assert_close(found, times * expected_grad / 2)
    dist.destroy_process_group()


@pytest.mark.long
def test_wrapped_models_on_two_processes(tmp_path):
    torch.multiprocessing.spawn(_two_processes, (str(tmp_path / "store"),), nprocs=2)


def test_peft_model_trains_the_adapter_only():
    """The log-probabilities are the PeftModel's, with and without the adapter; only the adapter is trained."""
    ids, mask, completion = batch()
    model = tiny_model()
    plain = own_logprobs(model).detach()
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    policy = FusedPolicy(adapted)
    got = policy(ids, mask, completion_mask=completion)
    torch.testing.assert_close(got, own_logprobs(adapted))
    assert (got - plain).abs().max() > 1e-3
    got.sum().backward()
    found = weight_gradients(adapted)
    adapted.zero_grad()
    own_logprobs(adapted).sum().backward()
    torch.testing.assert_close(found, weight_gradients(adapted))
    with adapted.disable_adapter():
        torch.testing.assert_close(policy(ids, mask, completion_mask=completion), plain)


def test_checks_with_dropout():
    """The first forward compares without dropout, and leaves the modes and the generator as they were."""
    ids, mask, completion = batch()
    model = tiny_model(attention_dropout=0.5).train()
    model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    FusedPolicy(model).check_head([3, 4, 5])
    assert torch.equal(torch.get_rng_state(), before)
    policy = FusedPolicy(model)
    first, second = (policy(ids, mask, completion_mask=completion) for _ in range(2))
    assert not torch.equal(first, second)
    assert [module.training for module in model.modules()] == modes


def test_unknown_logit_transform_is_refused_at_the_first_forward():
    ids, mask, _ = batch()
    model = tiny_model()
    # According to its config the logits are scaled, but a Llama does not scale them.
    model.config.logit_scale = 1.5
    policy = FusedPolicy(model)
    for _ in range(2):
        with pytest.raises(UserError, match="LlamaForCausalLM transforms its logits"):
            policy(ids, mask)
    policy = FusedPolicy(model, check=False)
    assert policy(ids, mask).shape == (3, WIDTH - 1)


def test_logits_are_computed_for_the_first_comparison_only(monkeypatch):
    ids, mask, completion = batch()
    model = tiny_model()
    policy, calls, linear = FusedPolicy(model), [], torch.nn.functional.linear

    def counted(hidden, weight, bias=None):
        if weight is model.lm_head.weight:
            calls.append(hidden.shape[:2].numel())
        return linear(hidden, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    for _ in range(3):
        policy(ids, mask, completion_mask=completion, advantages=torch.ones(3)).loss.backward()
    assert calls == [PROMPTS[0] + COMPLETIONS[0] + 1]


def test_forward_of_a_fully_masked_batch():
    """A first row without tokens, and a batch without any: the loss is 0, and so are its gradients."""
    model = tiny_model()
    ids, mask, completion = batch()
    expected = own_logprobs(model).detach()
    mask[0] = completion[0] = 0
    got = FusedPolicy(model)(ids, mask, completion_mask=completion)
    assert not got[0].any()
    torch.testing.assert_close(got[1:], expected[1:])
    none = FusedPolicy(model)(ids, 0 * mask, completion_mask=completion, advantages=torch.ones(3))
    none.loss.backward()
    assert none.loss == 0
    assert not weight_gradients(model).any()


def test_advantages_of_as_many_sequences_as_tokens():
    """Packed, one of them has two of the scored tokens and one has none."""
    model = tiny_model()
    ids, offsets = torch.tensor([[5, 9, 7, 8, 6]]), torch.tensor([0, 2, 5])
    advantages, found = torch.tensor([0.3, -0.8], dtype=torch.float64), []
    for given in (advantages, advantages[[1, 1]][None]):
        model.zero_grad()
        FusedPolicy(model)(ids, cu_seqlens=offsets, logits_to_keep=2, advantages=given).loss.backward()
        found.append(weight_gradients(model))
    assert torch.equal(*found)


def test_copied_policy_uses_its_own_weights():
    ids, mask, _ = batch()
    policy = FusedPolicy(tiny_model())
    reference = copy.deepcopy(policy)
    before = policy(ids, mask).detach()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    assert (policy(ids, mask) - before).abs().max() > 1e-3
    assert torch.equal(reference(ids, mask), before)


IDS, MASK, COMPLETION = batch()
ROW = {"input_ids": IDS[:1]}
WRONG = {
    "one token": ({"input_ids": IDS[:, :1]}, "T of at least 2"),
    "flat ids": ({"input_ids": IDS[0]}, r"input_ids must be \[B, T\].*\[11\]"),
    "a short mask": ({"attention_mask": MASK[:, 1:]}, r"attention_mask must be \[3, 11\], got \[3, 10\]"),
    "other rows": ({"completion_mask": COMPLETION[:2]}, r"completion_mask must be \[3, 1..11\], got \[2, 6\]"),
    "two widths": ({"completion_mask": COMPLETION, "logits_to_keep": 5}, "logits_to_keep=5 and a completion_mask of 6"),
    "too many": ({"logits_to_keep": 12}, "logits_to_keep=12 must be from 1 to 11"),
    "offsets": (ROW | {"cu_seqlens": torch.tensor([0, 4, 4, 11])}, r"must rise from 0 to 11.*\[0, 4, 4, 11\]"),
    "offsets that end": (ROW | {"cu_seqlens": torch.tensor([0, 4])}, "must rise from 0 to 11"),
    "packed rows": ({"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]] * 3)}, "one row.* got 3 rows"),
    "packed and padded": (
        ROW | {"cu_seqlens": torch.tensor([0, 4, 11]), "attention_mask": MASK[:1]},
        "takes no attention_mask with zeros",
    ),
    "no advantages": ({"old_logprobs": torch.zeros(3, 10)}, "old_logprobs belongs to the loss.*advantages"),
    "no loss to correct": ({"correction": torch.ones(3, 10)}, "correction belongs to the loss.*advantages"),
    "no experts": ({"return_aux_loss": True}, "return_aux_loss needs a mixture of experts"),
    "no length": (
        {"advantages": torch.zeros(3), "objective": PRESETS["dr_grpo"]},
        "constant length needs weights",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_forward_refuses_wrong_arguments(name):
    arguments, message = WRONG[name]
    with pytest.raises(UserError, match=message) as error:
        FusedPolicy(tiny_model())(**{"input_ids": IDS} | arguments)
    assert "\n" not in str(error.value)


def test_fused_policy_refuses_wrong_models():
    def adapted(**options):
        return peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))

    prompt = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    quantised = tiny_model()
    quantised.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, 16, dtype=torch.uint8), requires_grad=False)
    for model, message in (
        (torch.nn.Linear(2, 2), "Linear is not a transformers model"),
        (adapted(target_modules=["q_proj", "lm_head"]), "output head of LlamaForCausalLM carries an adapter"),
        (adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]), "carries an adapter"),
        (peft.get_peft_model(tiny_model(), prompt), "PROMPT_TUNING adds virtual tokens"),
        (quantised, "is quantised"),
    ):
        with pytest.raises(UserError, match=message):
            FusedPolicy(model)


@pytest.mark.parametrize(
    ("make", "call", "message"),
    [
        ({"model": "gpt2"}, {}, "needs a loaded transformers model, got 'gpt2'"),
        ({"temperature": 0}, {}, "temperature must be a number from 1e-6 to 1e6, got 0"),
        ({}, {"temperature": 0.7}, r"temperature is no argument of this call: pass it to FusedPolicy"),
        ({}, {"labels": torch.zeros(1, 4, dtype=torch.long)}, "labels is no argument of this call"),
        ({}, {"advantages": torch.ones(1), "objective": "dapo"}, "objective must be a PolicyObjective.*got 'dapo'"),
        ({}, {"objective": PRESETS["dapo"]}, "objective belongs to the loss, which needs advantages"),
        ({}, {"advantages": torch.tensor([math.nan])}, "advantages holds nan; allowed are finite numbers"),
        (
            {},
            {"input_ids": torch.tensor([[3, 4, -1]])},
            f"input_ids holds -1; allowed are token ids from 0 to {VOCAB - 1}",
        ),
        ({}, {"input_ids": torch.tensor([[3, VOCAB, 4]])}, f"input_ids holds {VOCAB}; allowed"),
    ],
)
def test_mistakes_of_a_trl_user_are_refused_in_one_line(make, call, message):
    with pytest.raises(UserError, match=message):
        FusedPolicy(**{"model": tiny_model(), **make})(**{"input_ids": torch.tensor([[3, 4, 5, 6]]), **call})
