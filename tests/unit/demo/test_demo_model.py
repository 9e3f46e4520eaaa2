"""The shipped model folder: complete, small, loadable, and better than counting words."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from quire import demo
from quire.demo.chat import Message, conversations, render
from quire.demo.corpus import SourceFile, is_held_out, load_corpus
from quire.demo.data import WindowSampler
from quire.demo.evaluate import Sampling, complete, held_out_loss, parses
from quire.demo.export import load
from quire.demo.ngrams import Trigram, unigram_probabilities
from quire.demo.tokens import BOS, END, EOS, cuts, encode_documents, special_id, with_split_tokens

MAX_FOLDER_BYTES = 30_000_000
NUM_HELD_OUT_BYTES = 60_000

ODD_TEXTS = (
    "",
    " ",
    "def f(x):\n    return x\n",
    "x   = 1\t# tab\r\n\n\n        deep\n\ttabbed  \n",
    "naïve café — 漢字 🙂 \u200b e\u0301",
    "a" * 300 + "0123456789" * 5,
    "snake_case CamelCase __dunder__ 'don''t' \\n {}[]()",
    "\n\n\n   ",
)


@pytest.fixture(scope="module")
def shipped():
    return load(demo.path())


def greedy(shipped, prompt, max_tokens=60):
    return complete(*shipped, prompt, Sampling(max_tokens=max_tokens))


def test_folder_is_complete_and_small():
    names = {path.name for path in demo.path().iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
        "README.md",
    } <= names
    assert sum(path.stat().st_size for path in demo.path().iterdir()) < MAX_FOLDER_BYTES


def test_asking_for_the_path_imports_nothing_heavy():
    code = "import sys, quire.demo; quire.demo.path(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_transformers_loads_the_folder_and_computes_the_same_logits(shipped):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = shipped
    theirs = AutoModelForCausalLM.from_pretrained(demo.path(), dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(demo.path())
    text = "import os\n\ndef join(a, b):\n    return os.path.join(a, b)\n"
    ids = their_tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == tokenizer.encode(text).ids
    assert ids[0, 0] == special_id(tokenizer, BOS)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=1e-3, atol=1e-3)


def test_weights_are_bfloat16_and_tied():
    from safetensors import safe_open

    with safe_open(demo.path() / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert {weights.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    assert "lm_head.weight" not in names
    assert json.loads((demo.path() / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_tokenizer_gives_back_what_it_was_given(shipped, text):
    tokenizer = shipped[1]
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_indentation_is_one_token(shipped):
    ids = shipped[1].encode("\n        ", add_special_tokens=False).ids
    assert len(ids) == 1


def test_chat_template_writes_what_training_read():
    from transformers import AutoTokenizer

    messages = [
        Message("system", "Be brief."),
        Message("user", " What is 1 + 1? "),
        Message("assistant", "2"),
        Message("user", "Why?"),
    ]
    wire = [{"role": message.role, "content": message.content} for message in messages]
    tokenizer = AutoTokenizer.from_pretrained(demo.path())
    text = tokenizer.apply_chat_template(wire, tokenize=False, add_generation_prompt=True)
    assert text == render(messages) + "<|assistant|>"


def test_generation_stops_at_the_end_of_a_text_and_of_a_turn(shipped):
    settings = json.loads((demo.path() / "generation_config.json").read_text())
    assert set(settings["eos_token_id"]) == {
        special_id(shipped[1], EOS),
        special_id(shipped[1], END),
    }


def test_held_out_loss_is_far_below_the_best_unigram(shipped):
    """The unigram is fitted to the very text it is judged on: no other unigram does better."""
    model, tokenizer = shipped
    texts: list[str] = []
    for file in load_corpus().held_out:
        if sum(map(len, texts)) + len(file.text) <= NUM_HELD_OUT_BYTES:
            texts.append(file.text)
    documents = encode_documents(tokenizer, texts)
    tokens = np.concatenate([document[1:] for document in documents])
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / len(tokens)
    unigram = float(-(shares * np.log(shares)).sum())
    loss = held_out_loss(model, documents, torch.device("cpu"))
    assert loss.num_tokens == len(tokens)
    assert loss.nats_per_token < 0.75 * unigram


def test_greedy_completion_is_no_endless_repetition(shipped):
    text = greedy(shipped, BOS + "import os\n\ndef")
    assert "(" in text and ":" in text
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) >= 2
    assert len(set(lines)) > len(lines) / 2


def test_chat_answers_with_code_and_ends_its_turn(shipped):
    question = "Write a Python function `close(self)`. Close the file."
    prompt = render([Message("user", question)]) + "<|assistant|>"
    answer = greedy(shipped, prompt, max_tokens=300)
    assert answer.startswith("```python\ndef close(self")
    assert answer.rstrip().endswith("```")


def test_split_is_by_name_and_keeps_copies_together(tmp_path):
    names = [f"module_{index}.py" for index in range(400)]
    for index, name in enumerate(names):
        (tmp_path / name).write_text(f"value = {index // 2}\n")
    corpus = load_corpus(tmp_path)
    assert len(corpus.train) + len(corpus.held_out) == 200
    assert corpus.held_out
    assert all(is_held_out(file.name) for file in corpus.held_out)
    assert not any(is_held_out(file.name) for file in corpus.train)


def test_conversations_take_question_and_answer_from_the_source():
    code = 'def add(a, b):\n    """Return the sum."""\n    return a + b\n'
    chats = conversations([SourceFile("sums.py", code)])
    messages = [message for chat in chats for message in chat]
    assert any(message.content == f"```python\n{code.rstrip()}\n```" for message in messages)
    assert any(message.content == "Return the sum." for message in messages)
    assert all(chat[-1].role == "assistant" for chat in chats)


def test_windows_cover_an_epoch_once():
    stream = np.arange(1, 101, dtype=np.uint16)
    sampler = WindowSampler(stream, bos_id=0, seed=0)
    inputs, targets = sampler.batch(0, num_windows=8, window=10)
    assert inputs[:, 0].eq(0).all()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert len(set(targets.flatten().tolist())) == 80
    again, _ = sampler.batch(30, num_windows=1, window=10)
    assert torch.equal(again[0], inputs[3])


def test_trigram_probabilities_sum_to_one():
    vocab_size = 5
    stream = np.random.default_rng(0).integers(vocab_size, size=60).astype(np.uint16)
    model = Trigram(stream, vocab_size)
    total = sum(
        model.probabilities(np.array([*stream[:2], last], dtype=np.uint16))[-1]
        for last in range(vocab_size)
    )
    assert total == pytest.approx(1.0)
    assert unigram_probabilities(stream, vocab_size).sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (" word", [(" ", "word")]),
        (".join", [(".", "join")]),
        ("\n    ", [("\n", "    ")]),
        ("\n\n  ", [("\n", "\n  "), ("\n\n", "  ")]),
        ("\n", []),
        ("word", []),
        ("():", []),
    ],
)
def test_tokens_are_cut_where_a_prompt_may_end(text, pieces):
    assert cuts(text) == pieces


def test_split_tokens_leave_the_text_as_it_was(shipped):
    tokenizer = shipped[1]
    text = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n"
    stream = np.array(tokenizer.encode(text).ids, dtype=np.uint16)
    split = with_split_tokens(tokenizer, stream, share=0.5, seed=0)
    assert len(split) > len(stream)
    assert tokenizer.decode(split.tolist()) == text


def test_only_the_completed_function_has_to_parse():
    assert parses("def f(x):", "\n    return x\n\nnot python")
    assert not parses("def f(x):", "\n    return (x\n")
