"""The engine: what it holds now, its steps and ranks, sequences that move."""

from __future__ import annotations

from quire.telemetry.instruments import (
    CounterDeclaration,
    GaugeDeclaration,
    HistogramDeclaration,
    InfoDeclaration,
)
from quire.telemetry.metrics.buckets import STEP_BUCKETS, STEP_TOKEN_BUCKETS

# ---- What it holds now

REQUESTS_RUNNING = GaugeDeclaration(
    name="quire_requests_running", unit="requests", component="engine",
    help="Requests in the running batch.",
    aliases=("vllm:num_requests_running",),
)  # fmt: skip
REQUESTS_WAITING = GaugeDeclaration(
    name="quire_requests_waiting", unit="requests", component="engine",
    help="Requests admitted to the queue and not yet running.",
    aliases=("vllm:num_requests_waiting",),
)  # fmt: skip
QUEUED_TOKENS = GaugeDeclaration(
    name="quire_queued_tokens", unit="tokens", component="engine",
    help="Prompt tokens of the waiting requests.",
)  # fmt: skip
KV_CACHE_USAGE = GaugeDeclaration(
    name="quire_kv_cache_usage_ratio", unit="ratio", component="engine",
    help="Share of KV blocks that a request owns, 0 to 1.",
    aliases=("vllm:kv_cache_usage_perc",),
)  # fmt: skip
KV_BLOCKS = GaugeDeclaration(
    name="quire_kv_blocks", unit="blocks", component="engine",
    help="KV blocks by state; the states sum to the pool.",
    labels=("state",), values=(("free", "cached", "owned"),),
)  # fmt: skip
KV_PROMISED_BLOCKS = GaugeDeclaration(
    name="quire_kv_promised_blocks", unit="blocks", component="engine",
    help="Free or cached KV blocks that admitted prompts will still need.",
)  # fmt: skip
CACHE_CONFIG = InfoDeclaration(
    name="quire_cache_config_info", component="engine",
    help="Shape of the KV cache.",
    labels=("block_size", "num_blocks", "block_bytes", "enable_prefix_caching"),
    aliases=("vllm:cache_config_info",), alias_labels=(("num_blocks", "num_gpu_blocks"),),
)  # fmt: skip
MODEL_INFO = InfoDeclaration(
    name="quire_model_info", component="engine",
    help="The loaded model.",
    labels=("model", "architecture", "dtype", "device", "max_model_len"),
)  # fmt: skip
STARTUP_SECONDS = GaugeDeclaration(
    name="quire_startup_seconds", unit="seconds", component="engine",
    help="Time that each start-up phase took.",
    labels=("phase",),
)  # fmt: skip

# ---- Steps

STEPS = CounterDeclaration(
    name="quire_steps", unit="steps", component="engine",
    help="Finished steps.",
)  # fmt: skip
STEP_DURATION = HistogramDeclaration(
    name="quire_step_duration_seconds", unit="seconds", component="engine",
    help="Time of a step, scheduling and sampling included.", buckets=STEP_BUCKETS,
)  # fmt: skip
STEP_TOKENS = HistogramDeclaration(
    name="quire_step_tokens", unit="tokens", component="engine",
    help="Tokens computed in a step, prompt and output together.", buckets=STEP_TOKEN_BUCKETS,
    aliases=("vllm:iteration_tokens_total",),
)  # fmt: skip
STEP_AGE = GaugeDeclaration(
    name="quire_step_age_seconds", unit="seconds", component="engine",
    help="Time without progress while work is pending, else 0.",
)  # fmt: skip
RANK_STEPS = CounterDeclaration(
    name="quire_rank_steps", unit="steps", component="engine",
    help="Engine steps that a rank beyond the first has executed.", labels=("rank",),
)  # fmt: skip
RANK_SILENCE = GaugeDeclaration(
    name="quire_rank_silence_seconds", unit="seconds", component="engine",
    help="Since a rank beyond the first gave a sign of life; after 5 s it counts as lost, and the "
    "engine with it.",
    labels=("rank",),
)  # fmt: skip
RANK_MEMORY = GaugeDeclaration(
    name="quire_rank_memory_bytes", unit="bytes", component="engine",
    help="Memory of a rank beyond the first: `host` is what its process has resident, `device` "
    "what it has reserved of its GPU.",
    labels=("rank", "of"),
)  # fmt: skip
PREEMPTIONS = CounterDeclaration(
    name="quire_preemptions", unit="requests", component="engine",
    help="Running requests sent back to the queue for want of KV blocks.",
    aliases=("vllm:num_preemptions",),
)  # fmt: skip
MIGRATED_SEQUENCES = CounterDeclaration(
    name="quire_migrated_sequences", unit="sequences", component="engine",
    help="Sequences taken over from a draining worker: with blocks of it, or computed again.",
    labels=("how",), values=(("kv", "recompute"),),
)  # fmt: skip
MIGRATED_BLOCKS = CounterDeclaration(
    name="quire_migrated_blocks", unit="blocks", component="engine",
    help="KV blocks that came with such sequences.",
)  # fmt: skip
