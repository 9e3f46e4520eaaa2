"""The scenarios for people who use Locust: its web page, its distributed workers, its statistics.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --users 20 --spawn-rate 5

QUIRE_SCENARIO names a scenario (chat by default), QUIRE_LOCUST_MODEL the model. Each user plays the
scenario's sessions one after the other: a closed loop, so its latencies are kinder than those of
`python -m loadtest`, whose sessions start whatever became of earlier ones. Statistics: TTFT and ITL
as requests of their own, beside Locust's own entry for the whole answer.

Needs Locust and PyYAML in an environment of its own, with the repository's root and `services` on
PYTHONPATH; nothing of the engine is imported.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from locust import HttpUser, between, events, task

from loadtest.scenario import load_scenario
from loadtest.workload import sessions

SCENARIO = load_scenario(os.environ.get("QUIRE_SCENARIO", "chat"))
VOCAB_SIZE = 5000
TIMEOUT_S = 600
PATH = "/v1/chat/completions"


class Visitor(HttpUser):
    """Somebody with one session after the other."""

    wait_time = between(0.1, 1.0)

    def on_start(self) -> None:
        """Find the model and a seed of one's own."""
        self.model = os.environ.get("QUIRE_LOCUST_MODEL") or self._first_model()
        self._sessions = sessions(SCENARIO, id(self), VOCAB_SIZE)

    @task
    def session(self) -> None:
        """One session, turn by turn."""
        session = next(self._sessions)
        answers: list[str] = []
        for turn in session.turns:
            time.sleep(turn.pause_s)  # Locust has made it a wait of this user alone
            body = {
                "model": self.model,
                "messages": session.prompt(answers, is_chat=True),
                "max_tokens": turn.output_len,
                "stream": True,
            }
            answers.append(self._stream(body, session.request_class))

    def _first_model(self) -> str:
        answer = self.client.get("/v1/models", timeout=TIMEOUT_S)
        return str(answer.json()["data"][0]["id"])

    def _stream(self, body: dict[str, Any], name: str) -> str:
        sent = last = time.perf_counter()
        parts: list[str] = []
        with self.client.post(
            PATH, json=body, stream=True, name=name, catch_response=True, timeout=TIMEOUT_S
        ) as answer:
            if answer.status_code != 200:
                answer.failure(f"HTTP {answer.status_code}: {answer.text[:200]}")
                return ""
            for line in answer.iter_lines():
                text = _text(line)
                if text:
                    now = time.perf_counter()
                    _note("ITL" if parts else "TTFT", name, now - (last if parts else sent))
                    parts.append(text)
                    last = now
        return "".join(parts)


def _text(line: bytes) -> str:
    """Text of an event's line; empty for others."""
    if not line.startswith(b"data:") or line.endswith(b"[DONE]"):
        return ""
    choices = json.loads(line[5:]).get("choices") or [{}]
    return str(choices[0].get("delta", {}).get("content") or "")


def _note(kind: str, name: str, seconds: float) -> None:
    events.request.fire(
        request_type=kind, name=name, response_time=1e3 * seconds, response_length=0,
        exception=None, context={},
    )  # fmt: skip
