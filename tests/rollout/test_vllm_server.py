"""The engine `VLLMServer` and `serve`, with a fake server that can fail in many ways; without vLLM."""

import dataclasses
import itertools
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.rollout import Sampling
from grpo_fast.rollout.vllm import common, json_client, serve
from grpo_fast.rollout.vllm import server as vllm_server
from grpo_fast.rollout.vllm.kv_plan import KVPlan
from grpo_fast.rollout.vllm.wire import in_files
from support.tiny import tiny_model
from support.vllm_server import OPTIONS, PROMPTS, FakeServer, connect


@pytest.fixture
def start():
    servers = []

    def start(*args, **kwargs):
        servers.append(FakeServer(*args, **kwargs))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(json_client, "RETRIES", (0.01, 0.02, 0.03))
    monkeypatch.setattr(json_client, "WATCH_EVERY", 0.1)
    monkeypatch.setattr(json_client, "WATCH_TIMEOUT", 0.2)


def test_generate_returns_completions_in_the_order_of_the_prompts(start):
    server = start()
    rollout = connect(server.url)
    torch.manual_seed(3)
    responses = rollout.generate(PROMPTS, Sampling(2, 8, temperature=0.7, top_p=0.9, top_k=4, min_p=0.1))
    assert [r.token_ids[:-2] for r in responses] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert all(r.logprobs == [-i / 10 for i in r.token_ids] and r.finish_reason == "stop" for r in responses)
    sent = [body["sampling_params"] for body in server.called("/inference/v1/generate")]
    assert len({params.pop("seed") for params in sent}) == len(PROMPTS)
    wanted = {"n": 2, "max_tokens": 8, "temperature": 0.7, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "logprobs": 0}
    wanted |= {"ignore_eos": True, "stop_token_ids": [1], "detokenize": False}
    assert sent == [wanted] * len(PROMPTS)
    torch.manual_seed(3)
    assert rollout.generate(PROMPTS, Sampling(2, 8)) == responses
    assert rollout.generate(PROMPTS, Sampling(2, 8)) != responses


def test_sync_sends_the_weights_and_clears_the_prefix_cache(start):
    server = start()
    model = tiny_model(torch.float32)
    rollout = connect(server.url, model)
    rollout.sync(model)
    assert server.loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in server.loaded.items())
    steps = [body.get("method", path) for path, body in server.calls if body is not None]
    assert steps == ["load_folder", "repack_head", "/reset_prefix_cache", "/update_weight_version"]
    folder = server.called("/collective_rpc")[0]["args"][0]
    assert not Path(folder).exists()
    assert rollout.generate(PROMPTS, Sampling(1, 8))


def test_in_files_limits_the_size_of_each_file():
    tensors = {f"t{i}": torch.zeros(n) for i, n in enumerate((2, 2, 9, 1, 1, 1, 1, 1))}
    groups = [list(group) for group in in_files(iter(tensors.items()), most=16)]
    assert groups == [["t0", "t1"], ["t2"], ["t3", "t4", "t5", "t6"], ["t7"]]


def test_generate_repeats_failed_requests_with_the_same_seed(start):
    failures = iter([("drop", ""), (500, "busy"), (200, "<html>")])
    server = start(lambda path, body: next(failures, None) if "generate" in path else None)
    rollout = connect(server.url)
    torch.manual_seed(0)
    (response,) = rollout.generate([[5]], Sampling(1, 8))
    bodies = server.called("/inference/v1/generate")
    assert len(bodies) == 4
    assert all(body == bodies[0] for body in bodies)
    torch.manual_seed(0)
    assert rollout.generate([[5]], Sampling(1, 8)) == [response]


def test_generate_repeats_a_failed_request_a_limited_number_of_times(start):
    server = start(lambda path, body: (500, "engine is dead") if "generate" in path else None)
    rollout = connect(server.url)
    with pytest.raises(UserError) as error:
        rollout.generate([[5]], Sampling(1, 8))
    assert str(error.value) == (
        f"the vLLM server at {server.url} no longer answers (status 500: engine is dead); "
        "restart it and continue this run with --resume"
    )
    assert len(server.called("/inference/v1/generate")) == 4


def test_generate_does_not_repeat_a_refused_request(start):
    server = start(lambda path, body: (400, {"error": "top_k is odd"}) if "generate" in path else None)
    rollout = connect(server.url)
    with pytest.raises(UserError, match="top_k is odd"):
        rollout.generate(PROMPTS, Sampling(1, 8))
    assert len(server.called("/inference/v1/generate")) <= len(PROMPTS)


def test_generate_with_a_server_that_dies(start):
    server = start()
    asked = threading.Event()

    def die(path, body):
        if "generate" in path:
            asked.set()
            time.sleep(0.2)
            return "drop", ""

    rollout = connect(server.url)
    server.hook = die

    def stop():
        asked.wait()
        server.http.shutdown()
        server.http.socket.close()

    threading.Thread(target=stop).start()
    with pytest.raises(
        UserError, match=r"no longer answers .*; restart it and continue this run with --resume$"
    ) as error:
        rollout.generate(PROMPTS * 10, Sampling(2, 8))
    assert "\n" not in str(error.value)


def test_generate_with_a_server_that_hangs(start):
    hung = threading.Event()

    def hang(path, body):
        if "generate" in path:
            hung.set()
        if hung.is_set():
            time.sleep(5)

    server = start(hang)
    rollout = connect(server.url)
    begin = time.monotonic()
    with pytest.raises(UserError, match="no longer answers"):
        rollout.generate(PROMPTS, Sampling(1, 8))
    assert time.monotonic() - begin < 4


def test_generate_waits_for_a_slow_server(start):
    server = start(lambda path, body: time.sleep(1.0) if "generate" in path else None)
    assert len(connect(server.url).generate(PROMPTS, Sampling(1, 8))) == 3


def test_generate_with_a_server_that_answers_only_health(start, monkeypatch):
    monkeypatch.setattr(json_client, "WATCH_TIMEOUT", 10.0)
    monkeypatch.setattr(vllm_server, "PATIENCE", 0.1)
    monkeypatch.setattr(vllm_server, "PATIENCE_PER_TOKEN", 0.05)
    server = start()
    rollout = connect(server.url)
    given_up = threading.Event()
    server.hook = lambda path, body: given_up.wait(20) and None if "generate" in path else None
    try:
        with pytest.raises(UserError, match=r"no longer answers \(no answer in 0\.5 s\)"):
            rollout.generate(PROMPTS, Sampling(1, 8))
    finally:
        given_up.set()


def test_generate_limits_the_answer_to_the_requested_tokens(start, monkeypatch):
    monkeypatch.setattr(vllm_server, "ANSWER_BYTES", 100)
    server = start()
    rollout = connect(server.url)
    assert rollout.generate(PROMPTS, Sampling(2, 8))
    server.hook = lambda path, body: (200, "[" + "1," * 9000 + "1]") if "generate" in path else None
    with pytest.raises(UserError, match=r"an answer of more than 17,508 bytes"):
        rollout.generate([[5]], Sampling(2, 8))


def edited(**changes):
    """An answer with one completion, some of whose fields are changed."""
    ids = [4, 1]
    choice = {"index": 0, "token_ids": ids, "finish_reason": "stop"}
    choice["logprobs"] = {"content": [{"token_id": i, "logprob": -1.0} for i in ids]}
    choice["weight_versions"] = [{"version": "default"}]
    return {"choices": [{**choice, **changes}]}


def scored(*values):
    """An answer with one completion of alternating token ids and log-probabilities."""
    ids = list(values[::2])
    content = [{"token_id": i, "logprob": value} for i, value in zip(ids, values[1::2], strict=True)]
    return edited(token_ids=ids, logprobs={"content": content})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({}, "KeyError: 'choices'"),
        ([], "TypeError"),
        (None, "TypeError"),
        ({"choices": []}, "0 completions instead of 1"),
        (edited(logprobs=None), "TypeError"),
        (edited(logprobs={"content": [{"token_id": 4, "logprob": -1.0}]}), "log-probabilities of different tokens"),
        (edited(token_ids=[], logprobs={"content": []}), r"0 tokens \(at most 8 were requested\), 0 log-probabilities"),
        (edited(finish_reason="abort"), "the finish reason 'abort'"),
        (edited(finish_reason="\x1b]0;hi\x07" * 999), r"the finish reason '\\x1b\]0;hi.*\.\.\..*'$"),
        (edited(finish_reason=[[[[[[[[[]]]]]]]]]), r"the finish reason \[+\.\.\.\]+$"),
        (edited(weight_versions=None), "TypeError"),
        (edited(index=3), "1 completions instead of 1, or wrong numbers"),
        (scored(4.0, -1.0), r"the token id 4\.0; it must be from 0 to 40"),
        (scored(True, -1.0), "the token id True"),
        (scored("4", -1.0), "the token id '4'"),
        (scored(-1, -1.0), "the token id -1"),
        (scored(41, -1.0), "the token id 41; it must be from 0 to 40"),
        (scored(10**400, -1.0), r"the token id 1000+\.\.\.0+;"),
        (scored(4, "-1.0"), "the log-probability '-1.0'; it must be finite and at most 0"),
        (scored(4, None), "the log-probability None"),
        (scored(4, True), "the log-probability True"),
        (scored(4, float("nan")), "the log-probability nan"),
        (scored(4, float("-inf")), "the log-probability -inf"),
        (scored(4, 0.5), r"the log-probability 0\.5"),
        (scored(4, -(10**400)), r"the log-probability -1000"),
        (scored(*[4, -1.0] * 9), r"9 tokens \(at most 8 were requested\), 9 log-probabilities"),
        ("[" * 100_000, r"no longer answers \(not JSON \(nested too deeply\): \[\["),
        ("1" * 5000, r"no longer answers \(not JSON"),
        ("\x1b[2J\x9b2J\u202e", r"not JSON .*: \\x1b\[2J\\x9b2J\\u202e\)"),
    ],
)
def test_generate_refuses_an_invalid_answer_in_one_line(start, answer, message):
    server = start(lambda path, body: (200, answer) if "generate" in path else None)
    rollout = connect(server.url)
    with pytest.raises(UserError, match=message) as error:
        rollout.generate([[5]], Sampling(1, 8))
    assert "\n" not in str(error.value)


def test_generate_refuses_samples_from_other_weights(start):
    """As after a restart of the server, or after a sync by another run."""
    server = start()
    model = tiny_model(torch.float32)
    rollout, other = connect(server.url, model), connect(server.url, model)
    rollout.sync(model)
    assert rollout.generate(PROMPTS, Sampling(1, 8))
    other.sync(model)
    with pytest.raises(UserError, match="sampled from other weights than this run's"):
        rollout.generate(PROMPTS, Sampling(1, 8))
    assert other.generate(PROMPTS, Sampling(1, 8))


def test_connect_without_a_server(start):
    with pytest.raises(UserError, match=r"no vLLM server answers at http://127.0.0.1:9 within vllm_server_timeout=0.3"):
        connect("http://127.0.0.1:9")
    for address in ("127.0.0.1:8000", "http://", "ftp://host", "http://host:port", "http://[::1:80"):
        with pytest.raises(UserError, match=r"it must be (an address )?like http://127.0.0.1:8000"):
            connect(address)


def test_connect_waits_for_a_server_that_starts_late(start, capsys):
    ready = time.monotonic() + 0.2
    server = start(lambda path, body: (503, "") if time.monotonic() < ready else None)
    connect(server.url)
    assert len(server.called("/health")) > 1
    assert capsys.readouterr().out.count(f"for a vLLM server at {server.url} ...\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**OPTIONS, "parallel_config": {"worker_extension_cls": ""}}, r"--worker-extension-cls \(none\), but needs"),
        (
            {**OPTIONS, "model_config": {"logprobs_mode": "raw_logprobs", "max_model_len": 20}},
            "--logprobs-mode raw_logprobs, but needs processed_logprobs",
        ),
        (
            {**OPTIONS, "model_config": {"logprobs_mode": "processed_logprobs", "max_model_len": 19}},
            "accepts 19 tokens, but the longest prompt and completion have 20",
        ),
        ({}, "does not report its options"),
        (
            {**OPTIONS, "parallel_config": {"worker_extension_cls": "\x1b[2J" * 99}},
            r"--worker-extension-cls (\\x1b\[2J){20}, but needs",
        ),
        (
            {**OPTIONS, "model_config": {"logprobs_mode": "processed_logprobs", "max_model_len": float("inf")}},
            "does not report its options",
        ),
    ],
)
def test_connect_refuses_a_server_with_other_options(start, options, message):
    with pytest.raises(UserError, match=f"{message}.*; start one with: grpo-fast serve CONFIG.yaml$"):
        connect(start(options=options).url)


def test_connect_refuses_a_server_without_development_mode(start):
    server = start(lambda path, body: (404, "Not Found") if path == "/server_info" else None)
    with pytest.raises(UserError, match=r"started without VLLM_SERVER_DEV_MODE=1; start one with: grpo-fast serve"):
        connect(server.url)


def test_sync_with_a_folder_that_the_server_cannot_read(start):
    server = start(lambda path, body: (500, "there are no weights in /tmp/x") if path == "/collective_rpc" else None)
    model = tiny_model(torch.float32)
    with pytest.raises(UserError, match=r"cannot read /.*grpo-fast-weights-.*; set TMPDIR"):
        connect(server.url, model).sync(model)


def test_sync_with_a_prefix_cache_that_is_not_cleared(start, monkeypatch):
    server = start(lambda path, body: (200, {"success": False}) if path == "/reset_prefix_cache" else None)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    model = tiny_model(torch.float32)
    with pytest.raises(UserError, match="keeps its prefix cache"):
        connect(server.url, model).sync(model)


def test_client_ignores_proxies_of_the_environment(start, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert connect(start().url).generate(PROMPTS, Sampling(1, 8))


def test_serve_uses_the_address_of_the_run(monkeypatch, tmp_path):
    """Given by URL, or by host and port; a failed start leaves no folder behind."""
    monkeypatch.setattr(serve, "require_extra", lambda *_: None)
    fields = {"reward_funcs": ["exact_answer"], "dataset_name": "sort_digits", "use_vllm": True, "use_cpu": True}
    fields["max_completion_length"] = 4
    for address, expected in (
        ({"vllm_server_base_url": "http://127.0.0.1:9123/"}, ["127.0.0.1", "9123"]),
        ({"vllm_server_host": "localhost", "vllm_server_port": 8123}, ["localhost", "8123"]),
    ):
        command = serve.server_command(GRPOConfig("random-llama", **fields, **address), tmp_path)
        place = command.index("--host")
        assert [command[place + 1], command[place + 3]] == expected
    folder = tmp_path / "made"
    monkeypatch.setattr(serve.tempfile, "mkdtemp", lambda prefix: folder.mkdir() or str(folder))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        fields["vllm_server_port"] = taken.getsockname()[1]
        with pytest.raises(UserError, match=r"cannot start a server at http://127.0.0.1:\d+: Address already"):
            serve.serve(GRPOConfig("no_such_model", **fields))
    with pytest.raises(UserError, match="no_such_model"):
        serve.serve(GRPOConfig("no_such_model", **fields))
    assert not folder.exists()


class Texts(FakeServer):
    """Samples tokens past the stop text, as vLLM may when it takes several at once."""

    def choice(self, index, body):
        choice = super().choice(index, body)
        ids = [[5, 9, 7, 8], [5, 9, 1], [5, 6, 6, 6]][index]
        content = [{"token_id": token, "logprob": -token / 10} for token in ids]
        reason = ["stop", "stop", "length"][index]
        return {**choice, "token_ids": ids, "finish_reason": reason, "logprobs": {"content": content}}


def words(**ids):
    """A tokenizer with these words."""
    core = Tokenizer(models.WordLevel({"</s>": 1, **ids}, unk_token="</s>"))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


@pytest.fixture
def texts():
    options = {**OPTIONS, "model_config": {**OPTIONS["model_config"], "skip_tokenizer_init": False}}
    server = Texts(options=options)
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_generate_ends_at_stop_texts(texts):
    """The server is asked to stop there; what it sampled beyond the token that completes the text is left out."""
    kwargs = {"stop": "</answer>", "min_new_tokens": 1}
    rollout = connect(texts.url, generation_kwargs=kwargs)
    rollout.tokenizer = words(**{"</an": 5, "swer>x": 9, "a": 7, "b": 8, "c": 6})
    responses = rollout.generate([[5]], Sampling(3, 8, generation_kwargs=kwargs))
    assert [response[:5] for response in responses] == [
        ([5, 9], "stop", [-0.5, -0.9], 1, None),
        ([5, 9], "stop", [-0.5, -0.9], 1, None),
        ([5, 6, 6, 6], "length", [-0.5, -0.6, -0.6, -0.6], None, None),
    ]
    (body,) = texts.called("/inference/v1/generate")
    sent = body["sampling_params"]
    assert (sent["stop"], sent["detokenize"], sent["min_tokens"]) == (["</answer>"], True, 1)
    assert (sent["include_stop_str_in_output"], sent["skip_special_tokens"]) == (True, False)


def test_generate_keeps_a_stop_that_only_the_server_found(texts):
    """Such as one that begins with the space before the first token."""
    kwargs = {"stop": [" </answer>"]}
    rollout = connect(texts.url, generation_kwargs=kwargs)
    rollout.tokenizer = words(**{"</an": 5, "swer>x": 9, "a": 7, "b": 8, "c": 6})
    first, second, third = rollout.generate([[5]], Sampling(3, 8, generation_kwargs=kwargs))
    assert first[:5] == ([5, 9, 7, 8], "stop", [-0.5, -0.9, -0.7, -0.8], 0, None)
    assert (second.token_ids, second.past, second.ended) == ([5, 9, 1], None, True)
    assert third.finish_reason == "length"


def test_connect_refuses_a_server_without_tokenizer_for_stop_texts(start):
    options = {**OPTIONS, "model_config": {**OPTIONS["model_config"], "skip_tokenizer_init": True}}
    connect(start(options=options).url)
    with pytest.raises(UserError, match="was started without the tokenizer that generation_kwargs: stop needs; start"):
        connect(start(options=options).url, generation_kwargs={"stop": "."})


def test_engine_options_have_a_tokenizer_only_for_stop_texts(tmp_path):
    for kwargs in (None, {"min_new_tokens": 2}, {"stop": "."}):
        config = GRPOConfig("x", dataset_name="x", reward_funcs=["x"], generation_kwargs=kwargs)
        options = common.engine_options(config, torch.float32, "cpu", 20, KVPlan(4, 1 << 20))
        folder = tmp_path / str(kwargs)
        common.save_tokenizer(words(a=3), folder, options)
        stops = "stop" in (kwargs or {})
        assert options["skip_tokenizer_init"] != stops
        assert options.get("tokenizer") == (str(folder) if stops else None)
        assert (folder / "tokenizer.json").exists() == stops


def test_generate_refuses_a_thinking_budget(start):
    with pytest.raises(UserError, match="thinking_budget is not possible with use_vllm, because vLLM does not say"):
        connect(start().url).generate(PROMPTS, Sampling(1, 8, thinking_budget=3))


def test_kept_ids_come_with_the_completions(start):
    masks = {**OPTIONS, "model_config": {**OPTIONS["model_config"], "return_sampling_mask": True}}
    server = start(options=masks)
    rollout = connect(server.url, truncated_support=True)
    responses = rollout.generate(PROMPTS, Sampling(2, 8, top_p=0.9, keeps_support=True))
    for response in responses:
        ids, offsets = response.support
        assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == [
            sorted({id, 0, 4}) for id in response.token_ids
        ]
    (params, *_) = [body["sampling_params"] for body in server.called("/inference/v1/generate")]
    # vLLM asks for a top_k, and cuts it to the vocabulary.
    assert params["top_k"] > 10**6
    assert rollout.generate(PROMPTS, Sampling(2, 8, top_p=0.9))[0].support is None


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({}, "cannot return the ids that its filters keep; truncated_support is not possible with this vLLM.*0.32"),
        ({"return_sampling_mask": False}, "was started without --return-sampling-mask, but truncated_support needs it"),
    ],
)
def test_server_without_kept_ids_is_refused(start, masks, message):
    server = start(options={**OPTIONS, "model_config": {**OPTIONS["model_config"], **masks}})
    with pytest.raises(UserError, match=message):
        connect(server.url, truncated_support=True)
    connect(server.url)


@pytest.mark.parametrize("kept", [[[3, 4]], [[3, 4], [7]], [[3, 3], [5]], [[3, 99], [5]], [[3], [-1, 5]]], ids=str)
def test_kept_ids_that_do_not_fit_are_refused(kept):
    with pytest.raises(UserError, match="vLLM returned the kept ids"):
        common.response([3, 5], [-0.1, -0.2], "stop", 50, 8, kept=kept)


def test_vllm_without_kept_ids_is_refused(monkeypatch):
    @dataclasses.dataclass
    class EngineArgs:
        model: str = ""

    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", SimpleNamespace(EngineArgs=EngineArgs))
    config = GRPOConfig("x", dataset_name="x", reward_funcs=["x"], use_vllm=True, top_p=0.9)
    common.check_mask(config)
    with pytest.raises(UserError, match=r"this vLLM, which has no return_sampling_mask: install vLLM 0.32 or later"):
        common.check_mask(dataclasses.replace(config, truncated_support=True))
    with pytest.raises(UserError, match="no return_sampling_mask"):
        common.kept_ids(SimpleNamespace(sampling_mask=None))
    assert common.kept_ids(SimpleNamespace(sampling_mask=SimpleNamespace(token_ids=[[1]]))) == [[1]]
