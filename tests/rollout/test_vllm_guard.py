"""Access to a vLLM server: the key on both sides, and the middleware; without vLLM."""

import asyncio

import pytest

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.rollout import Sampling, check_engine
from grpo_fast.rollout.vllm import guard, serve
from grpo_fast.rollout.vllm.guard import Guard, is_loopback
from support.vllm_server import PROMPTS, FakeServer, connect

KEY = "a-secret"
# vLLM's own check of its key covers only the second path.
PATHS = [
    "/collective_rpc",
    "/inference/v1/generate",
    "/update_weight_version",
    "/server_info",
    "/reset_prefix_cache",
    "/",
]


def config(**fields):
    return GRPOConfig(
        "random-llama", dataset_name="sort_digits", reward_funcs=["exact_answer"], use_vllm=True, vllm_mode="server",
        **fields,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


class App:
    """The guarded application: answers 200 with the body of the request."""

    async def __call__(self, scope, receive, send):
        message = await receive()
        assert not message.get("more_body")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message.get("body", b"")})


def ask(path="/collective_rpc", client="127.0.0.1", body=(b"{}",), kind="http", pause=0.0, **headers):
    """Status and body of the answer to a request whose body arrives in these parts."""
    sent = []
    parts = [{"type": "http.request", "body": part, "more_body": True} for part in body]
    parts[-1]["more_body"] = False
    messages = iter(parts)

    async def receive():
        await asyncio.sleep(pause)
        return next(messages, {"type": "http.disconnect"})

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "method": "POST", "path": path, "client": (client, 1234) if client else None}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(Guard(App())(scope, receive, send))
    return sent[0].get("status", sent[0]["type"]), b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize("path", PATHS)
def test_guard_requires_the_key_on_every_path_except_health(monkeypatch, path):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    for client in ("127.0.0.1", "10.0.0.7"):
        for headers in ({}, {"authorization": KEY}, {"authorization": f"Bearer {KEY}x"}, {"authorization": "Bearer "}):
            status, text = ask(path, client, **headers)
            assert status == 401
            assert KEY.encode() not in text
        assert ask(path, client, body=(b"ab", b"c"), authorization=f"Bearer {KEY}") == (200, b"abc")
        assert ask("/health", client)[0] == 200
    assert ask(path, kind="websocket")[0] == "websocket.close"


@pytest.mark.parametrize("path", PATHS)
def test_guard_without_a_key_answers_only_this_machine(path):
    assert ask(path)[0] == ask(path, "::1")[0] == ask(path, None)[0] == 200
    for client in ("10.0.0.7", "::ffff:10.0.0.7", "2001:db8::1", "testclient"):
        assert ask(path, client)[0] == 401
    # A request from a web page in a browser on this machine.
    assert ask(path, origin="http://example.org")[0] == 401


def test_guard_limits_size_and_time_of_bodies(monkeypatch):
    monkeypatch.setattr(guard, "BODY_BYTES", 10)
    assert ask(body=(b"12345", b"67890")) == (200, b"1234567890")
    assert ask(body=(b"12345", b"67890", b"1"))[0] == 413
    monkeypatch.setattr(guard, "BODY_TIMEOUT", 0.05)
    assert ask(body=[b"1"] * 9, pause=0.02)[0] == 408


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
        ("10.0.0.1", False), ("gpu-7", False), ("localhost.example.org", False), ("0", False), ("", False),
    ],
)  # fmt: skip
def test_is_loopback(host, expected):
    assert is_loopback(host) == expected


ADDRESSES = [
    {"vllm_server_host": "0.0.0.0"},
    {"vllm_server_host": "gpu-7"},
    {"vllm_server_base_url": "http://10.0.0.1:8000"},
    {"vllm_server_base_url": "http://[2001:db8::1]:8000"},
]


@pytest.mark.parametrize("address", ADDRESSES, ids=lambda address: str(*address.values()))
def test_server_key_required_for_an_address_that_others_reach(monkeypatch, address):
    monkeypatch.setattr(serve, "require_extra", lambda *_: None)
    monkeypatch.setattr(serve, "server_command", lambda *_: pytest.fail("loads a model before the check"))
    monkeypatch.setattr(serve.socket, "create_server", lambda *_, **__: pytest.fail("listens before the check"))
    message = r"^other machines can reach a vLLM server at \S+, so it needs a key: set VLLM_API_KEY to the same secret"
    for start in (serve.serve, check_engine):
        with pytest.raises(UserError, match=message):
            start(config(**address))
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    check_engine(config(**address))
    assert serve.listening_at(config(**address))[1] == 8000


def test_server_key_that_cannot_be_sent_is_not_shown(monkeypatch):
    for key in ("two words", "line\nbreak", "clé"):
        monkeypatch.setenv("VLLM_API_KEY", key)
        with pytest.raises(UserError, match="the value of VLLM_API_KEY is not allowed") as error:
            check_engine(config())
        assert key not in str(error.value)


@pytest.mark.parametrize("option", ["--host", "--host=0.0.0.0", "--ho=::", "--api-key", "--api_key=x", "--api-k"])
def test_serve_refuses_options_that_expose_the_server(monkeypatch, option):
    monkeypatch.setattr(serve, "require_extra", lambda *_: None)
    monkeypatch.setattr(serve, "server_command", lambda *_: pytest.fail("loads a model before the check"))
    with pytest.raises(UserError, match=r"^--\S+ is not allowed here: set (vllm_server_host|VLLM_API_KEY in the env)"):
        serve.serve(config(), ["--seed", "1", option, "0.0.0.0"])
    serve.check_options(["--tensor-parallel-size", "2", "--api-server-count", "1", "-h"])


def test_server_command_adds_the_middleware_and_hides_the_key(monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "require_extra", lambda *_: None)
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    command = serve.server_command(config(use_cpu=True, max_completion_length=16), tmp_path)
    assert command[command.index("--middleware") + 1] == f"{Guard.__module__}.{Guard.__qualname__}"
    # Other users can read the command lines of processes, but not their environments.
    assert KEY not in " ".join(command)
    assert serve.server_environment(config())["VLLM_API_KEY"] == KEY


def test_client_sends_the_key_and_names_the_variable_if_refused(monkeypatch):
    server = FakeServer(lambda path, body: (401, "no") if path in refused else None)
    refused = set()
    try:
        monkeypatch.setenv("VLLM_API_KEY", KEY)
        rollout = connect(server.url)
        assert rollout.generate(PROMPTS, Sampling(1, 8))
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
        for path in ("/inference/v1/generate", "/server_info", "/health"):
            refused = {path}
            with pytest.raises(UserError, match=r"refuses the key in VLLM_API_KEY: set VLLM_API_KEY to the") as error:
                connect(server.url).generate(PROMPTS, Sampling(1, 8))
            assert KEY not in str(error.value)
        monkeypatch.delenv("VLLM_API_KEY")
        with pytest.raises(UserError, match=r"refuses requests without VLLM_API_KEY: set VLLM_API_KEY to the value"):
            connect(server.url)
        assert server.headers[-1]["Authorization"] is None
    finally:
        server.http.shutdown()
        server.http.server_close()
