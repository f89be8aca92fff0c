"""A server that answers as vLLM does, with made-up completions."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from grpo_fast.config import GRPOConfig
from grpo_fast.rollout import build_rollout
from grpo_fast.rollout.vllm.worker import WORKER_EXTENSION, WorkerExtension
from support.tiny import tiny_model

PROMPTS = [[5, 9, 11], [7], [3, 4, 5]]
OPTIONS = {
    "model_config": {"logprobs_mode": "processed_logprobs", "max_model_len": 20},
    "parallel_config": {"worker_extension_cls": WORKER_EXTENSION},
}


class FakeWorker(WorkerExtension):
    """The worker's own methods, with a dict in place of vLLM's model."""

    def __init__(self):
        self.loaded, self.seen = {}, []

    def reload_weights(self, weights_iterator):
        self.loaded = {name: tensor.clone() for name, tensor in weights_iterator}

    def repack_head(self):
        pass

    def look(self, folder):
        """Note which files there are, and who can read them."""
        folder = Path(folder)
        entries = [folder.parent, folder, *folder.iterdir()]
        self.seen.append({path.name: (path.stat().st_mode & 0o777, path.stat().st_size) for path in entries})


class FakeServer:
    """Answers as vLLM does: each completion repeats its seed's last digit; `hook(path, body)` may answer instead."""

    def __init__(self, hook=lambda path, body: None, options=OPTIONS):
        self.hook, self.options = hook, options
        self.version = "default"
        self.calls, self.headers, self.worker, self.adapters = [], [], FakeWorker(), {}
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self, None)

            def do_POST(self):
                outer.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler, body):
        path = handler.path.split("?")[0]
        with self.lock:
            self.calls.append((path, body))
            self.headers.append(handler.headers)
        status, content = self.hook(path, body) or (200, self.content(path, body))
        if status == "drop":
            handler.close_connection = True
            return
        if isinstance(content, tuple):
            status, content = content
        content = content if isinstance(content, str) else json.dumps(content)
        with suppress(BrokenPipeError):
            handler.send_response(status)
            handler.end_headers()
            handler.wfile.write(content.encode())

    def content(self, path, body):
        if path == "/server_info":
            return {"vllm_config": self.options}
        if path == "/inference/v1/generate":
            name = body.get("model")
            if name is not None and name not in self.adapters:
                return 404, {"error": {"message": f"The model `{name}` does not exist."}}
            choices = [self.choice(index, body) for index in range(body["sampling_params"]["n"])]
            return {"model": name or "base", "choices": choices}
        if path == "/collective_rpc":
            try:
                if body["method"] in ("load_folder", "check_folder"):
                    self.worker.look(body["args"][0])
                return {"results": [getattr(self.worker, body["method"])(*body["args"])]}
            except Exception as error:
                return 500, str(error)
        if path == "/v1/load_lora_adapter":
            folder = Path(body["lora_path"])
            described = json.loads((folder / "adapter_config.json").read_text())
            self.adapters[body["lora_name"]] = described, load_file(folder / "adapter_model.safetensors")
            return f"Success: LoRA adapter '{body['lora_name']}' added successfully."
        if path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
            return "Success"
        if path == "/update_weight_version":
            self.version = body["new_version"]
        return {"success": True, "weight_version": self.version}

    @property
    def loaded(self):
        return self.worker.loaded

    def choice(self, index, body):
        ids = [*body["token_ids"], body["sampling_params"]["seed"] % 10 + index, 1]
        kept = [sorted({id, 0, 4}) for id in ids] if self.options["model_config"].get("return_sampling_mask") else None
        return {
            "index": index,
            "token_ids": ids,
            "sampling_mask": kept,
            "finish_reason": "stop",
            "logprobs": {"content": [{"token_id": i, "logprob": -i / 10} for i in ids]},
            "weight_versions": [{"version": self.version, "start": 0, "end": len(ids)}],
        }

    def called(self, path):
        return [body for called, body in self.calls if called == path]


def connect(url, model=None, **fields):
    config = GRPOConfig(
        model_name_or_path="random-llama", dataset_name="sort_digits", reward_funcs=["exact_answer"], use_vllm=True,
        vllm_mode="server", vllm_server_base_url=url, max_completion_length=8, vllm_server_timeout=0.3, **fields,
    )  # fmt: skip
    return build_rollout(config, model or tiny_model(torch.float32), SimpleNamespace(eos_token_id=1), 12)
