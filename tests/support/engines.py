"""Engines over the fake runner, with defaults that tests override."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.api.sampling import SamplingParams
from quire.config.engine import EngineConfig
from quire.engine.engine import Engine
from quire.engine.models.config import ModelConfig, RopeConfig
from quire.engine.request import EngineRequest
from quire.engine.runner.backend import StepLimits
from quire.engine.runner.fake import FakeRunner, expected_token
from quire.engine.runner.load import LoadedModel

if TYPE_CHECKING:
    from quire.engine.output import ChoiceOutput

EOS = 0


def model_config(vocab_size: int) -> ModelConfig:
    return ModelConfig(
        architecture="FakeForCausalLM",
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        norm_eps=1e-6,
        rope=RopeConfig(theta=1e4, rotary_dim=8),
        max_position=4096,
        dtype="float32",
        tie_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        qk_norm=False,
        windows=(None,),
        eos_token_ids=(EOS,),
        bos_token_id=None,
    )


def make_engine(
    num_blocks: int = 64, vocab_size: int = 50, max_model_len: int = 256, **options: Any
) -> Engine:
    config = EngineConfig(
        **{"max_num_seqs": 8, "max_num_batched_tokens": 64, "watermark": 0.0} | options
    )
    limits = StepLimits(
        max_tokens=config.max_num_batched_tokens,
        max_seqs=config.max_num_seqs,
        max_blocks_per_seq=-(-max_model_len // 16),
        max_logit_rows=config.max_num_seqs + 8,
    )
    loaded = LoadedModel(
        config=model_config(vocab_size),
        runner=FakeRunner(num_blocks, vocab_size, limits),  # type: ignore[arg-type]
        folder=Path(),
        fingerprint=b"fake",
        max_model_len=max_model_len,
        dtype="float32",
        device="cpu",
        numerics="fake",
        async_scheduling=bool(config.async_scheduling),
    )
    return Engine(config, loaded)


def make_request(
    request_id: str,
    prompt: list[int],
    seed: int = 7,
    extra: dict[str, Any] | None = None,
    **params: Any,
) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=SamplingParams(**params),
        seed=seed,
        **(extra or {}),
    )


def expected_output(engine: Engine, request: EngineRequest, choice: int) -> list[int]:
    """What the choice must be, whatever else went on in the engine."""
    params, vocab_size = request.params, engine.model.config.vocab_size
    context = list(request.prompt_token_ids)
    limit = min(params.max_tokens or 10**9, engine.model.max_model_len - len(context))
    output: list[int] = []
    stops = {EOS, *params.stop_token_ids} if not params.ignore_eos else set(params.stop_token_ids)
    while len(output) < limit:
        token = expected_token(context, (request.seed, choice), vocab_size)
        output.append(token)
        context.append(token)
        if token in stops and len(output) > params.min_tokens:
            break
    return output


class Collector:
    """Gathers outputs, checking that no token is missing, repeated or out of place."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ended: dict[tuple[str, int], str] = {}

    def take(self, outputs: list[ChoiceOutput]) -> None:
        for output in outputs:
            key = (output.request_id, output.choice)
            tokens = self.tokens.setdefault(key, [])
            assert key not in self.ended, "a choice went on after its end"
            assert output.position == len(tokens), "a token is missing or repeated"
            tokens.extend(output.token_ids)
            if output.finish_reason is not None:
                self.ended[key] = output.finish_reason.value


def run(engine: Engine, collector: Collector | None = None, max_steps: int = 10_000) -> Collector:
    """Step until idle, checking the pool after every step."""
    collector = collector or Collector()
    for _ in range(max_steps):
        if not engine.has_work:
            break
        collector.take(engine.step())
        engine.pool.check_integrity()
    assert not engine.has_work, "the engine did not come to an end"
    return collector


def assert_nothing_held(engine: Engine) -> None:
    counts = engine.pool.counts()
    assert counts.owned == 0
    assert counts.promised == 0
    scheduler = engine.scheduler
    assert scheduler.waiting.num_tokens == 0
    assert scheduler.running.reserved_seats == 0
    assert sorted(scheduler.running.seats.free) == list(range(engine.config.max_num_seqs))
    assert not scheduler.request_ids
