"""What a token and a prompt cost on the host, part by part, with the product's own functions.

    python -m loadtest.host_path --batch 32

Output side, per token: the engine's output as a message, its bytes, the message again, the journal,
text, the event of a stream. Input side, per prompt: tokenization, block hashes. Microseconds of one
core, medians; for the engine's own phases see `quire bench step`.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from loadtest.kept import keep
from quire.api import block_hash
from quire.api.openai import ChunkTemplate, Head
from quire.api.sampling import SamplingParams
from quire.api.sse import event
from quire.engine.output import ChoiceOutput
from quire.gateway.journal import Journal
from quire.proto import worker_pb2
from quire.text.output import ChoiceText
from quire.text.tokenizer import Tokenizer
from quire.worker.convert import output_to

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FRAME = (b'"delta":{"content":', b"}")
REPEATS = 200


def per_call_us(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median microseconds of a call."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1e6 * median(times)


def output_side(folder: Path, batch: int) -> dict[str, float]:
    """Microseconds per token of a step with `batch` streams."""
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("for line in lines:\n    print(line.strip())\n" * 50)
    outputs = [ChoiceOutput(str(i), 0, 0, [ids[i % len(ids)]]) for i in range(batch)]

    def pack() -> worker_pb2.SessionReply:
        made = worker_pb2.TokenBatch(step=1)
        for i, output in enumerate(outputs):
            made.outputs.append(output_to(output, i, 0))
        return worker_pb2.SessionReply(batch=made)

    reply = pack()
    data = reply.SerializeToString()
    journals = [Journal(worker_pb2.Submit()) for _ in range(batch)]
    texts = [ChoiceText(tokenizer, SamplingParams()) for _ in range(batch)]
    template = ChunkTemplate(Head("chatcmpl-0", 0, "demo"), "chat.completion.chunk", 0, FRAME)

    def journal() -> None:
        for record, output in zip(journals, reply.batch.outputs, strict=True):
            record.judge(output)
            record.take(output)

    def text() -> None:
        for i, choice in enumerate(texts):
            choice.push([ids[i % len(ids)]], (), None)

    def events() -> None:
        for i in range(batch):
            event(template.text(" word") + b"}", i)

    parts: dict[str, Callable[[], Any]] = {
        "message": pack,
        "to bytes": reply.SerializeToString,
        "from bytes": partial(worker_pb2.SessionReply.FromString, data),
        "journal": journal,
        "text": text,
        "event": events,
    }
    return {name: per_call_us(call) / batch for name, call in parts.items()}


def input_side(folder: Path, length: int) -> dict[str, float]:
    """Microseconds per 1,000 prompt tokens."""
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("for line in lines:\n    print(line.strip())\n" * length)[:length]
    text = tokenizer.decode(ids)
    root = block_hash.root(b"model")
    submit = worker_pb2.Submit(prompt_token_ids=ids)
    parts: dict[str, Callable[[], Any]] = {
        "tokenize": partial(tokenizer.encode, text),
        "block hashes": partial(block_hash.extend, root, ids),
        "submit to bytes": submit.SerializeToString,
        "submit ids to list": partial(list, submit.prompt_token_ids),
    }
    repeats = max(REPEATS * 1000 // max(length, 1000), 10)
    return {name: 1000 * per_call_us(call, repeats) / length for name, call in parts.items()}


def table(title: str, parts: dict[str, float]) -> str:
    """Largest first."""
    lines = [f"{title}: {sum(parts.values()):.2f} us"]
    for name, us in sorted(parts.items(), key=lambda part: -part[1]):
        lines.append(f"  {name:<20}{us:>9.2f}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.host_path", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", type=Path, help="folder with a tokenizer; the demo's by default")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt-len", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="write OUT.json")
    options = parser.parse_args(argv)
    from quire import demo

    folder = options.model or Path(demo.path())
    tokens, prompts = output_side(folder, options.batch), input_side(folder, options.prompt_len)
    print(table(f"per token, {options.batch} streams", tokens))
    print(table("per 1,000 prompt tokens", prompts))
    keep(options.out, {"per_token_us": tokens, "per_1000_prompt_tokens_us": prompts})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
