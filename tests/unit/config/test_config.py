"""The configs themselves, and their construction from keyword arguments and JSON."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest

from quire.config.base import ENV_PREFIX, field_docs, from_mapping, options_of, to_mapping
from quire.config.engine import EngineConfig
from quire.config.gateway import GatewayConfig
from quire.config.logs import LogConfig
from quire.config.option import METADATA_KEY
from quire.config.transfer import TransferConfig
from quire.config.values import ConfigError
from quire.config.vllm import IGNORED, REFUSED

CONFIGS = (EngineConfig, GatewayConfig, LogConfig, TransferConfig)


@pytest.mark.parametrize("owner", CONFIGS)
def test_every_field_has_help_a_group_and_lowercase_words(owner):
    docs = field_docs(owner)
    for o in options_of(owner):
        assert docs.get(o.name, "").endswith("."), f"{o.name} lacks a docstring that ends in a dot"
        assert METADATA_KEY in owner.__dataclass_fields__[o.name].metadata, f"{o.name}: no option()"
        assert o.name == o.name.lower()
        assert o.variables[0] == ENV_PREFIX + o.name.upper()


def test_no_name_is_taken_twice_over_the_whole_server():
    names = [flag for owner in CONFIGS for o in options_of(owner) for flag in o.flags]
    names += ["--" + name.replace("_", "-") for name in (*IGNORED, *REFUSED)]
    names += ["--config", "--dump-config", "--help"]
    assert sorted(names) == sorted(set(names))
    assert len(names) < 95, "few enough to read"


def test_a_config_cannot_be_changed_and_shows_no_secret():
    config = GatewayConfig(api_key=("sk-secret",))
    with pytest.raises(FrozenInstanceError):
        config.port = 1
    assert "sk-secret" not in repr(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_num_sek": 1}, "unknown option 'max_num_sek'; did you mean max_num_seqs?"),
        ({"dtype": "bfloat61"}, "did you mean bfloat16?"),
        ({"max_num_seqs": 2.5}, "max_num_seqs: an integer is needed, not 2.5"),
        ({"enforce_eager": 1}, "enforce_eager: a truth is needed"),
        ({"trust_remote_code": True}, "never run"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be at least 1"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"tensor_parallel_size": 2, "async_scheduling": True}, "is not possible"),
        ({"memory_utilization": 0.5, "gpu-memory-utilization": 0.6}, "given twice"),
        ({"block_size": 32}, "block_size is fixed at 16"),
        ({"max_num_batched_tokens": 8}, "must be at least"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ConfigError) as caught:
        from_mapping(EngineConfig, values)
    assert message in str(caught.value)


def test_vllm_spellings_mean_the_same():
    config = from_mapping(
        EngineConfig,
        {
            "gpu_memory_utilization": 0.5,
            "kv-cache-memory": "1G",
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "trust_remote_code": False,
            "swap_space": 4,
            "disable_log_stats": True,
        },
    )
    assert config == EngineConfig(memory_utilization=0.5, kv_cache_memory_bytes=2**30)


def test_json_for_another_process_gives_the_same_config():
    for config in (
        EngineConfig(model="m", max_num_seqs=3, kv_cache_memory_bytes=1 << 20),
        GatewayConfig(api_key=("a", "b"), port=0),
    ):
        assert from_mapping(type(config), json.loads(json.dumps(to_mapping(config)))) == config


def test_a_config_built_in_python_is_checked_too():
    assert GatewayConfig(api_key=["k"]).api_key == ("k",)
    assert (
        replace(EngineConfig(), max_num_seqs="1k", max_num_batched_tokens=2048).max_num_seqs == 1000
    )
    with pytest.raises(ValueError, match="port: an integer"):
        GatewayConfig(port="http")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org", ""])
def test_an_open_server_needs_a_key(host):
    with pytest.raises(ValueError, match="--allow-unauthenticated"):
        GatewayConfig(host=host)
    assert GatewayConfig(host=host, api_key=("k",))
    assert GatewayConfig(host=host, allow_unauthenticated=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_a_local_server_does_not(host):
    assert GatewayConfig(host=host).is_local
    assert GatewayConfig(uds="/run/quire.sock", host="0.0.0.0").is_local


def test_an_empty_key_would_let_everybody_in():
    with pytest.raises(ValueError, match="api_key must not be empty"):
        GatewayConfig(host="0.0.0.0", api_key=("",))


def test_the_url_is_one_a_client_here_can_use():
    assert GatewayConfig(host="0.0.0.0", api_key=("k",), port=9).url == "http://127.0.0.1:9"
    assert GatewayConfig(host="::1").url == "http://[::1]:8000"
    tls = GatewayConfig(ssl_keyfile="k", ssl_certfile="c", root_path="/llm")
    assert tls.url == "https://127.0.0.1:8000/llm"
    with pytest.raises(ValueError, match="go together"):
        GatewayConfig(ssl_keyfile="k")
