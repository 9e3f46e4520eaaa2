"""What an engine's script and the comparison say to each other. Standard library only.

A line of JSON in: {"prompts": [[id, ...]], "output_lens": [n, ...], "tokens": bool}; a line out:
{"seconds": s, "output_tokens": n, "token_ids": [[...]] or null}. The first line out says that the
engine is loaded: {"ready": "what it is"}. Answers have a pipe of their own, since engines print.
"""

import json
import os
import sys
import time

WARM_UP = [[11 + i for i in range(64)], [5000 - i for i in range(48)]]


def serve(name, generate):
    """Answer until the input ends. `generate(prompts, output_lens) -> token ids of each`."""
    answers = os.fdopen(int(os.environ["COMPARE_ANSWERS"]), "w")

    def say(message):
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    generate(WARM_UP, [8, 8])
    say({"ready": name})
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        tokens = generate(asked["prompts"], asked["output_lens"])
        seconds = time.perf_counter() - began
        short = [len(t) for t in tokens] != asked["output_lens"] and not asked.get("uneven")
        say(
            {
                "error": "an output has another length than asked for" if short else None,
                "seconds": seconds,
                "output_tokens": sum(map(len, tokens)),
                "token_ids": tokens if asked["tokens"] else None,
            }
        )
