"""The deadlines and size limits of the JSON client, with servers that send slowly or without end."""

import socket
import threading
from contextlib import suppress

import pytest

from grpo_fast.rollout.vllm import json_client


@pytest.fixture
def raw_server():
    """Starts servers that answer every request with the bytes that `send` writes; returns their address."""
    stop = threading.Event()
    listeners = []

    def start(send):
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def answer(connection):
            with connection, suppress(OSError):
                connection.recv(1 << 16)
                send(connection, stop)

        def accept():
            with suppress(OSError):
                while True:
                    threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    stop.set()
    for listener in listeners:
        listener.close()


def drip(begin):
    """Sends `begin`, and then a byte every 50 ms until the connection closes."""

    def send(connection, stop):
        connection.sendall(begin)
        while not stop.wait(0.05):
            connection.sendall(b"1")

    return send


@pytest.mark.parametrize(
    "begin",
    [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n[", b"HTTP/1.1 200 OK\r\n\r\n"],
    ids=["status", "header", "body", "endless body"],
)
@pytest.mark.parametrize("timeout", [0.3, None])
def test_request_ends_at_the_deadline_if_bytes_trickle_in(raw_server, monkeypatch, begin, timeout):
    """Each byte arrives in time, but the whole answer does not."""
    monkeypatch.setattr(json_client, "ANSWER_TIMEOUT", 0.3)
    client = json_client.JsonClient(raw_server(drip(begin)))
    with pytest.raises(json_client.ServerError, match=r"timed out|too slowly"):
        client.request("GET", "/health", timeout=timeout, retries=())


def test_paced_socket_reads_to_the_end_at_sufficient_speed(monkeypatch):
    now = 100.0
    monkeypatch.setattr(json_client.time, "monotonic", lambda: now)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        paced = json_client._Paced(ours, None)

        def read(size):
            theirs.sendall(b"1" * size)
            return paced.readinto(bytearray(1 << 20))

        assert read(1) == 1
        for _ in range(30):
            now += 4
            assert read(4 * json_client.SLOWEST) == 4 * json_client.SLOWEST
        assert now - 100 > json_client.ANSWER_TIMEOUT
        # Bytes that arrived in time are read even if this thread was late.
        now += 10 * json_client.ANSWER_TIMEOUT
        assert read(1) == 1
        with pytest.raises(TimeoutError, match="the answer came too slowly"):
            paced.readinto(bytearray(1))
        paced.close()


@pytest.mark.parametrize("header", [b"", b"Content-Length: 99999999999\r\n"])
def test_request_refuses_an_endless_answer(raw_server, header):
    def send(connection, stop):
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + header + b"\r\n")
        while not stop.is_set():
            connection.sendall(b"1" * 65536)

    client = json_client.JsonClient(raw_server(send))
    with pytest.raises(json_client.ServerError, match="an answer of more than 300,000 bytes"):
        client.request("GET", "/health", max_bytes=300_000)
