"""Admission, pacing, keys, and the readings of a scope."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.api.errors import ApiError
from quire.gateway.admission import Admission
from quire.gateway.auth import Authentication, api_keys
from quire.gateway.cache_salt import SALT_BYTES, request_salt, tenant_salt
from quire.gateway.pacemaker import Pacemaker
from quire.gateway.replies import Replies
from quire.gateway.scope import path_of, sanitized, tenant_of, timeout_of


def test_places_are_given_back_whatever_happens():
    admission = Admission(1)
    with pytest.raises(ValueError, match="x"), admission.enter():
        raise ValueError("x")
    with admission.enter(), pytest.raises(ApiError) as error, admission.enter():
        pass
    assert (error.value.status, error.value.code) == (503, "overloaded")
    assert admission.open == 0


class Stream:
    def __init__(self, age_s):
        self.last_sent = time.monotonic() - age_s


async def test_only_silent_streams_are_nudged():
    pacemaker = Pacemaker(0.05)
    silent, lively = (Replies(1, 1, lambda _: None) for _ in range(2))
    with pacemaker.follow(silent, Stream(10)), pacemaker.follow(lively, Stream(-10)):
        running = asyncio.create_task(pacemaker.run())
        assert await asyncio.wait_for(silent.next(), 5) == []
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(lively.next(), 0.1)
        running.cancel()


async def test_pacing_can_be_switched_off():
    await asyncio.wait_for(Pacemaker(0).run(), 1)


def test_keys_come_from_configuration_and_environment():
    environment = {"QUIRE_API_KEY": "b", "VLLM_API_KEY": "c", "OTHER": "d"}
    assert api_keys(("a", "b"), environment) == ("a", "b", "c")
    assert api_keys((), {"QUIRE_API_KEY": ""}) == ()


def scope(path="/v1/models", headers=(), root_path=""):
    return {"type": "http", "path": path, "root_path": root_path, "headers": list(headers)}


async def let_through(authentication, made):
    await authentication(made, None, None)


async def test_salt_depends_on_the_key_alone():
    async def app(scope, receive, send):
        return None

    authentication = Authentication(app, ("one", "two"))
    salts = []
    for key in (b"one", b"two", b"one"):
        made = scope(headers=[(b"authorization", b"Bearer " + key)])
        await let_through(authentication, made)
        salts.append(tenant_of(made))
    assert salts[0] == salts[2] != salts[1]


TENANTS = st.sampled_from([b"", tenant_salt(b"one"), tenant_salt(b"two")])
ASKED = st.none() | st.text(min_size=1, max_size=4)


@given(TENANTS, ASKED, TENANTS, ASKED)
def test_prefixes_are_shared_within_a_tenant_and_what_it_asks_for(tenant, asked, other, wanted):
    salts = request_salt(tenant, asked), request_salt(other, wanted)
    assert (salts[0] == salts[1]) == ((tenant, asked) == (other, wanted))


def test_a_request_cannot_ask_for_another_tenants_prefixes():
    """Not by its salt, in any spelling, and not where no keys are needed."""
    victim = tenant_salt(b"victim")
    for asked in ("victim", str(victim, "latin-1"), victim.hex()):
        assert request_salt(b"", asked) != victim != request_salt(tenant_salt(b"own"), asked)
    assert request_salt(victim, None) == victim
    assert len(request_salt(victim, "x" * 256)) == SALT_BYTES


async def test_lifespan_needs_no_key():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    await let_through(Authentication(app, ("k",)), {"type": "lifespan"})
    assert seen == ["lifespan"]


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [("/livez", "", "/livez"), ("/llm/livez", "/llm", "/livez"), ("/livez", "/llm", "/livez")],
)
def test_path_below_the_root(path, root, expected):
    assert path_of(scope(path, root_path=root)) == expected


@pytest.mark.parametrize("value", ["a\r\nb", "a\x00b", "é", "x" * 999])
def test_echoed_values_are_safe_in_headers_and_logs(value):
    shown = sanitized(value)
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) <= 128


@pytest.mark.parametrize(
    ("header", "default", "expected"), [(b"", 5, 5), (b"2.5", 0, 2.5), (b"9", 5, 5)]
)
def test_client_may_shorten_its_time_only(header, default, expected):
    headers = [(b"x-request-timeout", header)] if header else []
    assert timeout_of(scope(headers=headers), default) == expected
