"""A model hub that is not there, or says no: what heals by itself is told from what does not."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import close_session, constants

from quire.config.exit_codes import CANNOT_SERVE, TRY_LATER, exit_code
from quire.text import hub
from quire.text.folder import ModelNotFound, locate

SILENT = 0


class Hub(ThreadingHTTPServer):
    """Answers everything with one status; SILENT: with nothing until it ends."""

    def __init__(self, status: int, error_code: str = "") -> None:
        self.status, self.error_code = status, error_code
        self.ended = threading.Event()
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if self.server.status == SILENT:
            self.server.ended.wait()
            return
        self.send_response(self.server.status)
        self.send_header("X-Error-Code", self.server.error_code)
        body = json.dumps({"error": "so it is"}).encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Asks a hub that answers so for a model that is in no cache; what comes of it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "REPLY_S", 0.2)
    running: list[Hub] = []

    def ask(status: int, error_code: str = "") -> OSError:
        server = Hub(status, error_code)
        running.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        return failure()

    yield ask
    for server in running:
        server.ended.set()
        server.shutdown()
        server.server_close()
    close_session()


def failure() -> OSError:
    with pytest.raises(OSError, match="org/model") as raised:
        locate("org/model")
    assert "\n" not in str(raised.value)
    return raised.value


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
def test_a_hub_in_trouble_is_tried_again(asked, status) -> None:
    error = asked(status)
    assert isinstance(error, hub.HubUnreachable)
    assert f"the hub answers {status}" in str(error)
    assert exit_code(error) == TRY_LATER


def test_a_hub_that_takes_connections_and_says_nothing_is_not_waited_for(asked) -> None:
    assert isinstance(asked(SILENT), hub.HubUnreachable)


def test_a_hub_that_nobody_listens_for_is_tried_again(asked, monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    error = failure()
    assert isinstance(error, hub.HubUnreachable)
    assert "cannot be reached" in str(error)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, "RepoNotFound"), "neither a local folder nor a repository on the hub"),
        ((403, "GatedRepo"), "access to org/model must be granted: set HF_TOKEN"),
        ((404, "RevisionNotFound"), "could not be fetched"),
        ((403, ""), "could not be fetched"),
    ],
)
def test_what_the_caller_must_change_is_a_refusal(asked, answer, words) -> None:
    error = asked(*answer)
    assert isinstance(error, ModelNotFound)
    assert words in str(error)
    assert exit_code(error) == CANNOT_SERVE


def test_offline_by_choice_is_a_refusal(asked, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = failure()
    assert isinstance(error, ModelNotFound)
    assert "HF_HUB_OFFLINE" in str(error)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no such option"), CANNOT_SERVE),
        (PermissionError("/m"), CANNOT_SERVE),
        (ModelNotFound("/m"), CANNOT_SERVE),
        (TimeoutError(), TRY_LATER),
        (OSError("cannot listen on 127.0.0.1:80: it is in use"), TRY_LATER),
        (OSError(28, "No space left on device"), TRY_LATER),
    ],
)
def test_exit_codes_say_whether_another_attempt_is_of_use(error, code) -> None:
    assert exit_code(error) == code
