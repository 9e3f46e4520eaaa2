"""Measure a model folder: `python -m quire.demo.evaluate [DIR]` prints the figures of its card.

The baselines are fitted to the same training tokens and read the same held-out tokens as the
model does. Run it with the Python version of the card to get the card's figures: another version
brings another library.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from quire.demo import path
from quire.demo.chat import Message, parsed, render
from quire.demo.corpus import SourceFile, load_corpus
from quire.demo.data import Data, prepare_data
from quire.demo.export import load
from quire.demo.ngrams import Floats, Trigram, unigram_probabilities
from quire.demo.tokens import BOS, END, EOS, Tokens, special_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from quire.demo.network import Llama

EVAL_WINDOW = 1024
PROMPTS = (
    "import os\n\ndef ",
    'def read_lines(path):\n    """Return the lines of a file."""\n',
    "class QueueTest(unittest.TestCase):\n    def test_",
)
QUESTIONS = (
    "Write a Python function `is_empty(self)`. Return True if the queue is empty.",
    "What is the `json` module?",
)


@dataclass(frozen=True, slots=True)
class Loss:
    """A summed negative log-likelihood and what it was summed over."""

    nats: float
    num_tokens: int

    @property
    def nats_per_token(self) -> float:
        """Mean over the tokens."""
        return self.nats / self.num_tokens

    def bits_per_byte(self, num_bytes: int) -> float:
        """Mean over the bytes of the text."""
        return self.nats / math.log(2) / num_bytes


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a completion is drawn; temperature 0 takes the likeliest token."""

    temperature: float = 0.0
    max_tokens: int = 80
    seed: int = 0


@torch.no_grad()
def token_losses(model: Llama, document: Tokens, window: int, device: torch.device) -> Floats:
    """Nats of every token after the first, which is <|bos|>: [num_tokens - 1].

    The document is read in windows that each start afresh from <|bos|>: no token sees more than
    `window` tokens before it.
    """
    ids = torch.from_numpy(document.astype(np.int64))
    losses = []
    for targets in torch.split(ids[1:], window):
        inputs = torch.cat((ids[:1], targets[:-1])).unsqueeze(0)  # [1, T]
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(inputs.to(device))[0]  # [T, V]
        losses.append(F.cross_entropy(logits.float(), targets.to(device), reduction="none").cpu())
    nats: Floats = torch.cat(losses).double().numpy()
    return nats


def held_out_loss(
    model: Llama, documents: list[Tokens], device: torch.device, window: int = EVAL_WINDOW
) -> Loss:
    """The model's loss on all tokens of the documents."""
    losses = [token_losses(model, document, window, device) for document in documents]
    return Loss(sum(float(nats.sum()) for nats in losses), sum(map(len, losses)))


def loss_by_position(
    model: Llama, documents: list[Tokens], device: torch.device, edges: tuple[int, ...]
) -> list[Loss]:
    """The loss between each two edges of a window as long as the last edge.

    Only full windows count, so that every range is measured on the same text.
    """
    window = edges[-1]
    losses = [token_losses(model, document, window, device) for document in documents]
    full = [nats[: len(nats) // window * window].reshape(-1, window) for nats in losses]
    table = np.concatenate(full)  # [num_windows, window]
    parts = [table[:, start:end] for start, end in itertools.pairwise(edges)]
    return [Loss(float(part.sum()), part.size) for part in parts]


def baseline_losses(data: Data, vocab_size: int) -> tuple[Loss, Loss]:
    """The losses of a unigram and a 3-gram model fitted to the training stream."""
    unigram = unigram_probabilities(data.train, vocab_size)
    trigram = Trigram(data.train, vocab_size)
    num_tokens = sum(len(document) - 1 for document in data.held_out)
    unigram_nats = -sum(float(np.log(unigram[ids[1:]]).sum()) for ids in data.held_out)
    trigram_nats = -sum(float(np.log(trigram.probabilities(ids)).sum()) for ids in data.held_out)
    return Loss(unigram_nats, num_tokens), Loss(trigram_nats, num_tokens)


@torch.no_grad()
def complete(model: Llama, tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> str:
    """What the model writes after the prompt, whose special tokens are in it."""
    stops = {special_id(tokenizer, EOS), special_id(tokenizer, END)}
    generator = torch.Generator().manual_seed(sampling.seed)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    num_prompt_tokens = len(ids)
    while len(ids) - num_prompt_tokens < sampling.max_tokens:
        logits = model(torch.tensor([ids]))[0, -1].float()  # [V]
        if sampling.temperature > 0:
            chances = torch.softmax(logits / sampling.temperature, dim=-1)
            token_id = int(torch.multinomial(chances, 1, generator=generator))
        else:
            token_id = int(logits.argmax())
        if token_id in stops:
            break
        ids.append(token_id)
    text: str = tokenizer.decode(ids[num_prompt_tokens:], skip_special_tokens=False)
    return text


def function_headers(files: list[SourceFile], count: int) -> list[str]:
    """The first lines, up to the colon, of functions spread evenly over the files."""
    headers = []
    for file in files:
        lines = file.text.splitlines()
        for node in ast.walk(parsed(file.text) or ast.Module([], [])):
            if isinstance(node, ast.FunctionDef) and node.body[0].lineno > node.lineno:
                header = lines[node.lineno - 1 : node.body[0].lineno - 1]
                headers.append(textwrap.dedent("\n".join(header)))
    whole = sorted(header for header in headers if header.endswith(":"))
    return whole[:: max(1, len(whole) // count)][:count]


def parses(header: str, completion: str) -> bool:
    """Whether the completed function is valid Python; what follows the function is ignored."""
    body: list[str] = []
    for line in completion.splitlines()[1:]:
        if line and not line.startswith((" ", ")")):
            break
        body.append(line)
    return parsed("\n".join([header, *body])) is not None


def print_parsing_share(model: Llama, tokenizer: Tokenizer, count: int = 50) -> None:
    """Print how many of `count` functions parse whose bodies the model samples."""
    headers = function_headers(load_corpus().held_out, count)
    sampling = Sampling(temperature=0.8, max_tokens=150)
    good = sum(parses(text, complete(model, tokenizer, BOS + text, sampling)) for text in headers)
    print(f"\nOf {len(headers)} functions from held-out files, completed from their header at")
    print(f"temperature 0.8 with at most 150 tokens, {good} parse as Python.")


def print_losses(model: Llama, tokenizer: Tokenizer) -> None:
    """Print the table of losses."""
    device = torch.device("cpu")
    data = prepare_data(seed=0, tokenizer=tokenizer)
    unigram, trigram = baseline_losses(data, tokenizer.get_vocab_size())
    llama = held_out_loss(model, data.held_out, device)
    print(f"{len(data.held_out)} held-out files, {data.held_out_bytes:,} bytes,")
    print(f"{llama.num_tokens:,} tokens; the training stream has {len(data.train):,} tokens.\n")
    print("| model | nats per token | bits per byte |\n|---|---|---|")
    for name, loss in (("unigram", unigram), ("3-gram", trigram), ("this model", llama)):
        bits = loss.bits_per_byte(data.held_out_bytes)
        print(f"| {name} | {loss.nats_per_token:.3f} | {bits:.3f} |")
    edges = (0, 256, 512, 1024, 1536, 2048)
    print("\n| position in a 2048-token window | nats per token |\n|---|---|")
    losses = loss_by_position(model, data.held_out, device, edges)
    for (start, end), loss in zip(itertools.pairwise(edges), losses, strict=True):
        print(f"| {start} to {end - 1} | {loss.nats_per_token:.3f} |")
    chats = held_out_loss(model, data.held_out_chats, device)
    print(f"\nConversations made from held-out files: {chats.nats_per_token:.3f} nats per token.")


def print_samples(model: Llama, tokenizer: Tokenizer) -> None:
    """Print completions of PROMPTS and answers to QUESTIONS, greedy and sampled."""
    chats = [render([Message("user", question)]) + "<|assistant|>" for question in QUESTIONS]
    texts = [BOS + prompt for prompt in PROMPTS] + chats
    for shown, text in zip(PROMPTS + QUESTIONS, texts, strict=True):
        for temperature in (0.0, 0.8):
            answer = complete(model, tokenizer, text, Sampling(temperature=temperature))
            print(f"\nPrompt {shown!r}, temperature {temperature}:\n")
            print(f"~~~text\n{answer.strip(chr(10))}\n~~~")


def main() -> None:
    """Print the figures of the model card: losses, then samples."""
    parser = argparse.ArgumentParser(prog="python -m quire.demo.evaluate", description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=path(), help="the shipped model")
    parser.add_argument("--samples-only", action="store_true", help="skip the losses")
    args = parser.parse_args()
    model, tokenizer = load(args.folder)
    if not args.samples_only:
        print_losses(model, tokenizer)
        print_parsing_share(model, tokenizer)
    print_samples(model, tokenizer)


if __name__ == "__main__":
    main()
