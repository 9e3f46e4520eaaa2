"""Values from defaults, YAML, environment and flags, in this order; and what mistakes print."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from quire.config.engine import EngineConfig
from quire.config.flags import Command, parse
from quire.config.gateway import GatewayConfig
from quire.config.logs import LogConfig

SERVE = Command(
    prog="quire serve",
    summary="Serve a model.",
    owners=(EngineConfig, GatewayConfig, LogConfig),
    positional="model",
    reads_environment=True,
    known_variables=("QUIRE_ELSEWHERE",),
)


def serve(*argv, **environ):
    return parse(SERVE, argv, environ)


def fails(capsys, *argv, **environ):
    """Parse what cannot be; return the one line on stderr."""
    with pytest.raises(SystemExit) as caught:
        serve(*argv, **environ)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("quire serve: error: ")
    return line


SOURCES = st.fixed_dictionaries(
    {s: st.none() | st.integers(1, 500) for s in ("yaml", "env", "argv")}
)


@given(SOURCES)
def test_the_strongest_source_wins_and_is_named(tmp_path_factory, given):
    argv, environ, path = [], {}, tmp_path_factory.getbasetemp() / "serve.yaml"
    expected, origin = EngineConfig().max_num_seqs, None
    if given["yaml"] is not None:
        path.write_text(f"max-num-seqs: {given['yaml']}\n")
        argv += ["--config", str(path)]
        expected, origin = given["yaml"], str(path)
    if given["env"] is not None:
        environ["QUIRE_MAX_NUM_SEQS"] = str(given["env"])
        expected, origin = given["env"], "QUIRE_MAX_NUM_SEQS"
    if given["argv"] is not None:
        argv += ["--max-num-seqs", str(given["argv"])]
        expected, origin = given["argv"], "--max-num-seqs"
    resolved = serve(*argv, **environ)
    assert resolved.get(EngineConfig).max_num_seqs == expected
    assert resolved.origins.get("max_num_seqs") == origin


def test_flags_take_underscores_equals_signs_and_vllm_spellings():
    engine = serve(
        "model-dir", "--max_model_len=32K", "--gpu_memory_utilization", "0.5", "-tp", "1",
        "--no-enable-prefix-caching", "--enforce_eager",
    ).get(EngineConfig)  # fmt: skip
    assert engine.model == "model-dir"
    assert engine.max_model_len == 32768
    assert engine.memory_utilization == 0.5
    assert not engine.enable_prefix_caching
    assert engine.enforce_eager


def test_values_keep_their_underscores():
    gateway = serve("my_model", "--api-key", "a_b", "--served-model-name=x_y").get(GatewayConfig)
    assert gateway.api_key == ("a_b",)
    assert gateway.served_model_name == ("x_y",)


def test_lists_collect_over_repeats_and_a_flag_replaces_weaker_sources():
    argv = ("--api-key", "a", "b", "--api-key", "c,d")
    assert serve(*argv).get(GatewayConfig).api_key == ("a", "b", "c,d")
    assert serve(*argv, QUIRE_API_KEY="e").get(GatewayConfig).api_key == ("a", "b", "c,d")
    assert serve(QUIRE_API_KEY="e, f,").get(GatewayConfig).api_key == ("e", "f")


def test_the_config_file_may_come_from_the_environment(tmp_path):
    path = tmp_path / "q.yaml"
    path.write_text("model: m\napi_key: [a, b]\nkv-cache-memory: 2G\nenforce-eager: true\n")
    resolved = serve(QUIRE_CONFIG=str(path))
    assert resolved.get(EngineConfig).kv_cache_memory_bytes == 2 << 30
    assert resolved.get(GatewayConfig).api_key == ("a", "b")
    path.write_text("")
    assert serve(QUIRE_CONFIG=str(path)).get(EngineConfig) == EngineConfig()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-modle-len", "4"], "unknown option --max-modle-len; did you mean --max-model-len?"),
        (["--zzz"], "unknown option --zzz; see quire serve --help"),
        (["--max-model", "4"], "unknown option --max-model; did you mean --max-model-len?"),
        (["a", "b"], "unexpected argument 'b'"),
        (["--port"], "expected one argument"),
        (["--port", "http"], "--port: an integer"),
        (["--port", "70000"], "port must be between 0 and 65535, not 70000"),
        (["--dtype", "fp16"], "--dtype: must be one of auto, float32"),
        (["--gpu-memory-utilization", "x"], "--gpu-memory-utilization: a number is needed"),
        (["--trust-remote-code"], "--trust-remote-code: code from a model repository"),
        (["-tp", "0"], "must be at least 1"),
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size: pipeline"),
        (["--host", "0.0.0.0"], "--allow-unauthenticated"),
        (["--enforce-eager=yes"], "ignored explicit argument"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(capsys, argv, message):
    assert message in fails(capsys, *argv)


def test_a_wrong_variable_is_one_line_and_exit_code_2(capsys):
    assert "QUIRE_PORT: an integer" in fails(capsys, QUIRE_PORT="x")
    assert "port is from QUIRE_PORT" in fails(capsys, QUIRE_PORT="70000")
    assert "enforce" in fails(capsys, QUIRE_ENFORCE_EAGER="maybe").lower()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-modle-len: 4", "unknown key 'max-modle-len'; did you mean max_model_len?"),
        ("max-num-seqs: [1]", "max-num-seqs: an integer is needed"),
        ("revision: 1.10", "put it in quotes"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "repeats 'max-num-seqs'"),
        ("a: [", "is not YAML"),
        ("- 1", "a mapping of option names"),
        ("trust-remote-code: true", "never run"),
        ("max-num-seqs: 0", "max_num_seqs is from"),
    ],
)
def test_a_wrong_file_is_one_line_and_exit_code_2(capsys, tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert message in fails(capsys, "--config", str(path))


def test_a_missing_file_is_named(capsys):
    assert "cannot read /no/such.yaml" in fails(capsys, "--config", "/no/such.yaml")


def test_unknown_variables_warn_with_the_closest_match(capsys):
    serve(QUIRE_MAX_MODLE_LEN="4", QUIRE_ELSEWHERE="1", HOME="/")
    (line,) = capsys.readouterr().err.splitlines()
    assert "QUIRE_MAX_MODLE_LEN is not an option; did you mean QUIRE_MAX_MODEL_LEN?" in line


def test_what_kubernetes_injects_for_a_service_named_quire_is_ignored(capsys):
    resolved = serve(
        QUIRE_PORT="tcp://10.0.0.7:8000",
        QUIRE_PORT_8000_TCP="tcp://10.0.0.7:8000",
        QUIRE_PORT_8000_TCP_ADDR="10.0.0.7",
        QUIRE_SERVICE_HOST="10.0.0.7",
        QUIRE_SERVICE_PORT_HTTP="8000",
        QUIRE_GATEWAY_SERVICE_PORT="8000",
    )
    assert resolved.get(GatewayConfig).port == 8000
    assert capsys.readouterr().err == ""


def test_pasted_vllm_flags_warn_and_change_nothing(capsys):
    resolved = serve("--swap-space", "4", "--disable-log-requests", "--enable-chunked-prefill")
    assert resolved.get(EngineConfig) == EngineConfig()
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_the_dump_is_a_config_file_that_says_where_values_come_from(capsys, tmp_path):
    argv = ("--port", "81", "--api-key", "sk-secret", "--served-model-name", "ü: #x")
    with pytest.raises(SystemExit) as caught:
        serve(*argv, "--dump-config", QUIRE_MAX_NUM_SEQS="7")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "sk-secret" not in text
    lines = {line.split(":")[0]: line for line in text.splitlines()}
    assert lines["port"].endswith("# --port")
    assert lines["max-num-seqs"].endswith("# QUIRE_MAX_NUM_SEQS")
    assert lines["dtype"].endswith("# default")
    assert yaml.safe_load(text)["served-model-name"] == ["ü: #x"]
    path = tmp_path / "dump.yaml"
    path.write_text(text)
    again = serve("--config", str(path))
    assert again.get(GatewayConfig).port == 81
    assert again.get(EngineConfig).max_num_seqs == 7


def test_help_lists_every_option_once_in_groups(capsys):
    with pytest.raises(SystemExit) as caught:
        serve("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("model:", "cache:", "scheduler:", "access:", "limits:", "--max-model-len"):
        assert f"\n{part}" in text or f"\n  {part} " in text
    assert "--swap-space" not in text
    assert max(map(len, text.splitlines())) <= 110
