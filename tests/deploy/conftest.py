"""One release, run as local processes, for all tests that need it."""

from __future__ import annotations

import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import pytest
from local_pods import LocalRelease
from manifests import EXAMPLES, RELEASE, render

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def release(tmp_path_factory) -> Iterator[LocalRelease]:
    """The example for a laptop with a second decode pod: gateway, router, prefill, 2 decode."""
    path = next(path for path in EXAMPLES if path.stem == "kind-cpu")
    rendered = render(path, sets=("roles.decode.replicas=2", "monitoring.podMonitor.enabled=true"))
    with LocalRelease(rendered, tmp_path_factory.mktemp("release")) as release:
        gateway = release.of("gateway")[0]
        gateway.start()
        gateway.wait_for("startupProbe")
        refused_before_workers(release)
        for pod in release.pods.values():
            if pod is not gateway:
                pod.start()
        for pod in release.pods.values():
            pod.wait_for("startupProbe")
            pod.wait_for("readinessProbe")
        yield release


def refused_before_workers(release: LocalRelease) -> None:
    """A gateway without workers is alive, not ready, and says so to clients."""
    gateway = release.of("gateway")[0]
    assert gateway.probe("livenessProbe")
    assert not gateway.probe("readinessProbe")
    key = release.secret(f"{RELEASE}-quire-api-key", "api-key")
    request = urllib.request.Request(
        gateway.url("http", "/v1/completions"),
        b'{"model": "demo", "prompt": "x"}',
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(request, timeout=30)
