"""What each of two processes does, and a single one, for the tests of distribution."""

import contextlib
import dataclasses
import os
import random
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import grpo_fast.trainer
from grpo_fast.config import GRPOConfig
from grpo_fast.distributed import processes
from grpo_fast.distributed.processes import connect, gather, on_main
from grpo_fast.distributed.sharding import check_processes, ddp_arguments, whole
from grpo_fast.errors import UserError
from grpo_fast.model.loading import digit_tokenizer
from grpo_fast.model.policy import FusedPolicy
from grpo_fast.report import Summary, write_json
from grpo_fast.rollout import Response, Rollout
from grpo_fast.rollout.vllm.weights import engine_weights
from grpo_fast.train.batch import StepBatch, build_step_batch
from grpo_fast.train.learner import Learner
from grpo_fast.trainer import GRPOTrainer
from support.small import SMALL
from support.tiny import random_samples, tiny_model

MODES = {"ddp": {}, "fsdp": {"fsdp": True}}
CASES = {
    "full": {"beta": 0.1, "top_entropy_quantile": 0.5, "max_grad_norm": 0.1},
    "padded": {"padding_free": "never", "loss_type": "gspo", "gradient_checkpointing": True},
    "bfloat16": {"dtype": "bfloat16", "tiled_mlp": True},
    "lora": {"use_peft": True, "lora_r": 4, "beta": 0.1, "kl_in_reward": True},
    "moving reference": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "tie": True},
}
# In 16 bits the order of a sum shows.
ALLOWED = {"bfloat16": (1e-2, 0.1)}
SERVED = {"use_vllm": True, "vllm_mode": "server", "sample_ahead": True, "beta": 0.0}
QUEUED = {"use_vllm": True, "vllm_mode": "server", "max_staleness": 1, "beta": 0.0}
STEPS = 5
# Metrics of the whole step, which are equal except for rounding.
FIGURES = ("loss", "entropy", "grad_norm", "kl")


def step_batch(config: GRPOConfig, step: int) -> StepBatch:
    """Unequal lengths; in one step only a single completion has an advantage, in another none."""
    samples = random_samples(groups=3, per_group=4, seed=step)
    generator = torch.Generator().manual_seed(step)
    advantages = torch.randn(len(samples), generator=generator)
    advantages *= {1: torch.arange(12) == 5, 2: torch.zeros(12)}.get(step, 1.0)
    batch = build_step_batch(samples, torch.ones(len(samples), dtype=torch.bool), config.objective(), config)
    batch.set_advantages(advantages.repeat_interleave(batch.offsets.diff()), config.objective())
    return batch


def trajectory(fields: dict) -> dict:
    """Gradient of the first step, weights after each, and the metrics of all."""
    fields = {"dataset_name": "x", "reward_funcs": ["x"], "max_tokens_per_microbatch": 24, **fields}
    fields |= {"num_iterations": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "use_cpu": True}
    tied = fields.pop("tie", False)
    config = GRPOConfig("x", **fields)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[ddp_arguments()])
    model = tiny_model(torch.bfloat16 if config.dtype == "bfloat16" else torch.float64, tie_word_embeddings=tied)
    learner = Learner(model, config, accelerator, [4, 5, 6], 0)
    if config.use_peft:
        learner.model.double()
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in (p for p in learner.policy.parameters() if p.requires_grad):
                start = torch.randn(parameter.shape, dtype=torch.float64) / 4
                parameter.copy_(distribute_like(start, parameter))

    def trained() -> list[torch.nn.Parameter]:
        return [p for p in learner.policy.parameters() if p.requires_grad]

    found = {"figures": [], "weights": []}
    for step in range(STEPS):
        batch = step_batch(config, step)
        if config.uses_reference:
            batch.ref_logprobs = learner.score_reference(batch)
        if config.kl_in_reward:
            penalty, kl = learner.kl_penalty(batch)
            found["figures"].append([kl, *penalty.tolist()])
        if step == 0:
            learner.accumulate_gradients(batch)
            found["gradient"] = flat(p.grad for p in trained())
            learner.optimizer.zero_grad()
        for keep in (True, False):
            metrics = learner.update(batch, keep_logprobs=keep)
            found["figures"].append([metrics.get(name, 0.0) for name in FIGURES])
        learner.refresh_reference(step + 1)
        found["weights"].append(flat(trained()))
    return found


def distribute_like(tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return distribute_tensor(tensor, own.device_mesh, own.placements) if hasattr(own, "placements") else tensor


def flat(tensors) -> torch.Tensor:
    return torch.cat([whole(tensor.detach()).flatten() for tensor in tensors])


class Given(Rollout):
    """Completions determined by the prompt, so that any number of processes samples the same ones."""

    def generate(self, prompt_ids, sampling):
        return [self.respond(prompt, number) for prompt in prompt_ids for number in range(sampling.num_generations)]

    def respond(self, prompt, number):
        draw = random.Random(f"{prompt} {number}")
        ids = [draw.randrange(2, 12) for _ in range(draw.randrange(1, 4))]
        return Response(ids if len(ids) == 3 else [*ids, 0], "length" if len(ids) == 3 else "stop")


class Served(Given):
    """Like a server, it samples from a copy of the weights, in the first process, during training."""

    copies_weights = separate = True

    def __init__(self):
        assert processes.is_main()
        self.copy = tiny_model()

    def sync(self, model):
        self.copy.load_state_dict(dict(engine_weights(model)), strict=False)

    @torch.no_grad()
    def respond(self, prompt, number):
        response = super().respond(prompt, number)
        logits = self.copy(torch.tensor([[*prompt, *response.token_ids]])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(response.token_ids)[:, None]).squeeze(1)
        return response._replace(logprobs=logprobs.tolist())


class Killed(Given):
    """The second process receives a signal while it samples for the second step."""

    calls = 0

    def generate(self, prompt_ids, sampling):
        self.calls += sampling.num_generations > 1
        if self.calls == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().generate(prompt_ids, sampling)


class Failing(Given):
    def generate(self, prompt_ids, sampling):
        if dist.get_rank() == 1:
            raise UserError("no more")
        return super().generate(prompt_ids, sampling)


def train(folder: Path, engine: type[Rollout] | None, resume: bool = False, **fields) -> GRPOTrainer:
    """A run of a float64 model with completions of `engine`, or of a float32 model with sampled ones."""
    settings = {**SMALL, "max_steps": 4, "beta": 0.05, "output_dir": str(folder), "resume_from_checkpoint": resume}
    settings |= {"max_tokens_per_microbatch": 24, "lr_scheduler_type": "constant", **fields}
    with pytest.MonkeyPatch.context() as patch:
        if engine is not None:
            patch.setattr(grpo_fast.trainer, "load_model", lambda config: (tiny_model(), digit_tokenizer()))
            patch.setattr(grpo_fast.trainer, "build_rollout", lambda *arguments: engine())
        patch.setattr(GRPOTrainer, "write_end", write_summary)
        trainer = GRPOTrainer(GRPOConfig(**settings))
        trainer.train()
    AcceleratorState._reset_state()
    return trainer


def write_summary(trainer: GRPOTrainer, summary: Summary, history: list) -> None:
    """Without plots and pages, which take longer than these runs."""
    write_json(trainer.run_folder / "summary.json", dataclasses.asdict(summary))


def whole_head_and_parts() -> float:
    """The largest error of a head in two vocabulary shards, as in tensor parallelism."""
    samples = torch.randint(2, 41, (3, 9), generator=torch.Generator().manual_seed(1))
    advantages = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = []
    for parts in (False, True):
        model = tiny_model()
        if parts:
            mesh = init_device_mesh("cpu", (2,))
            weight = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)])
            model.lm_head.weight = torch.nn.Parameter(weight)
        policy = FusedPolicy(model, check=False)
        logprobs, entropy = policy(samples, return_entropy=True)
        policy(samples, advantages=advantages).loss.backward()
        found.append([logprobs, entropy, *(whole(p.grad) for p in model.parameters())])
    return max((a - b).abs().max().item() for a, b in zip(*found, strict=True))


def work(rank: int, port: int, folder: Path) -> None:
    """What both processes do; their results are saved in `folder` for the tests."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    connect(use_cpu=True)
    found = {"parts": whole_head_and_parts()}
    with contextlib.redirect_stdout(None):
        for mode, fields in MODES.items():
            for case, more in CASES.items():
                found[f"{mode} {case}"] = trajectory({**fields, **more})
                AcceleratorState._reset_state()
            train(folder / mode / "two then one", Given, max_steps=2, **fields)
            train(folder / mode / "one then two", Given, resume=True, **fields)
            train(folder / mode / "served", Served, **SERVED, **fields)
            train(folder / mode / "queued", Served, **QUEUED, **fields)
            train(folder / mode / "sampled", None, **fields)
            train(folder / mode / "resumed", None, max_steps=2, **fields)
            train(folder / mode / "resumed", None, resume=True, **fields)
            try:
                train(folder / mode / "killed", Killed, **fields)
            except SystemExit as error:
                found[f"{mode} killed"] = error.code
            AcceleratorState._reset_state()
        found["gathers"] = gathers_of_a_microbatch()
        found["errors"] = errors(folder)
        found["bad steps"] = bad_steps()
    torch.save(found, folder / f"found{rank}.pt")
    dist.destroy_process_group()


class CountCollectives(TorchDispatchMode, dict):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            self[name] = self.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def gathers_of_a_microbatch() -> list[int]:
    """How often weights are gathered in a forward and in its backward."""
    config = GRPOConfig("x", dataset_name="x", reward_funcs=["x"], fsdp=True, use_cpu=True)
    learner = Learner(tiny_model(), config, Accelerator(cpu=True), [4, 5, 6], 0)
    batch, counts = step_batch(config, 0), []
    (microbatch,) = learner.microbatches(batch)
    inputs = learner.loss_inputs(batch, microbatch.tokens)
    learner.policy.train()
    with CountCollectives() as count:
        loss = learner.policy(microbatch, inputs).loss
        counts.append(sum(calls for name, calls in count.items() if "allgather" in name))
        loss.backward()
        counts.append(sum(calls for name, calls in count.items() if "allgather" in name) - counts[0])
    AcceleratorState._reset_state()
    return counts


def bad_steps() -> dict[str, str]:
    """What this process raises if only the second one finds a number that is not finite."""
    raised = {}
    for mode, fields in MODES.items():
        for kind in ("gradient", "weights"):
            config = GRPOConfig("x", dataset_name="x", reward_funcs=["x"], use_cpu=True, **fields)
            learner = Learner(
                tiny_model(), config, Accelerator(cpu=True, kwargs_handlers=[ddp_arguments()]), [4, 5, 6], 0
            )
            batch, parameter = step_batch(config, 0), next(p for p in learner.policy.parameters())
            before = flat(learner.policy.parameters())
            own = parameter.to_local() if hasattr(parameter, "to_local") else parameter

            def break_weights(*_, own=own.detach()):
                own.view(-1)[0] = float("inf")

            if dist.get_rank() == 1:
                if kind == "gradient":
                    batch.advantages[:] = float("nan")
                else:
                    getattr(learner.optimizer, "optimizer", learner.optimizer).register_step_post_hook(break_weights)
            try:
                learner.update(batch)
            except UserError as error:
                same = torch.equal(before, flat(learner.policy.parameters()))
                raised[f"{mode} {kind}"] = f"{type(error).__name__} ({same}): {error}"
            AcceleratorState._reset_state()
    return raised


def errors(folder: Path) -> dict[str, str]:
    """What this process raises if something fails in one of them."""

    def unknown() -> None:
        raise KeyError("a")

    def second_only() -> None:
        if dist.get_rank() == 1:
            raise UserError("of the second")

    base = {"model_name_or_path": "x", "dataset_name": "x", "reward_funcs": ["x"], "fsdp": True, "use_cpu": True}
    accelerator = Accelerator(cpu=True)

    def check(**fields) -> None:
        check_processes(GRPOConfig(**{**base, **fields}), accelerator)

    calls = {
        "main": lambda: on_main(unknown),
        "second": lambda: gather(second_only),
        "sampling": lambda: train(folder / "failing", Failing),
        "optim": partial(check, optim="adamw_torch_8bit"),
        "offload": partial(check, optim_offload=True),
        "quantised": partial(check, load_in_4bit=True, use_peft=True),
        "colocate": partial(check, use_vllm=True),
        "folder": lambda: train(folder / "ddp" / "one then two", Given),
    }
    raised = {}
    for name, call in calls.items():
        try:
            call()
        except (UserError, KeyError) as error:
            raised[name] = f"{type(error).__name__}: {error}"
    return raised
