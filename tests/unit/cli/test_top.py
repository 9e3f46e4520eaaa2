"""The numbers of `quire top`, from pages that real instruments write."""

from prometheus_client.registry import CollectorRegistry

from quire.cli.follow import Row
from quire.cli.scrape import Page
from quire.cli.top import picture
from quire.cli.workers import role_of
from quire.proto import worker_pb2
from quire.telemetry import metrics as m
from quire.telemetry.instruments import render


class Engine:
    """An engine's metrics page."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.get = m.engine_instruments(self.registry, model_name="demo", engine="0").get

    def page(self, at):
        return Page.parse(render(self.registry), at)


def test_differences_of_two_pages_are_rates_and_quantiles_of_that_time():
    engine = Engine()
    engine.get(m.GENERATION_TOKENS).inc(100)
    engine.get(m.INTER_TOKEN_LATENCY).observe(5.0, count=1000)
    engine.get(m.KV_TRANSFER_BYTES, "sent", "a", "tcp").inc(7)
    before = engine.page(10.0)
    engine.get(m.GENERATION_TOKENS).inc(50)
    engine.get(m.PREFIX_CACHE_QUERIES).inc(40)
    engine.get(m.PREFIX_CACHE_HITS).inc(10)
    engine.get(m.INTER_TOKEN_LATENCY).observe(0.018, count=100)
    engine.get(m.KV_TRANSFER_BYTES, "sent", "a", "tcp").inc(30)
    engine.get(m.KV_TRANSFER_BYTES, "sent", "b", "grpc").inc(4)
    engine.get(m.KV_TRANSFER_BYTES, "received", "b", "grpc").inc(5)
    recent = engine.page(12.0).since(before)
    assert recent.at == 2.0
    assert recent.count(m.GENERATION_TOKENS) == 50
    assert recent.count(m.PREFIX_CACHE_HITS) / recent.count(m.PREFIX_CACHE_QUERIES) == 0.25
    assert (recent.counts["sent"], recent.counts["received"]) == (34, 5)
    # all within (0.015, 0.025]: half of the way through it
    assert recent.quantile(m.INTER_TOKEN_LATENCY, 0.5) == 0.02
    assert recent.quantile(m.TIME_TO_FIRST_TOKEN, 0.5) is None
    assert engine.page(12.0).quantile(m.INTER_TOKEN_LATENCY, 0.95) > 2.5


def test_a_quantile_above_the_last_bound_is_that_bound():
    engine = Engine()
    engine.get(m.INTER_TOKEN_LATENCY).observe(1e6)
    assert engine.page(0.0).quantile(m.INTER_TOKEN_LATENCY, 0.5) == 80.0


def test_several_engines_of_one_page_are_added():
    a, b = Engine(), Engine()
    for engine in (a, b):
        engine.get(m.GENERATION_TOKENS).inc(3)
    both = Page.parse(render(a.registry) + render(b.registry), 0.0)
    assert both.count(m.GENERATION_TOKENS) == 6


def test_roles_are_words_where_there_are_any():
    load = worker_pb2.Load()
    assert role_of(load) == "both", "a worker of an older version"
    for weights, word in (
        ((1, 1), "both"), ((1, 0), "prefill"), ((0, 0.5), "decode"), ((1, 0.25), "1/0.25"),
    ):  # fmt: skip
        load.prefill_weight, load.decode_weight = weights
        assert role_of(load) == word


def test_a_picture_adds_up_and_shows_what_is_not_known_as_such():
    rows = [
        Row(
            "a", "ready", "demo", "both", 2, 1, 0.5, None, 100.0, 30.0, 0.1, 0.2, 0.01, 0.02,
            0.5, 0.0,
        ),
        Row("b", "unreachable: failed to connect"),
    ]  # fmt: skip
    head, _, _, a, b = picture(rows)
    assert head.endswith("demo: 1 of 2 ready, 2 running, 1 waiting, 30 tok/s out")
    assert a.split() == [
        "a", "both", "ready", "2", "1", "50", "-", "100", "30", "100/200", "10.0/20.0", "0.500",
        "0.000",
    ]  # fmt: skip
    assert "unreachable: failed to connect" in b
    assert b.split()[-2:] == ["-", "-"]
