"""`helm test`: a streamed chat completion through the gateway."""

import json
import os
import sys
import urllib.request

HEADERS = {"Content-Type": "application/json"}
if os.environ.get("API_KEY"):
    HEADERS["Authorization"] = "Bearer " + os.environ["API_KEY"]
BODY = {
    "model": os.environ["MODEL"],
    "messages": [{"role": "user", "content": "Write a function that returns the sum of a list"}],
    "max_tokens": 16,
    "stream": True,
}
TIMEOUT_S = 120

url = os.environ["GATEWAY_URL"] + "/v1/chat/completions"
request = urllib.request.Request(url, json.dumps(BODY).encode(), HEADERS)
with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
    lines = answer.read().decode().splitlines()
events = [line[6:] for line in lines if line.startswith("data: ")]
chunks = [json.loads(event) for event in events if event != "[DONE]"]
choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
text = "".join(choice["delta"].get("content") or "" for choice in choices)
finished = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
print("answer:", repr(text))
if events[-1:] != ["[DONE]"] or not text or not finished:
    sys.exit("the stream is not complete: " + repr(events[-3:]))
