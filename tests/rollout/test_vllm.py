"""Real vLLM on a CPU, in process and as a server: `make test-vllm`."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.evaluation.run import EvalOptions, EvalRun
from grpo_fast.files import read_metrics
from grpo_fast.model.loading import load_model
from grpo_fast.rollout import Sampling, build_rollout
from grpo_fast.rollout.probe import Probe
from grpo_fast.trainer import GRPOTrainer
from support.runs import assert_same_run

pytestmark = pytest.mark.vllm

VOCAB = 259
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
TOKENIZER = SimpleNamespace(eos_token_id=1)
# Whole blocks of vLLM's prefix cache on a CPU are 128 tokens.
LONG = [2 + i * i // 3 % 10 for i in range(300)]
PROMPTS = [LONG, [9, 8], [3, 4, 5], [11]]
ARCHITECTURES = [(name, tied) for name in ("Llama", "Qwen2", "Qwen3") for tied in (True, False)]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """vLLM reads memory that it never wrote, and masks the result."""


def make_model(name="Llama", tied=True, **overrides):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **overrides}, tie_word_embeddings=tied)
    return AutoModelForCausalLM.from_config(config).float().eval()


def make_config(**fields):
    fields = {"num_generations": 4, "generation_batch_size": 16, "max_completion_length": 16, **fields}
    return GRPOConfig(
        model_name_or_path="random-llama", dataset_name="sort_digits", reward_funcs=["exact_answer"], use_vllm=True,
        **fields,
    )  # fmt: skip


@contextmanager
def colocated(model, **fields):
    rollout = build_rollout(make_config(**fields), model, TOKENIZER, len(LONG))
    try:
        yield rollout
    finally:
        rollout.close()


@torch.no_grad()
def scored(model, prompt, token_ids, temperature=1.0):
    """The model's log-probabilities of a completion ``[n]``, from its full logits."""
    ids = torch.tensor([prompt + token_ids])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)


def largest_difference(model, responses, temperature=1.0):
    each = len(responses) // len(PROMPTS)
    return max(
        (scored(model, PROMPTS[i // each], r.token_ids, temperature) - torch.tensor(r.logprobs)).abs().max().item()
        for i, r in enumerate(responses)
    )


def optimizer_step(model):
    """One step of AdamW on some sequence."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.004)
    ids = torch.tensor([LONG[:64]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.zero_grad()


def check_sync(rollout, model):
    """The sampler's log-probabilities are the trainer's; after a step they are not; after a sync they are again."""
    rollout.sync(model)
    sampling = Sampling(4, 16, temperature=0.7)
    assert largest_difference(model, rollout.generate(PROMPTS, sampling), 0.7) < 1e-5
    optimizer_step(model)
    assert largest_difference(model, rollout.generate(PROMPTS, sampling), 0.7) > 0.1
    rollout.sync(model)
    assert largest_difference(model, rollout.generate(PROMPTS, sampling), 0.7) < 1e-5


def check_traps(rollout, model, monkeypatch):
    """The probe stops a run whose engine keeps old prefixes or, where it is tied, its old head."""
    probe = Probe(LONG, len(LONG) + 16, 1.0, 1e-3)

    def check():
        return probe.check(rollout, lambda prompt, ids: scored(model, prompt, ids))

    rollout.sync(model)
    assert check() < 1e-5
    for step in ("_reset_prefix_cache", "_repack_head"):
        optimizer_step(model)
        with monkeypatch.context() as patch:
            patch.setattr(rollout, step, lambda: None)
            rollout.sync(model)
            with pytest.raises(UserError, match=r"does not have the trainer's weights.*differ by up to"):
                check()
        rollout.sync(model)
        assert check() < 1e-5


@pytest.mark.parametrize(("name", "tied"), ARCHITECTURES)
def test_in_process_agrees_with_the_trainer(name, tied):
    model = make_model(name, tied)
    with colocated(model) as rollout:
        check_sync(rollout, model)


@pytest.fixture(scope="module")
def llama():
    """One engine for the tests that leave it as it was."""
    model = make_model()
    with colocated(model) as rollout:
        rollout.sync(model)
        yield rollout, model


def test_the_probe_sees_old_prefixes_and_an_old_head(llama, monkeypatch):
    rollout, model = llama
    check_traps(rollout, model, monkeypatch)


def test_filters_are_in_the_log_probabilities(llama):
    """Each of them beside transformers' own: tokens left out have no probability, the others share it."""
    rollout, model = llama
    filters = {
        "top_k": (5, transformers.TopKLogitsWarper(5)),
        "top_p": (0.8, transformers.TopPLogitsWarper(0.8)),
        "min_p": (0.1, transformers.MinPLogitsWarper(0.1)),
        "repetition_penalty": (1.3, transformers.RepetitionPenaltyLogitsProcessor(1.3)),
    }
    for name, (value, processor) in filters.items():
        arguments = {"generation_kwargs": {name: value}} if name == "repetition_penalty" else {name: value}
        for prompt in PROMPTS[:2]:
            for response in rollout.generate([prompt], Sampling(4, 6, **arguments)):
                ids = torch.tensor([prompt + response.token_ids])
                for place in range(len(prompt), ids.shape[1]):
                    with torch.no_grad():
                        logits = model(input_ids=ids[:, :place]).logits[:, -1]
                    expected = processor(ids[:, :place], logits).log_softmax(-1)[0, ids[0, place]].item()
                    assert response.logprobs[place - len(prompt)] == pytest.approx(expected, abs=1e-5), name


def test_completions_end_at_their_end_token(llama):
    rollout, _ = llama
    kept, rollout.eos_token_ids = rollout.eos_token_ids, set(range(1, 40))
    try:
        responses = rollout.generate(PROMPTS, Sampling(50, 6))
        late = rollout.generate(PROMPTS, Sampling(20, 6, generation_kwargs={"min_new_tokens": 3}))
    finally:
        rollout.eos_token_ids = kept
    ended = 0
    for response in responses:
        assert not set(response.token_ids[:-1]) & set(range(1, 40))
        assert len(response.logprobs) == len(response.token_ids)
        if response.finish_reason == "stop":
            ended += 1
            assert response.token_ids[-1] in range(1, 40)
        else:
            assert len(response.token_ids) == 6
            assert response.token_ids[-1] not in range(1, 40)
    assert 0 < ended < len(responses)
    assert min(len(r.token_ids) for r in responses) == 1
    assert min(len(r.token_ids) for r in late) >= 3


def test_torchs_seed_decides_what_is_sampled(llama):
    """And nothing else: a resumed run samples the same, and other users of the generator are not disturbed."""
    rollout, _ = llama
    torch.manual_seed(7)
    first = rollout.generate(PROMPTS, Sampling(4, 8))
    after = torch.rand(3)
    torch.manual_seed(7)
    assert rollout.generate(PROMPTS, Sampling(4, 8)) == first
    assert torch.equal(torch.rand(3), after)
    assert rollout.generate(PROMPTS, Sampling(4, 8)) != first
    assert len({tuple(r.token_ids) for r in first}) == len(first)
    own = Sampling(4, 8, seed=3)
    before = torch.get_rng_state()
    assert rollout.generate(PROMPTS, own) == rollout.generate(PROMPTS, own)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_follow_the_models_distribution(llama):
    rollout, model = llama
    draws = 4000
    prompt = PROMPTS[2]
    first = torch.tensor([r.token_ids[0] for r in rollout.generate([prompt], Sampling(draws, 1, temperature=0.8))])
    with torch.no_grad():
        p = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.8).softmax(-1)
    counts = torch.bincount(first, minlength=VOCAB)
    likely = p * draws >= 5
    chi_square = ((counts - p * draws) ** 2 / (p * draws))[likely].sum().item()
    # Mean k, standard deviation sqrt(2 k): six of them away would be a wrong distribution.
    assert chi_square < likely.sum() + 6 * (2 * likely.sum()) ** 0.5


def test_greedy_takes_the_likeliest_token(llama):
    rollout, model = llama
    (response,) = rollout.generate([PROMPTS[2]], Sampling(1, 8, temperature=0.0))
    ids = torch.tensor([PROMPTS[2] + response.token_ids])
    with torch.no_grad():
        likeliest = model(input_ids=ids).logits[0].argmax(-1)
    assert response.token_ids == likeliest[len(PROMPTS[2]) - 1 : -1].tolist()


def test_what_vllm_does_not_have_is_refused(llama):
    rollout, _ = llama
    for filters, message in (
        ({"typical_p": 0.5}, r"'typical_p' is not allowed with vLLM"),
        ({"repetition_penlty": 1.1}, r"did you mean 'repetition_penalty'"),
        ({"repetition_penalty": -1.0}, r"repetition_penalty=-1.0 is not allowed: it must be above 0"),
        ({"min_new_tokens": 9}, r"min_new_tokens=9 is not allowed: it must be from 0 to 8"),
    ):
        with pytest.raises(UserError, match=message):
            rollout.check([5], Sampling(2, 8, generation_kwargs=filters))
    state = torch.get_rng_state()
    rollout.check([5], Sampling(2, 8, top_p=0.5, top_k=3, generation_kwargs={"repetition_penalty": 1.1}))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_process_stays_the_trainers(llama):
    """vLLM would forbid `torch.set_num_threads` and preload libraries into subprocesses."""
    assert "skip" not in torch.set_num_threads.__name__
    assert "tcmalloc" not in os.environ.get("LD_PRELOAD", "")
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_come_merged(rslora):
    """Also after a step that trains the adapters alone; the trained tensors stay as they are."""
    import peft

    model = make_model("Qwen2")
    lora = peft.LoraConfig(r=4, lora_alpha=16, use_rslora=rslora, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    kept = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    with colocated(model) as rollout:
        rollout.sync(adapted)
        assert largest_difference(model, rollout.generate(PROMPTS, Sampling(4, 16))) < 1e-5
        assert all(torch.equal(parameter, kept[name]) for name, parameter in adapted.named_parameters())
        with adapted.disable_adapter():
            assert largest_difference(model, rollout.generate(PROMPTS, Sampling(4, 16))) > 0.1
        check_sync(rollout, adapted)


def test_a_model_that_vllm_cannot_run_is_refused():
    with pytest.raises(UserError, match=r"^vLLM cannot sample from LlamaForCausalLM: .*head_dim=16"):
        build_rollout(make_config(), make_model(head_dim=16), TOKENIZER, 20)
    # And leaves nothing behind that another engine would stumble over.
    with colocated(make_model()) as rollout:
        rollout.check([5], Sampling(1, 1))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """`grpo-fast serve` in a process of its own, for random-llama as the run's configuration makes it."""

    def __init__(self, folder, **fields):
        self.fields = {
            "model_name_or_path": "random-llama",
            "dataset_name": "sort_digits",
            "reward_funcs": ["digits_included", "digits_ordered", "exact_answer"],
            "eval_metric": "exact_answer",
            "use_vllm": True,
            "vllm_mode": "server",
            "vllm_server_port": free_port(),
            "use_cpu": True,
            **fields,
        }
        folder.mkdir(exist_ok=True)
        self.file, self.log = folder / "run.yaml", folder / "server.log"
        self.file.write_text(yaml.safe_dump(self.fields))
        self.process = None

    def start(self):
        command = [sys.executable, "-m", "grpo_fast", "serve", str(self.file)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        return self

    def kill(self):
        """As a machine that goes down: the server and its engine get no chance to say anything."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def config(self, **fields):
        return GRPOConfig(**{**self.fields, **fields})

    def rollout(self, model, longest_prompt=len(LONG)):
        try:
            return build_rollout(self.config(), model, TOKENIZER, longest_prompt)
        except UserError as error:
            raise RuntimeError(self.log.read_text()[-3000:]) from error


SERVED = {
    "model_init_kwargs": {"head_dim": 32, "tie_word_embeddings": True, "max_position_embeddings": 512},
    "max_completion_length": 16,
    "num_generations": 4,
    "generation_batch_size": 64,
    "vllm_max_model_length": 400,
}


@pytest.fixture(scope="module", autouse=True)
def servers(tmp_path_factory):
    """Two servers, which start while the tests in process run; each test that kills one has it to itself."""
    os.environ["VLLM_API_KEY"] = "a-secret"
    pair = [Server(tmp_path_factory.mktemp("server"), **SERVED).start() for _ in range(2)]
    yield pair
    for server in pair:
        server.kill()
    del os.environ["VLLM_API_KEY"]


@pytest.fixture
def server(servers):
    return servers[0]


def served_model():
    """What the server was started for, with weights that are far from uniform."""
    torch.manual_seed(0)
    model, _ = load_model(GRPOConfig("random-llama", dataset_name="sort_digits", reward_funcs=["exact_answer"],
                                     model_init_kwargs=SERVED["model_init_kwargs"]))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model.eval()


def test_the_server_agrees_with_the_trainer(server):
    model = served_model()
    check_sync(server.rollout(model), model)


def test_the_server_asks_for_its_key_on_every_path(server, monkeypatch):
    """vLLM's own check leaves out most of them."""
    client = server.rollout(served_model()).client

    def status(path, key):
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        body = b'{"method": "get_model", "args": []}'
        try:
            return urllib.request.urlopen(urllib.request.Request(client.base_url + path, body, headers)).status
        except urllib.error.HTTPError as error:
            return error.code

    for path in ("/inference/v1/generate", "/collective_rpc", "/update_weight_version", "/reset_prefix_cache", "/x"):
        assert status(path, None) == status(path, "another") == 401, path
        assert status(path, "a-secret") != 401, path
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(UserError, match="refuses requests without VLLM_API_KEY"):
        build_rollout(server.config(), served_model(), TOKENIZER, len(LONG))


def test_the_probe_sees_a_servers_old_prefixes_and_old_head(server, monkeypatch):
    model = served_model()
    check_traps(server.rollout(model), model, monkeypatch)


def test_in_process_and_server_sample_the_same(server):
    """Same weights, same seeds: the backends differ in where they run alone."""
    model = served_model()
    sampling = Sampling(4, 12, temperature=0.9, top_k=6, seed=5)
    remote = server.rollout(model)
    remote.sync(model)
    there = remote.generate(PROMPTS, sampling)
    with colocated(model) as rollout:
        rollout.sync(model)
        here = rollout.generate(PROMPTS, sampling)
    assert [r[:2] for r in here] == [r[:2] for r in there]
    for ours, theirs in zip(here, there, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


# Training: the sorting recipe, made for four heads of 16, with heads that vLLM has kernels for.
RECIPE = {
    "num_generations": 16,
    "generation_batch_size": 1024,
    "max_completion_length": 5,
    "entropy_coef": 0.2,
    "learning_rate": 3e-3,
    "adam_beta2": 0.99,
    "max_tokens_per_microbatch": 16384,
    "save_steps": 1,
    "max_eval_samples": 64,
}


def rewards(folder):
    return [entry["reward"] for entry in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_three_steps_of_the_sorting_recipe(server, tmp_path, mode):
    config = server.config(vllm_mode=mode, output_dir=str(tmp_path), **{**RECIPE, "max_steps": 3})
    trainer = GRPOTrainer(config)
    trainer.train()
    first, second, third = rewards(tmp_path)
    assert first < second < third


def test_a_resumed_run_samples_what_a_whole_one_does(server, tmp_path):
    """Bit for bit: from the checkpoint's weights and not from those that the engine was started with."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    fields = {**RECIPE, "vllm_mode": "colocate", "max_steps": 3, "save_total_limit": 9, "max_eval_samples": 16}
    GRPOTrainer(server.config(**fields, output_dir=str(whole))).train()
    shutil.copytree(whole, part)
    for step in (2, 3):
        shutil.rmtree(part / f"checkpoint-{step}")
    GRPOTrainer(server.config(**fields, output_dir=str(part), resume_from_checkpoint=True)).train()
    assert_same_run(part, whole)


def test_an_evaluation_in_process(tmp_path, server):
    """Greedy completions are those that transformers gives."""
    fields = {**RECIPE, "vllm_mode": "colocate"}
    for name, use_vllm in (("vllm", True), ("transformers", False)):
        EvalRun(server.config(**fields, use_vllm=use_vllm), EvalOptions(greedy=True, output=tmp_path / name)).run()
    ours, theirs = ((tmp_path / name / "samples.jsonl").read_text() for name in ("vllm", "transformers"))
    assert ours == theirs


def test_a_server_killed_while_a_run_samples(servers, tmp_path):
    """The run ends in one line with its checkpoint written, and goes on with another server."""
    killed, other = servers
    run = tmp_path / "run"
    command = [sys.executable, "-m", "grpo_fast", "train"]
    fields = {**killed.fields, **RECIPE, "max_steps": 1000, "output_dir": str(run)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    process = subprocess.Popen(
        [*command, str(tmp_path / "run.yaml")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (run / "checkpoint-2" / "trainer_state.json").is_file():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    killed.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = [line for line in errors.splitlines() if "error" in line]
    assert line.startswith(
        f"grpo-fast: error: the vLLM server at http://127.0.0.1:{killed.fields['vllm_server_port']} no"
    )
    assert "restart it and continue this run with --resume" in line
    assert "Traceback" not in errors
    steps = len(rewards(run))
    assert (run / f"checkpoint-{steps}" / "trainer_state.json").is_file()
    more = ["--resume", "--vllm_server_port", str(other.fields["vllm_server_port"]), "--max_steps", str(steps + 2)]
    again = subprocess.run([*command, str(run / "config.yaml"), *more], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert len(rewards(run)) == steps + 2


def test_a_server_killed_in_the_middle_of_a_request(servers):
    server = servers[1]
    model = served_model()
    rollout = server.rollout(model)
    rollout.sync(model)
    prompts, sampling = [LONG[:200]] * 64, Sampling(64, 150)
    assert len(rollout.generate(prompts[:1], replace(sampling, num_generations=1))) == 1
    threading.Timer(0.5, server.kill).start()
    with pytest.raises(
        UserError, match=r"no longer answers \(.*\); restart it and continue this run with --resume$"
    ) as error:
        rollout.generate(prompts, sampling)
    assert "\n" not in str(error.value)
