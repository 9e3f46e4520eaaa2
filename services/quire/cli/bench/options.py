"""Options of the benchmarks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quire.config.base import check_fields
from quire.config.option import option
from quire.config.values import parse_float

DATASETS = ("random", "prefix_repetition", "sharegpt", "mooncake")


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Which requests are sent. Lengths are in tokens."""

    dataset_name: str = option("random", "dataset", choices=DATASETS)
    """random; prefix_repetition (prompts that share prefixes); sharegpt (a JSON file of
    conversations); mooncake (a trace: timestamp, input_length, output_length, hash_ids)."""
    dataset_path: str | None = option(None, "dataset")
    """File of the sharegpt or mooncake dataset."""
    num_prompts: int = option(100, "dataset")
    """Requests in total."""
    seed: int = option(0, "dataset")
    """Seed of prompts, lengths and arrivals."""
    random_input_len: int = option(256, "dataset", aliases=("input_len",))
    """Prompt length of the random dataset."""
    random_output_len: int = option(128, "dataset", aliases=("output_len",))
    """Output length of the random dataset."""
    random_range_ratio: float = option(0.0, "dataset")
    """Lengths vary evenly by this share up and down, 0 to below 1."""
    random_prefix_len: int = option(0, "dataset")
    """Tokens shared by all prompts of the random dataset, on top of the input length."""
    prefix_repetition_num_prefixes: int = option(10, "dataset")
    """Different prefixes of the prefix_repetition dataset."""
    prefix_repetition_prefix_len: int = option(256, "dataset")
    """Length of each shared prefix."""
    prefix_repetition_suffix_len: int = option(32, "dataset")
    """Length of each prompt's own part."""
    prefix_repetition_output_len: int = option(64, "dataset")
    """Output length of the prefix_repetition dataset."""
    sharegpt_output_len: int | None = option(None, "dataset")
    """Output length of the sharegpt dataset; estimated from the recorded answer by default."""
    max_input_len: int | None = option(None, "dataset")
    """Longer prompts of a trace are cut to this length."""
    max_output_len: int | None = option(None, "dataset")
    """Longer outputs of a trace or of conversations are cut to this length."""
    vocab_size: int = option(5000, "dataset")
    """Made-up prompts draw their tokens from 10 up to this number, exclusive."""
    ignore_eos: bool = option(True, "dataset")
    """Generate exactly the output length, whatever the model says."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dataset_name in ("sharegpt", "mooncake") and self.dataset_path is None:
            raise ValueError(f"dataset {self.dataset_name} is read from a file: give dataset_path")
        if not 0 <= self.random_range_ratio < 1:
            raise ValueError(f"random_range_ratio must be in [0, 1), not {self.random_range_ratio}")
        if self.vocab_size <= 10:
            raise ValueError(f"vocab_size must be above 10, not {self.vocab_size}")
        for name in (
            "num_prompts", "random_input_len", "random_output_len",
            "prefix_repetition_num_prefixes",
            "prefix_repetition_suffix_len", "prefix_repetition_output_len",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ResultConfig:
    """Where results go, beside the terminal."""

    output_json: str | None = option(None, "results")
    """File for the results as JSON."""
    disable_tqdm: bool = option(False, "results")
    """No progress bar."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """How the throughput of an engine is measured."""

    backend: str = option("quire", "measurement", choices=("quire", "transformers"))
    """quire; transformers runs Hugging Face's padded and continuous batching beside it."""
    num_repeats: int = option(1, "measurement")
    """Runs of the same requests; the median is shown."""
    hf_max_batch_size: int = option(8, "measurement")
    """Batch size of padded generation with transformers."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_repeats < 1:
            raise ValueError(f"num_repeats must be at least 1, not {self.num_repeats}")


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """How the latency of a batch is measured. Lengths are in tokens."""

    input_len: int = option(32, "measurement")
    """Prompt length."""
    output_len: int = option(128, "measurement")
    """Output length."""
    batch_size: tuple[int, ...] = option((1, 8), "measurement")
    """Requests at once; several may be given."""
    num_iters_warmup: int = option(2, "measurement")
    """Runs that do not count."""
    num_iters: int = option(10, "measurement")
    """Runs that count, for each batch size."""
    vocab_size: int = option(5000, "measurement")
    """Prompts draw their tokens from 10 up to this number, exclusive."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("input_len", "output_len", "num_iters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.batch_size or min(self.batch_size) < 1:
            raise ValueError("batch_size must name sizes of at least 1")


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How the phases of a step are measured. Lengths are in tokens."""

    batch_size: tuple[int, ...] = option((1, 8, 32), "measurement")
    """Sequences in a step; several may be given."""
    input_len: int = option(128, "measurement")
    """Prompt length of each."""
    output_len: int = option(64, "measurement")
    """Steps of each batch, about."""
    prefill_len: tuple[int, ...] = option((128, 256, 512, 1024, 2048), "measurement")
    """Prompts computed alone; those beyond the model's length are left out."""
    temperature: float = option(0.0, "measurement")
    """Sampling temperature."""
    vocab_size: int = option(5000, "measurement")
    """Prompts draw their tokens from 10 up to this number, exclusive."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.batch_size or min(self.batch_size) < 1:
            raise ValueError("batch_size must name sizes of at least 1")
        for name in ("input_len", "output_len"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class StartupConfig:
    """How the start of a server is measured."""

    model: str = option("demo", "measurement")
    """Model to serve."""
    num_iters: int = option(3, "measurement")
    """Starts, one after the other."""
    serve_args: str = option("", "measurement")
    """Further options of `quire serve`, as one text."""
    timeout_sec: float = option(600.0, "measurement")
    """Seconds that one start may take."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_iters < 1:
            raise ValueError(f"num_iters must be at least 1, not {self.num_iters}")


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Which server is loaded, and what each request asks of it."""

    base_url: str | None = option(None, "server")
    """URL of the server, without /v1."""
    host: str = option("127.0.0.1", "server")
    """Host of the server, when base_url is not given."""
    port: int = option(8000, "server")
    """Port of the server, when base_url is not given."""
    backend: str = option("openai", "server", choices=("openai", "openai-chat", "vllm", "quire"))
    """openai sends prompts to /v1/completions, openai-chat to /v1/chat/completions."""
    endpoint: str | None = option(None, "server")
    """Path of the API, when it is not the backend's usual one."""
    model: str | None = option(None, "server")
    """Model to ask for; the first that the server lists by default."""
    api_key: str | None = option(None, "server", secret=True)
    """Bearer token; the variable OPENAI_API_KEY by default."""
    ready_check_timeout_sec: float = option(60.0, "server")
    """Seconds to wait for the server before starting."""
    request_timeout_sec: float = option(600.0, "server")
    """Seconds after which a request counts as failed."""
    temperature: float = option(0.0, "server")
    """Sampling temperature."""
    extra_body: str | None = option(None, "server")
    """JSON object of further fields for each request."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def url(self) -> str:
        """Base URL without a slash at its end, and without /v1."""
        url = (self.base_url or f"http://{self.host}:{self.port}").rstrip("/")
        return url.removesuffix("/v1")

    @property
    def is_chat(self) -> bool:
        """Prompts travel as messages."""
        return self.backend == "openai-chat"


@dataclass(frozen=True, kw_only=True)
class LoadConfig(TargetConfig):
    """Which server is loaded, how hard, and what is reported."""

    request_rate: str = option("inf", "load")
    """Requests per second; inf sends all at once. With a trace, its own times are used."""
    burstiness: float = option(1.0, "load")
    """Shape of the gaps between requests: 1 is a Poisson process, below 1 is burstier."""
    max_concurrency: int | None = option(None, "load")
    """Most requests in progress; later ones wait at the client, and that is not latency."""
    num_warmups: int = option(1, "load")
    """Requests before the measurement."""
    trace_speedup: float = option(1.0, "load")
    """Replay a trace this many times faster."""
    goodput: tuple[str, ...] = option((), "results")
    """Objectives such as ttft:500 tpot:50 itl:80 e2el:5000, in ms; requests within all of them
    are goodput. itl is held against the 99th percentile of a request's own."""
    save_result: bool = option(False, "results")
    """Write the results as JSON."""
    save_detailed: bool = option(False, "results")
    """Also write the lengths, latencies and errors of each request."""
    result_dir: str = option(".", "results")
    """Folder of the results."""
    result_filename: str | None = option(None, "results")
    """Name of the file; made from rate, model and time by default."""
    label: str | None = option(None, "results")
    """Name of this run, kept in the results."""
    disable_tqdm: bool = option(False, "results")
    """No progress bar."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate <= 0 or self.burstiness <= 0 or self.trace_speedup <= 0:
            raise ValueError("request_rate, burstiness and trace_speedup must be above 0")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ValueError(f"max_concurrency must be at least 1, not {self.max_concurrency}")

    @property
    def rate(self) -> float:
        """Requests per second, maybe infinite. Raises ValueError."""
        if self.request_rate.strip().lower() in ("inf", "infinity"):
            return math.inf
        try:
            return parse_float(self.request_rate)
        except ValueError as error:
            raise ValueError(f"request_rate: {error}, or inf") from None
