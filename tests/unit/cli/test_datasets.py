"""The requests of benchmarks: reproducible, of the lengths asked for, sharing what they should."""

import json

import pytest

from quire.cli.bench.datasets import load_dataset
from quire.cli.bench.options import DatasetConfig
from quire.config.values import ConfigError


def test_the_same_options_give_the_same_requests_and_another_seed_gives_others():
    config = DatasetConfig(num_prompts=20, random_range_ratio=0.5)
    assert load_dataset(config) == load_dataset(config)
    assert load_dataset(config) != load_dataset(DatasetConfig(num_prompts=20, seed=1))


def test_random_lengths_stay_in_range_and_prefixes_are_shared():
    config = DatasetConfig(
        num_prompts=50, random_input_len=100, random_output_len=10, random_range_ratio=0.2,
        random_prefix_len=7, vocab_size=50,
    )  # fmt: skip
    samples = load_dataset(config)
    assert len(samples) == 50
    assert {len(s.prompt) for s in samples} <= set(range(87, 128))
    assert {s.output_len for s in samples} <= set(range(8, 13))
    assert len({tuple(s.prompt[:7]) for s in samples}) == 1
    assert len({tuple(s.prompt[7:20]) for s in samples}) == 50
    assert {t for s in samples for t in s.prompt} <= set(range(10, 50))


def test_prefix_repetition_uses_each_prefix_as_often():
    config = DatasetConfig(
        dataset_name="prefix_repetition", num_prompts=40, prefix_repetition_num_prefixes=4,
        prefix_repetition_prefix_len=16, prefix_repetition_suffix_len=3,
    )  # fmt: skip
    samples = load_dataset(config)
    prefixes = [tuple(s.prompt[:16]) for s in samples]
    assert {prefixes.count(p) for p in prefixes} == {10}
    assert {len(s.prompt) for s in samples} == {19}


def test_sharegpt_takes_first_exchanges_and_repeats_when_there_are_too_few(tmp_path):
    path = tmp_path / "chats.json"
    path.write_text(
        json.dumps(
            [
                {"conversations": [{"value": "What is a quire?"}, {"value": "x" * 400}]},
                {
                    "messages": [
                        {"content": "Sing, please"},
                        {"content": "la la la"},
                        {"content": "!"},
                    ]
                },
                {"conversations": [{"value": "only a question"}]},
                {"conversations": []},
            ]
        )
    )
    config = DatasetConfig(dataset_name="sharegpt", dataset_path=str(path), num_prompts=5)
    samples = load_dataset(config)
    assert len(samples) == 5
    assert {(s.prompt, s.output_len) for s in samples} == {
        ("What is a quire?", 100),
        ("Sing, please", 2),
    }


def trace(tmp_path, *entries):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(e) for e in entries))
    return str(path)


def test_a_trace_gives_times_lengths_and_equal_blocks_for_equal_hashes(tmp_path):
    path = trace(
        tmp_path,
        {"timestamp": 1000, "input_length": 1300, "output_length": 6, "hash_ids": [0, 1, 2]},
        {"timestamp": 3500, "input_length": 1024, "output_length": 900, "hash_ids": [0, 7]},
        {"timestamp": 3500, "input_length": 100, "output_length": 0, "hash_ids": []},
    )
    config = DatasetConfig(dataset_name="mooncake", dataset_path=path, max_output_len=50)
    a, b, c = load_dataset(config)
    assert [s.arrival_s for s in (a, b, c)] == [0, 2.5, 2.5]
    assert [len(s.prompt) for s in (a, b, c)] == [1300, 1024, 100]
    assert [s.output_len for s in (a, b, c)] == [6, 50, 1]
    assert a.prompt[:512] == b.prompt[:512]
    assert a.prompt[512:1024] != b.prompt[512:]
    short = DatasetConfig(dataset_name="mooncake", dataset_path=path, max_input_len=600)
    assert [len(s.prompt) for s in load_dataset(short)] == [600, 600, 100]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sharegpt", "{", "is not JSON"),
        ("sharegpt", "[]", "no usable request"),
        ("mooncake", "", "no usable request"),
        ("mooncake", '{"timestamp": 1}', "trace:1"),
        ("mooncake", "[1]", "trace:1"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, text, message):
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_dataset(DatasetConfig(dataset_name=name, dataset_path=str(path)))


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match="cannot read /no/such"):
        load_dataset(DatasetConfig(dataset_name="mooncake", dataset_path="/no/such"))
    with pytest.raises(ValueError, match="give dataset_path"):
        DatasetConfig(dataset_name="sharegpt")
