"""Real clients: OpenAI's SDK and LangChain, streaming and not, and what they make of errors."""

from __future__ import annotations

import asyncio

import openai
import pytest
import tokenizer_folders
from gateway_server import MODEL, gateway

from quire.gateway.fake_worker import speak
from quire.text.tokenizer import Tokenizer

TEXT = "Hello world, 🦊"
TALK = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    tokenizer = Tokenizer(tokenizer_folders.byte_level(tmp_path_factory.mktemp("t")))
    script = speak(tokenizer.encode(TEXT), stop_id=2)
    with gateway(tokenizer, script, api_key=("sesame",)) as running:
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0) as made:
        yield made


def test_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=TALK, logprobs=True)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.choices[0].logprobs.content[0].token == "Hello"


def test_chat_stream(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=TALK, stream=True, stream_options={"include_usage": True}, n=2
    )
    texts, usage = {0: "", 1: ""}, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: TEXT, 1: TEXT}
    assert usage.completion_tokens > 2


def test_stream_accumulator(client):
    """The SDK's own accumulator validates every chunk and the final object."""
    with client.chat.completions.stream(model=MODEL, messages=TALK, logprobs=True) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == TEXT
    assert final.choices[0].message.role == "assistant"


def test_bodies_validate_strictly(client):
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=TALK)
    type(raw.parse()).model_validate_json(raw.text, strict=True)
    raw = client.completions.with_raw_response.create(model=MODEL, prompt="x", logprobs=1)
    type(raw.parse()).model_validate_json(raw.text, strict=True)


def test_completions(client):
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=1, logprobs=1)
    assert [choice.text for choice in answer.choices] == ["Hello", "Hello"]
    assert answer.choices[0].logprobs.tokens == ["Hello"]
    stream = client.completions.create(model=MODEL, prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == TEXT


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_errors_have_their_classes(server, client):
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(model="nope", messages=TALK)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=TALK, max_tokens=9999)
    assert bad.value.code == "context_length_exceeded"
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_async_client(server):
    async def talk():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="sesame") as client:
            create = client.chat.completions.create
            answers = [create(model=MODEL, messages=TALK) for _ in range(8)]
            stream = await create(model=MODEL, messages=TALK, stream=True)
            text = "".join([c.choices[0].delta.content or "" async for c in stream])
            return [a.choices[0].message.content for a in await asyncio.gather(*answers)], text

    assert asyncio.run(talk()) == ([TEXT] * 8, TEXT)


def test_leaving_a_stream_early(client, server):
    stream = client.chat.completions.create(model=MODEL, messages=TALK, stream=True)
    next(iter(stream))
    stream.close()
    server.until(
        lambda: server.get("/load", authorization="Bearer sesame").json["server_load"] == 0
    )


def chat_openai(server, **kwargs):
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="sesame", model=MODEL, max_retries=0, **kwargs
    )


def test_langchain(server):
    answer = chat_openai(server).invoke("hi")
    assert answer.content == TEXT
    assert answer.usage_metadata["output_tokens"] > 2


def test_langchain_stream(server):
    chunks = list(chat_openai(server, stream_usage=True).stream("hi"))
    assert "".join(chunk.content for chunk in chunks) == TEXT
    usages = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert len(usages) == 1


def test_langchain_recognises_context_overflow(server):
    from langchain_core.exceptions import ContextOverflowError

    with pytest.raises(ContextOverflowError):
        chat_openai(server, max_tokens=9999).invoke("hi")
