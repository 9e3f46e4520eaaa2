"""`quire collect-env`: complete enough for a bug report, and safe to paste into one."""

from quire.cli.collect_env import environment, mask, run


def test_it_describes_the_machine(capsys):
    assert run(["--quick"]) == 0
    out = capsys.readouterr().out
    for part in ("quire ", "python ", "numpy ", "CPU:", "memory:", "CPU kernels:", "GPUs:"):
        assert part in out


def test_only_our_variables_are_shown_and_secrets_are_not():
    environ = {
        "HOME": "/home/me",
        "AWS_SECRET_ACCESS_KEY": "a",
        "QUIRE_API_KEY": "sk-b",
        "HF_TOKEN": "hf_c",
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=d",
        "HF_ENDPOINT": "https://me:pass@hub.example/x",
        "QUIRE_PORT": "8000",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "2",
    }
    assert list(environment(environ)) == [
        "HF_ENDPOINT=https://***@hub.example/x",
        "HF_TOKEN=***",
        "OMP_NUM_THREADS=2",
        "OTEL_EXPORTER_OTLP_HEADERS=***",
        "QUIRE_API_KEY=***",
        "QUIRE_PORT=8000",
        "TOKENIZERS_PARALLELISM=false",
    ]
    assert list(environment({})) == ["nothing of ours is set"]
    assert mask("QUIRE_API_KEY", "") == ""
