"""Pages of several engines as one that Prometheus takes."""

from prometheus_client.parser import text_string_to_metric_families

from quire.telemetry import metrics as m
from quire.telemetry.instruments import join_pages, new_registry, render


def test_pages_of_two_engines_describe_each_metric_once():
    pages = []
    for engine in ("0", "1"):
        registry = new_registry("engine", engine=engine)
        instruments = m.engine_instruments(registry, model_name="demo", engine=engine)
        instruments.get(m.REQUESTS_RUNNING).set(3)
        pages.append(render(registry))
    page = join_pages(pages)
    names = [family.name for family in text_string_to_metric_families(page)]
    assert len(names) == len(set(names))
    lines = page.splitlines()
    described = [line for line in lines if line.startswith("# ")]
    assert len(described) == len(set(described))
    samples = [line.rsplit(" ", 1)[0] for line in lines if not line.startswith("# ")]
    assert len(samples) == len(set(samples))
    for engine in ("0", "1"):
        assert f'quire_requests_running{{engine="{engine}",model_name="demo"}} 3.0' in page


def test_a_missing_page_is_no_harm():
    page = "# TYPE a gauge\na 1.0\n"
    assert join_pages(["", page, ""]) == page
