"""The metric declarations, and the page Prometheus reads."""

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry

from quire.telemetry import metrics as m
from quire.telemetry.docs import metrics_page
from quire.telemetry.instruments import HistogramDeclaration, new_registry, render

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"
VLLM_NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "prompt_tokens_total",
    "prompt_tokens_by_source_total",
    "prompt_tokens_cached_total",
    "generation_tokens_total",
    "num_preemptions_total",
    "admission_rejections_total",
    "request_success_total",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prefill_kv_computed_tokens",
    "iteration_tokens_total",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "cache_config_info",
]
VLLM_BUCKETS = {
    m.TIME_TO_FIRST_TOKEN: [
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20,
        40, 80, 160, 640, 2560,
    ],
    m.INTER_TOKEN_LATENCY: [
        0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
        80,
    ],
    m.REQUEST_LATENCY: [
        0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,
        7680,
    ],
}  # fmt: skip


def engine():
    registry = CollectorRegistry()
    return registry, m.engine_instruments(registry, model_name="demo", engine="0")


def samples(registry):
    page = render(registry)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def test_names_are_unique_and_follow_the_conventions():
    names = [name for d in m.DECLARATIONS for name in d.exported_names]
    assert len(names) == len(set(names))
    assert {id(d) for d in m.DECLARATIONS} <= {id(v) for v in vars(m).values()}, "one hides another"
    for d in m.DECLARATIONS:
        assert d.name.startswith("quire_")
        assert not d.name.endswith("_total"), "the exposition adds it"
        assert d.help.endswith("."), d.name
        assert ("seconds" in d.name) == (d.unit == "seconds"), d.name
        assert len(d.values) in (0, len(d.labels)), d.name
        if d.component == "gateway":
            assert not d.aliases, "a vllm: name from a gateway would be counted twice"


@pytest.mark.parametrize("name", VLLM_NAMES)
def test_every_vllm_name_readers_rely_on_is_exported(name):
    exported = {n for d in m.DECLARATIONS for n in d.exported_names}
    assert f"vllm:{name}" in exported


@pytest.mark.parametrize("declaration", VLLM_BUCKETS, ids=lambda d: d.name)
def test_buckets_contain_vllms(declaration):
    assert set(VLLM_BUCKETS[declaration]) <= set(declaration.buckets)


def test_buckets_rise():
    for d in m.DECLARATIONS:
        if isinstance(d, HistogramDeclaration):
            assert list(d.buckets) == sorted(set(d.buckets)), d.name


def test_an_alias_shows_the_same_numbers_with_the_same_labels():
    registry, live = engine()
    live.get(m.REQUESTS_RUNNING).set(3)
    live.get(m.REQUESTS_FINISHED, "stop").inc(2)
    live.get(m.INTER_TOKEN_LATENCY).observe(0.012, count=64)
    seen = samples(registry)
    common = (("engine", "0"), ("model_name", "demo"))
    assert seen["quire_requests_running", common] == seen["vllm:num_requests_running", common] == 3
    reason = (("engine", "0"), ("finished_reason", "stop"), ("model_name", "demo"))
    assert seen["vllm:request_success_total", reason] == 2
    assert seen["vllm:inter_token_latency_seconds_count", common] == 64
    assert seen["vllm:inter_token_latency_seconds_sum", common] == pytest.approx(0.768)
    bucket = (("engine", "0"), ("le", "0.015"), ("model_name", "demo"))
    assert seen["vllm:inter_token_latency_seconds_bucket", bucket] == 64
    below = (("engine", "0"), ("le", "0.01"), ("model_name", "demo"))
    assert seen["vllm:inter_token_latency_seconds_bucket", below] == 0


def test_a_value_on_a_bound_falls_in_the_bucket_below_it():
    _, live = engine()
    histogram = live.get(m.STEP_TOKENS)
    histogram.observe(16)
    assert histogram.counts[histogram.bounds.index(16.0)] == 1
    histogram.observe(1e9)
    assert histogram.counts[-1] == 1
    assert histogram.total == 2


def test_info_is_shown_once_set_and_renames_labels_for_vllms_readers():
    registry, live = engine()
    assert not [name for name, _ in samples(registry) if "cache_config" in name]
    live.get(m.CACHE_CONFIG).set(
        block_size=16, num_blocks=100, block_bytes=4096, enable_prefix_caching=True
    )
    labels = {name: dict(labels) for name, labels in samples(registry)}
    assert labels["quire_cache_config_info"]["num_blocks"] == "100"
    assert labels["vllm:cache_config_info"]["num_gpu_blocks"] == "100"
    assert labels["vllm:cache_config_info"]["block_size"] == "16"


def test_known_label_values_are_zero_from_the_start():
    registry, _ = engine()
    reasons = [
        dict(k)["finished_reason"]
        for n, k in samples(registry)
        if n == "vllm:request_success_total"
    ]
    assert sorted(reasons) == ["abort", "error", "length", "stop"]


def test_there_are_no_created_series():
    registry = new_registry("engine")
    m.engine_instruments(registry, model_name="demo")
    assert "_created" not in render(registry)


def test_the_pages_of_gateway_and_engine_can_be_joined():
    pages = []
    for component in ("engine", "gateway"):
        registry = new_registry(component)
        if component == "engine":
            m.engine_instruments(registry, model_name="demo")
        else:
            m.gateway_instruments(registry)
        pages.append(render(registry))
    families = [f.name for f in text_string_to_metric_families("".join(pages))]
    assert len(families) == len(set(families))


def test_wrong_use_is_an_error():
    _, live = engine()
    with pytest.raises(ValueError, match="has labels"):
        live.get(m.REQUESTS_FINISHED)
    with pytest.raises(KeyError):
        live.get(m.WORKER_RESTARTS)
    with pytest.raises(ValueError, match="labels of engine metrics"):
        m.Instruments("engine", m.DECLARATIONS, CollectorRegistry(), {"engine": "0"})


def test_hostile_label_values_are_escaped():
    registry = CollectorRegistry()
    m.engine_instruments(registry, model_name='a"b\nc\\d').get(m.STEPS).inc()
    assert ("quire_steps_total", (("engine", "0"), ("model_name", 'a"b\nc\\d'))) in samples(
        registry
    )


def test_the_docs_page_is_current():
    assert DOCS.read_text() == metrics_page(), (
        "run: python -m quire.telemetry.docs > docs/metrics.md"
    )
