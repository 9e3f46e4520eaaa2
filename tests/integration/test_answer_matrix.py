"""Every feature through the OpenAI API: one engine beside prefill and decode workers, same answer.

feature x {tcp, grpc, nixl} x {bfloat16, float32}; the answer of `quire serve` with one engine is
the reference. Streams are put together again and must equal the answer in one piece.
"""

from __future__ import annotations

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from server import running_server
from test_serve_disaggregated import wait_for_roles

ENGINE = ("--max-model-len", "512", "--kv-cache-memory-bytes", "32M", "--num-threads", "1")
# the reference is computed step by step, the workers plan a step ahead
SPLIT = (
    "--prefill", "1", "--decode", "1", "--routing-policy", "least_load", "--async-scheduling",
)  # fmt: skip
PATIENT = ("--kv-heartbeat-s", "5", "--kv-lease-s", "60")
PROMPT = "import os\n" * 30 + "def read("
CELLS = [
    pytest.param(dtype, transport, marks=() if (dtype, transport) == DEFAULT else pytest.mark.slow)
    for DEFAULT in [("bfloat16", "tcp")]
    for dtype in ("bfloat16", "float32")
    for transport in ("tcp", "grpc", "nixl")
]
FEATURES = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.9, "seed": 17, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
    "choices": {"temperature": 1.0, "seed": 3, "n": 3},
    "logprobs": {"temperature": 0.7, "seed": 5, "logprobs": 3, "n": 2},
    "stop": {"temperature": 0.8, "seed": 6, "stop": ["self", "\n\n", "return"]},
    "stop_kept": {"temperature": 0, "stop": ["("], "include_stop_str_in_output": True},
    "penalties": {
        "temperature": 0.8, "seed": 9, "presence_penalty": 0.6, "frequency_penalty": 0.4,
        "repetition_penalty": 1.2,
    },
    "bias": {"temperature": 0.5, "seed": 2, "logit_bias": {"300": 5.0}, "min_tokens": 6},
    "bad_words": {"temperature": 0.5, "seed": 2, "bad_words": ["self", "return"]},
    "echo": {"temperature": 0, "echo": True},
    "prompt_logprobs": {"temperature": 0, "prompt_logprobs": 2},
    "several_prompts": {
        "prompt": [f"# 1\n{PROMPT}", f"# 2\n{PROMPT[:-20]}", "class A:\n    def "], "seed": 4,
    },
    "one_token": {"temperature": 1.0, "seed": 4, "max_tokens": 1, "n": 2},
}  # fmt: skip
CHATS = {
    "chat": {"temperature": 0.8, "seed": 12},
    "chat_logprobs": {"temperature": 0.8, "seed": 13, "logprobs": True, "top_logprobs": 2, "n": 2},
    "chat_stop": {"temperature": 0, "stop": ["\n"]},
}


LOCAL = {"prompt_logprobs"}
"""Features whose prompts are computed where they are decoded."""


def answer(server, path: str, body: dict, headers: dict[str, str]) -> list[dict]:
    """The choices of a request."""
    choices = json.loads(server.send(path, body, headers))["choices"]
    return [{key: value for key, value in c.items() if key != "id"} for c in choices]


def streamed_texts(server, path: str, body: dict) -> dict[int, tuple[str, str]]:
    """Text and finish reason of each choice, out of a stream's pieces."""
    data = json.dumps(body | {"stream": True}).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    texts: dict[int, tuple[str, str]] = {}
    with urllib.request.urlopen(request, timeout=60) as lines:
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            for part in json.loads(line[6:])["choices"]:
                text, end = texts.get(part["index"], ("", ""))
                new = part["text"] if "text" in part else part["delta"].get("content") or ""
                texts[part["index"]] = (text + new, part["finish_reason"] or end)
    return texts


def requests() -> dict[str, tuple[str, dict]]:
    base = {"model": "demo", "max_tokens": 24}
    # each prompt is another one from its first block on, so that each is computed
    plain = {
        n: ("/v1/completions", base | {"prompt": f"# {n}\n{PROMPT}"} | f)
        for n, f in FEATURES.items()
    }
    wish = "Write a function that reads a file, please. " * 6
    chats = {
        n: (
            "/v1/chat/completions",
            base | {"messages": [{"role": "user", "content": f"# {n}: {wish}"}]} | f,
        )
        for n, f in CHATS.items()
    }
    return plain | chats


def all_answers(server) -> dict[str, list[dict]]:
    """By feature, asked eight at a time."""
    with ThreadPoolExecutor(8) as pool:
        asked = {
            name: pool.submit(answer, server, *request, {"X-Request-Id": name})
            for name, request in requests().items()
        }
        return {name: future.result() for name, future in asked.items()}


def computed(server) -> float:
    """Tokens that the prefill worker computed."""
    return server.metric('quire_step_tokens_sum{engine="0"')


def computed_elsewhere(server, name: str) -> list[int]:
    """Blocks of each of the feature's prompts that came from the prefill worker.

    They are all of them, but for a prompt too short to be worth it; a prompt whose own
    log-probabilities are wanted is computed where it is scored.
    """
    trace = json.loads(server.get(f"/v1/requests/{name}/trace"))
    is_local = [name in LOCAL] * len(trace["prompts"])
    if name == "several_prompts":
        is_local[-1] = True
    blocks = []
    for shown, local in zip(trace["prompts"], is_local, strict=True):
        [attempt] = shown["attempts"]
        assert shown["cached_tokens"] == 0, name
        if local:
            assert "transfer" not in shown, f"{name}: computed elsewhere"
            continue
        assert attempt["prefill_worker"] == "prefill-0", f"{name}: computed where it is decoded"
        assert shown["transfer"]["prefill_worker"] == "prefill-0", name
        assert not shown["transfer"]["failed"], name
        assert shown["transfer"]["cached_tokens"] == 0, f"{name}: was not computed"
        blocks.append(sum(chunk["blocks"] for chunk in shown["transfer"]["chunks"]))
    if len(trace["prompts"]) == 1 and not is_local[0]:
        assert blocks == [-(-trace["usage"]["prompt_tokens"] // 16)], name
    return blocks


@pytest.fixture(scope="module")
def references():
    """dtype -> the answers of one engine, made when first asked for."""
    made: dict[str, dict[str, list[dict]]] = {}

    def reference(dtype: str) -> dict[str, list[dict]]:
        if dtype not in made:
            with running_server(*ENGINE, "--dtype", dtype) as server:
                made[dtype] = all_answers(server)
        return made[dtype]

    return reference


@pytest.mark.parametrize(("dtype", "transport"), CELLS)
def test_prefill_and_decode_answer_as_one_engine_does(references, dtype, transport) -> None:
    if transport == "nixl":
        pytest.importorskip("nixl_cu12", reason="NIXL is not installed")
    want = references(dtype)
    flags = (*ENGINE, *SPLIT, *PATIENT, "--dtype", dtype, "--kv-transports", transport)
    with running_server(*flags) as server:
        wait_for_roles(server, 2)
        before = computed(server)
        got = all_answers(server)
        for name, choices in want.items():
            assert got[name] == choices, name
        blocks = [count for name in want for count in computed_elsewhere(server, name)]
        tokens = computed(server) - before
        assert 16 * sum(count - 1 for count in blocks) < tokens <= 16 * sum(blocks)
        for name in ("seeded", "stop", "chat"):
            path, body = requests()[name]
            parts = streamed_texts(server, path, body)
            texts = {
                c["index"]: (c["text"] if "text" in c else c["message"]["content"])
                for c in want[name]
            }
            assert {i: text for i, (text, _) in parts.items()} == texts, f"{name}, streamed"
