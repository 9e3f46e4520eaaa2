"""The tiny checkpoints in shapes that 2 and 4 ranks can share: 8 heads over 8, 4, 2 or 1 KV."""

from __future__ import annotations

from dataclasses import replace

from tiny_models import BASE, TINY, Tiny

KV_HEADS = {3: 4, 6: 8}


def _shared(tiny: Tiny) -> Tiny:
    config = BASE | tiny.config
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    changes = {
        "num_attention_heads": 8 if heads == 6 else heads,
        "num_key_value_heads": KV_HEADS.get(kv_heads, kv_heads),
    }
    return replace(tiny, config=tiny.config | changes)


SHARED = [_shared(tiny) for tiny in TINY]
