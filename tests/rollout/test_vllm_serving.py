"""Real vLLM on a CPU, as a server, and training and evaluation with it: `make test-vllm`."""

import copy
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
from dataclasses import replace

import pytest
import torch
import yaml

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.evaluation.run import EvalOptions, EvalRun
from grpo_fast.files import read_metrics
from grpo_fast.model.loading import load_model
from grpo_fast.rollout import Sampling, build_rollout
from grpo_fast.rollout.vllm import server as server_module
from grpo_fast.trainer import GRPOTrainer
from support.runs import assert_same_run
from support.vllm_models import LONG, PROMPTS, TOKENIZER, adapt, check_stale, check_sync, check_traps, colocated

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Replaces the global fixture: vLLM reads memory that it never wrote, and masks the result."""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """`grpo-fast serve` in another process, for random-llama with the run's configuration."""

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
        """Kill the server and its engine without notice, as when a machine goes down."""
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
    """Two servers; each test that kills one uses another one."""
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
    """The model of the server's configuration, with larger weights so that its distribution is far from uniform."""
    torch.manual_seed(0)
    model, _ = load_model(GRPOConfig("random-llama", dataset_name="sort_digits", reward_funcs=["exact_answer"],
                                     model_init_kwargs=SERVED["model_init_kwargs"]))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model.eval()


def test_server_logprobs_equal_the_trainer(server):
    model = served_model()
    check_sync(server.rollout(model), model)


def test_server_requires_its_key_on_every_path(server, monkeypatch):
    """vLLM's own check does not cover most paths."""
    client = server.rollout(served_model()).client

    def status(path, key):
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        body = b'{"method": "repack_head", "args": []}'
        try:
            return urllib.request.urlopen(
                urllib.request.Request(client.base_url + path, body, headers), timeout=60
            ).status
        except urllib.error.HTTPError as error:
            return error.code

    calls = ("collective_rpc", "update_weight_version", "reset_prefix_cache", "v1/load_lora_adapter", "x")
    for path in ("/inference/v1/generate", *(f"/{call}" for call in calls)):
        assert status(path, None) == status(path, "another") == 401, path
        assert status(path, "a-secret") != 401, path
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(UserError, match="refuses requests without VLLM_API_KEY"):
        build_rollout(server.config(), served_model(), TOKENIZER, len(LONG))


def test_server_probe_detects_old_prefixes_and_an_old_head(server, monkeypatch):
    model = served_model()
    check_traps(server.rollout(model), model, monkeypatch)


def test_server_and_colocate_sample_the_same(server):
    """With the same weights and seeds."""
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


ADAPTED = {**SERVED, "use_peft": True, "lora_r": 4}


@pytest.fixture(scope="module")
def adapted_server(servers, tmp_path_factory):
    """A server that takes adapters alone."""
    server = Server(tmp_path_factory.mktemp("adapted"), **ADAPTED).start()
    yield server
    server.kill()


def test_server_takes_adapters_alone(adapted_server, monkeypatch):
    """After the first sync nothing else is sent; the server has one version at a time."""
    model = served_model()
    adapted = adapt(model)
    rollout = adapted_server.rollout(model)
    assert rollout.warning == ""
    check_sync(rollout, adapted)
    monkeypatch.setattr(rollout, "_send_weights", None)
    check_sync(rollout, adapted)
    (name,) = [each["id"] for each in rollout.client.request("GET", "/v1/models")["data"] if each["parent"]]
    assert name == rollout.version
    rollout.close()
    assert not [each for each in rollout.client.request("GET", "/v1/models")["data"] if each["parent"]]


def test_server_probe_detects_stale_adapters(adapted_server, monkeypatch):
    """New adapters have the name of old ones, and the old ones' files."""
    model = served_model()
    adapted = adapt(model)
    rollout = adapted_server.rollout(model)
    write = server_module.write_adapter

    def old_files(model, made, version):
        with monkeypatch.context() as patch:
            patch.setattr(server_module, "write_adapter", lambda _, folder: write(old, folder))
            send(model, made, version)

    send, old = rollout._send_adapter, copy.deepcopy(adapted)
    check_stale(rollout, adapted, model, monkeypatch, "_send_adapter", old_files)
    # A version that was never sent is unknown to the server.
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "_send_adapter", lambda *_: None)
        rollout.sync(adapted)
        with pytest.raises(UserError, match="sampled from other weights than this run's"):
            rollout.generate(PROMPTS, Sampling(1, 2))


def test_server_without_adapters_gets_merged_weights(server):
    model = served_model()
    adapted = adapt(model)
    rollout = server.rollout(model)
    assert rollout.warning.endswith("because the server was started without --enable-lora")
    check_sync(rollout, adapted)


def test_server_refuses_damaged_weights(server, monkeypatch):
    """A bit that flips on the way is noticed before vLLM loads anything."""
    model = served_model()
    rollout = server.rollout(model)
    write = server_module.write_tensors

    def damaged(files, folder):
        checksum = write(files, folder)
        (file,) = folder.glob("*.safetensors")
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
        return checksum

    monkeypatch.setattr(server_module, "write_tensors", damaged)
    with pytest.raises(UserError, match=r"cannot read \S+: its files are not what this process wrote"):
        rollout.sync(model)


def test_server_gets_changed_values_only(servers, tmp_path):
    """Weights in bfloat16, after a step that changes some of them; a server that lost its copy gets all again."""
    server = Server(tmp_path / "half", **{**SERVED, "dtype": "bfloat16"}).start()
    try:
        model = served_model().bfloat16()
        rollout = server.rollout(model)
        sent = []
        load = rollout._load
        rollout._load = lambda folder, *rest: sent.append(folder_bytes(folder)) or load(folder, *rest)
        rollout.sync(model)
        first = rollout.generate(PROMPTS, Sampling(2, 8, seed=1))
        for step in range(3):
            with torch.no_grad():
                for weight in model.parameters():
                    weight.view(-1)[step :: 40 if step else 7] *= 1.05
            rollout.sync(model)
        assert sent[1] < sent[0] / 2.5
        assert max(sent[2:]) < sent[0] / 5
        after = rollout.generate(PROMPTS, Sampling(2, 8, seed=1))
        assert after != first
        # Another connection sends all weights.
        whole = server.rollout(model)
        whole.sync(model)
        assert whole.generate(PROMPTS, Sampling(2, 8, seed=1)) == after
        # The other's copy is now the base of nothing that the first one sends.
        rollout.sync(model)
        assert sent[-1] == sent[0]
        assert rollout.generate(PROMPTS, Sampling(2, 8, seed=1)) == after
    finally:
        server.kill()


def folder_bytes(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# The sorting recipe, but with a head dimension for which vLLM has kernels.
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
def test_train_three_steps_of_the_sorting_recipe(server, tmp_path, mode):
    config = server.config(vllm_mode=mode, output_dir=str(tmp_path), **{**RECIPE, "max_steps": 3})
    trainer = GRPOTrainer(config)
    trainer.train()
    first, second, third = rewards(tmp_path)
    assert first < second < third


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_train_adapters_alone(adapted_server, tmp_path, mode):
    """The probe agrees with the trainer before every step."""
    config = adapted_server.config(vllm_mode=mode, output_dir=str(tmp_path), **{**RECIPE, "max_steps": 3})
    trainer = GRPOTrainer(config)
    assert trainer.rollout.engine.adapters
    differences, check = [], trainer.rollout.probe.check
    trainer.rollout.probe.check = lambda *arguments: differences.append(check(*arguments)) or differences[-1]
    trainer.train()
    assert len(rewards(tmp_path)) == 3
    assert len(differences) >= 3
    assert max(differences) < 1e-5


def test_train_resumed_equals_a_whole_run(server, tmp_path):
    """Bit for bit: it samples from the weights of the checkpoint."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    fields = {**RECIPE, "vllm_mode": "colocate", "max_steps": 3, "save_total_limit": 9, "max_eval_samples": 16}
    GRPOTrainer(server.config(**fields, output_dir=str(whole))).train()
    shutil.copytree(whole, part)
    for step in (2, 3):
        shutil.rmtree(part / f"checkpoint-{step}")
    GRPOTrainer(server.config(**fields, output_dir=str(part), resume_from_checkpoint=True)).train()
    assert_same_run(part, whole)


def test_eval_in_process_equals_transformers(tmp_path, server):
    """Greedy completions are the same."""
    fields = {**RECIPE, "vllm_mode": "colocate"}
    for name, use_vllm in (("vllm", True), ("transformers", False)):
        EvalRun(server.config(**fields, use_vllm=use_vllm), EvalOptions(greedy=True, output=tmp_path / name)).run()
    ours, theirs = ((tmp_path / name / "samples.jsonl").read_text() for name in ("vllm", "transformers"))
    assert ours == theirs


def test_train_with_a_server_that_is_killed(servers, tmp_path):
    """The run ends with one line and a checkpoint, and continues with another server."""
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


def test_generate_with_a_server_that_is_killed(servers):
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
