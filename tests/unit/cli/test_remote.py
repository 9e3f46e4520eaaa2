"""`quire chat` and `quire complete`, against a real socket."""

import asyncio
import io
import json

import pytest

from quire.cli import chat, complete
from quire.cli.remote import RemoteConfig, show


async def call(run, *argv):
    return await asyncio.to_thread(run, list(argv))


async def test_complete_prints_the_text_as_it_is(serving, capsys):
    async with serving() as server:
        assert await call(complete.run, "go on", "--url", server.url, "--max-tokens", "2") == 0
    assert capsys.readouterr().out == "t0 é\nt1 é\n\n"
    path, request = server.requests[0]
    assert path == "/completions"
    assert request["prompt"] == "go on"
    assert request["model"] == "fake"
    assert request["max_tokens"] == 2
    assert "temperature" not in request, "the server's defaults apply"


async def test_complete_reads_stdin(serving, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    async with serving() as server:
        assert await call(complete.run, "--url", server.url) == 0
    assert server.requests[0][1]["prompt"] == "from a pipe\n"


async def test_chat_without_a_terminal_answers_each_line_and_remembers(
    serving, monkeypatch, capsys
):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n two \n/reset\nthree\n/exit\nfour\n"))
    async with serving() as server:
        argv = ("--url", server.url, "--system-prompt", "be brief", "--max-tokens", "1")
        assert await call(chat.run, *argv) == 0
    talks = [[m["content"] for m in r["messages"]] for _, r in server.requests]
    assert talks == [
        ["be brief", "one"],
        ["be brief", "one", "t0 é\n", "two"],
        ["be brief", "three"],
    ]
    assert capsys.readouterr().out == "t0 é\n\n" * 3


async def test_a_quick_question_and_a_key_from_the_environment(serving, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-env")
    async with serving() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/v1/")
        assert await call(chat.run, "-q", "hi", "--model", "m", "--temperature", "0") == 0
    path, request = server.requests[0]
    assert path == "/v1/chat/completions"
    assert request["model"] == "m"
    assert request["temperature"] == 0
    assert server.headers[0]["authorization"] == "bearer sk-env"


@pytest.mark.parametrize("run", [chat.run, complete.run])
async def test_a_refusal_is_one_line(serving, capsys, run):
    async with serving(status=404) as server:
        assert await call(run, "-q", "x", "--url", server.url) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("error: HTTP 404: no")


def test_no_server_says_how_to_start_one(capsys):
    assert complete.run(["x", "--url", "http://127.0.0.1:9/v1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "quire serve" in line


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://192.0.2.1:1")
    assert complete.run(["x", "--url", "http://127.0.0.1:9/v1"]) == 1


def test_stopping_an_answer_keeps_what_was_said(capsys):
    def pieces():
        yield "half "
        raise KeyboardInterrupt

    assert show(pieces()) == "half "
    assert capsys.readouterr().out == "half  ...\n"


def test_the_url_has_no_slash_at_its_end(monkeypatch):
    assert RemoteConfig().base_url == "http://127.0.0.1:8000/v1"
    assert RemoteConfig(url="http://x/v1/").base_url == "http://x/v1"
    assert "sk-1" not in repr(RemoteConfig(api_key="sk-1"))
    assert json.dumps(RemoteConfig(seed=0, top_p=0.5).sampling()) == '{"top_p": 0.5, "seed": 0}'
