"""What the engine did: tokens, and requests, which are observed when they finish."""

from __future__ import annotations

from quire.telemetry.instruments import CounterDeclaration, HistogramDeclaration
from quire.telemetry.metrics.buckets import (
    CHOICE_BUCKETS,
    FIRST_TOKEN_BUCKETS,
    LATENCY_BUCKETS,
    TOKEN_COUNT_BUCKETS,
    TOKEN_LATENCY_BUCKETS,
)

# ---- Tokens

PROMPT_TOKENS = CounterDeclaration(
    name="quire_prompt_tokens", unit="tokens", component="engine",
    help="Prompt tokens of requests whose prompt is done, cached ones included.",
    aliases=("vllm:prompt_tokens",),
)  # fmt: skip
PROMPT_TOKENS_BY_SOURCE = CounterDeclaration(
    name="quire_prompt_tokens_by_source", unit="tokens", component="engine",
    help="Prompt tokens by where their keys and values came from.",
    labels=("source",), values=(("local_compute", "local_cache_hit", "external_kv_transfer"),),
    aliases=("vllm:prompt_tokens_by_source",),
)  # fmt: skip
GENERATION_TOKENS = CounterDeclaration(
    name="quire_generation_tokens", unit="tokens", component="engine",
    help="Tokens generated.",
    aliases=("vllm:generation_tokens",),
)  # fmt: skip
PREFIX_CACHE_QUERIES = CounterDeclaration(
    name="quire_prefix_cache_queries", unit="tokens", component="engine",
    help="Prompt tokens looked up in the prefix cache.",
    aliases=("vllm:prefix_cache_queries",),
)  # fmt: skip
PREFIX_CACHE_HITS = CounterDeclaration(
    name="quire_prefix_cache_hits", unit="tokens", component="engine",
    help="Prompt tokens found in the prefix cache.",
    aliases=("vllm:prefix_cache_hits", "vllm:prompt_tokens_cached"),
)  # fmt: skip

# ---- Requests, observed when they finish

REQUESTS_FINISHED = CounterDeclaration(
    name="quire_requests_finished", unit="requests", component="engine",
    help="Finished requests by reason.",
    labels=("finished_reason",), values=(("stop", "length", "abort", "error"),),
    aliases=("vllm:request_success",),
)  # fmt: skip
ADMISSION_REJECTIONS = CounterDeclaration(
    name="quire_admission_rejections", unit="requests", component="engine",
    help="Requests refused before any work was done on them.",
    labels=("reason",),
    values=(("queue_requests", "queue_tokens", "deadline", "not_ready", "invalid"),),
    aliases=("vllm:admission_rejections",),
)  # fmt: skip
TIME_TO_FIRST_TOKEN = HistogramDeclaration(
    name="quire_time_to_first_token_seconds", unit="seconds", component="engine",
    help="Received to first token.", buckets=FIRST_TOKEN_BUCKETS,
    aliases=("vllm:time_to_first_token_seconds",),
)  # fmt: skip
INTER_TOKEN_LATENCY = HistogramDeclaration(
    name="quire_inter_token_latency_seconds", unit="seconds", component="engine",
    help="Time between two tokens of a sequence.", buckets=TOKEN_LATENCY_BUCKETS,
    aliases=("vllm:inter_token_latency_seconds",),
)  # fmt: skip
TIME_PER_OUTPUT_TOKEN = HistogramDeclaration(
    name="quire_time_per_output_token_seconds", unit="seconds", component="engine",
    help="Mean time per token of a request, the first excluded.", buckets=TOKEN_LATENCY_BUCKETS,
    aliases=("vllm:request_time_per_output_token_seconds",),
)  # fmt: skip
REQUEST_LATENCY = HistogramDeclaration(
    name="quire_request_latency_seconds", unit="seconds", component="engine",
    help="Received to last token.", buckets=LATENCY_BUCKETS,
    aliases=("vllm:e2e_request_latency_seconds",),
)  # fmt: skip
REQUEST_QUEUE_TIME = HistogramDeclaration(
    name="quire_request_queue_time_seconds", unit="seconds", component="engine",
    help="Received to first scheduled.", buckets=LATENCY_BUCKETS,
    aliases=("vllm:request_queue_time_seconds",),
)  # fmt: skip
REQUEST_PREFILL_TIME = HistogramDeclaration(
    name="quire_request_prefill_time_seconds", unit="seconds", component="engine",
    help="First scheduled to first token.", buckets=LATENCY_BUCKETS,
    aliases=("vllm:request_prefill_time_seconds",),
)  # fmt: skip
REQUEST_DECODE_TIME = HistogramDeclaration(
    name="quire_request_decode_time_seconds", unit="seconds", component="engine",
    help="First token to last token.", buckets=LATENCY_BUCKETS,
    aliases=("vllm:request_decode_time_seconds",),
)  # fmt: skip
REQUEST_INFERENCE_TIME = HistogramDeclaration(
    name="quire_request_inference_time_seconds", unit="seconds", component="engine",
    help="First scheduled to last token.", buckets=LATENCY_BUCKETS,
    aliases=("vllm:request_inference_time_seconds",),
)  # fmt: skip
REQUEST_PROMPT_TOKENS = HistogramDeclaration(
    name="quire_request_prompt_tokens", unit="tokens", component="engine",
    help="Prompt length of a request.", buckets=TOKEN_COUNT_BUCKETS,
    aliases=("vllm:request_prompt_tokens",),
)  # fmt: skip
REQUEST_COMPUTED_TOKENS = HistogramDeclaration(
    name="quire_request_computed_prompt_tokens", unit="tokens", component="engine",
    help="Prompt tokens of a request that were computed, not found in a cache.",
    buckets=TOKEN_COUNT_BUCKETS,
    aliases=("vllm:request_prefill_kv_computed_tokens",),
)  # fmt: skip
REQUEST_GENERATION_TOKENS = HistogramDeclaration(
    name="quire_request_generation_tokens", unit="tokens", component="engine",
    help="Tokens generated for a request, all choices together.", buckets=TOKEN_COUNT_BUCKETS,
    aliases=("vllm:request_generation_tokens",),
)  # fmt: skip
REQUEST_PARAMS_N = HistogramDeclaration(
    name="quire_request_params_n", unit="choices", component="engine",
    help="Choices that a request asked for.", buckets=CHOICE_BUCKETS,
    aliases=("vllm:request_params_n",),
)  # fmt: skip
REQUEST_PARAMS_MAX_TOKENS = HistogramDeclaration(
    name="quire_request_params_max_tokens", unit="tokens", component="engine",
    help="Output limit that a request asked for.", buckets=TOKEN_COUNT_BUCKETS,
    aliases=("vllm:request_params_max_tokens",),
)  # fmt: skip
