"""Ids and text equal those of transformers, for every kind of tokenizer."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire import demo
from quire.text.folder import resolve_folder
from quire.text.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "\n",
    "Hello world",
    "  two leading spaces and a trailing one ",
    "line\nline\n\n\ttab",
    "süß 狐 🦊🏽 смешной ffi",
    "a\u0000b",
    "<think>added, not special</think>",
    "<|im_start|>user\nhi<|im_end|>",
    "<s>[INST] hi [/INST]</s> more",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_ids_equal_transformers(pair, text, special):
    assert pair.ours.encode(text, add_special_tokens=special) == pair.theirs.encode(
        text, add_special_tokens=special
    )


@pytest.mark.parametrize("skip", [True, False])
def test_decoding_equals_transformers(pair, skip):
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(pair.ours.vocab_size) for _ in range(rng.randrange(12))]
        assert pair.ours.decode(ids, skip_special_tokens=skip) == pair.theirs.decode(
            ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )


def test_token_bytes_join_to_the_text(pair):
    ids = pair.ours.encode("Hello world, the quick süß 狐 fox", add_special_tokens=False)
    joined = b"".join(map(pair.ours.token_bytes, ids)).decode().strip()
    assert joined == pair.ours.decode(ids, skip_special_tokens=False).strip()


def test_bad_words_are_found_with_and_without_a_space(pairs):
    tokenizer = pairs["byte-level"].ours
    sequences = tokenizer.bad_words_ids(["the"])
    assert sequences[0] == tokenizer.encode("the")
    assert [tokenizer.decode(ids) for ids in sequences] in (["the", " the"], ["the"])


def test_special_ids_come_from_the_configuration_too(tokenizer_folders, tmp_path):
    folder = tokenizer_folders.byte_level(tmp_path / "t", pad_token="<think>")
    assert Tokenizer(folder).encode("<think>")[0] in Tokenizer(folder).special_ids


def test_end_of_sequence_ids_come_from_the_model(pair):
    assert pair.ours.eos_token_ids == [2]


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        resolve_folder(str(tmp_path))


def test_malformed_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(ValueError, match="is not a tokenizer"):
        Tokenizer(tmp_path)


def test_malformed_configuration_is_named(tokenizer_folders, tmp_path):
    folder = tokenizer_folders.byte_level(tmp_path / "t")
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="tokenizer_config"):
        Tokenizer(folder)


@pytest.mark.skipif(not (demo.path() / "tokenizer.json").is_file(), reason="no demo model yet")
def test_demo_model_loads():
    tokenizer = Tokenizer(resolve_folder("demo"))
    assert tokenizer.chat is not None
    assert tokenizer.decode(tokenizer.encode("Hello")) == "Hello"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=40))
def test_any_text_encodes_as_in_transformers(pairs, text):
    for pair in pairs.values():
        ours = pair.ours.encode(text, add_special_tokens=False)
        assert ours == pair.theirs.encode(text, add_special_tokens=False)


def test_config_can_name_tokens_as_objects(tokenizer_folders, tmp_path):
    folder = tokenizer_folders.byte_level(tmp_path / "t")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["eos_token"] = {"content": "<|im_end|>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(folder).special_tokens["eos_token"] == "<|im_end|>"
