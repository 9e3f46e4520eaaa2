"""`helm test`: a streamed chat completion through the gateway; with prefill pods, KV blocks moved."""

import json
import os
import re
import sys
import urllib.request

URL = os.environ["GATEWAY_URL"]
HEADERS = {"Content-Type": "application/json"}
if os.environ.get("API_KEY"):
    HEADERS["Authorization"] = "Bearer " + os.environ["API_KEY"]
# longer than the prompts that are not worth moving
PROMPT = "Write a function that returns the sum of a list of numbers. " * 40
TIMEOUT_S = 120


def call(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, data, HEADERS)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return answer.read().decode()


def transferred():
    """Prompt tokens whose keys and values came from another pod."""
    pattern = r'^quire_prompt_tokens_by_source_total\{.*"external_kv_transfer".*\} (\S+)$'
    return sum(float(value) for value in re.findall(pattern, call("/metrics"), re.M))


before = transferred()
body = {
    "model": os.environ["MODEL"],
    "messages": [{"role": "user", "content": PROMPT}],
    "max_tokens": 16,
    "stream": True,
}
events = [line[6:] for line in call("/v1/chat/completions", body).splitlines() if line[:6] == "data: "]
chunks = [json.loads(event) for event in events if event != "[DONE]"]
choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
text = "".join(choice["delta"].get("content") or "" for choice in choices)
finished = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
print("answer:", repr(text))
if events[-1] != "[DONE]" or not text or not finished:
    sys.exit("the stream is not complete: " + repr(events[-3:]))
if os.environ.get("DISAGGREGATED") == "true":
    moved = transferred() - before
    print("prompt tokens moved between pods:", int(moved))
    if not moved:
        sys.exit("the prompt was not computed by a prefill pod")
