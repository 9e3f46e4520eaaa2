"""`python -m loadtest SCENARIO`: run a scenario against an OpenAI-compatible server."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadtest.figures import samples, series, window_figures
from loadtest.runner import Driver
from loadtest.scenario import Scenario, load_scenario, scenario_names
from quire.cli.bench.options import DatasetConfig, TargetConfig
from quire.cli.bench.report import table
from quire.cli.bench.target import NotReadyError, open_target
from quire.config.base import check_fields
from quire.config.flags import Command, UsageError, parse
from quire.config.option import option
from quire.config.values import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class ScenarioConfig:
    """Which scenario is run, what of it is changed, and where results go."""

    scenario: str = option("chat", "scenario")
    """Name of a file in loadtest/scenarios, or a YAML file of your own."""
    request_rate: tuple[float, ...] = option((), "scenario")
    """Sessions per second instead of the scenario's own; several are run one after the other."""
    burstiness: float | None = option(None, "scenario")
    """Shape of the gaps of the gamma process."""
    max_concurrency: int | None = option(None, "scenario")
    """Sessions at once."""
    dataset_path: str | None = option(None, "scenario")
    """Trace to replay."""
    trace_speedup: float | None = option(None, "scenario")
    """Replay a trace this many times faster."""
    warm_up: float | None = option(None, "scenario")
    """Seconds before the window."""
    window: float | None = option(None, "scenario")
    """Seconds that are measured."""
    cool_down: float | None = option(None, "scenario")
    """Seconds of load behind the window."""
    goodput: tuple[str, ...] = option((), "scenario")
    """Objectives instead of the scenario's own: ttft:500 itl:80 e2el:5000, in ms."""
    seed: int = option(0, "scenario")
    """Seed of everything that is drawn."""
    vocab_size: int = option(5000, "scenario")
    """Prompts draw their tokens from 10 up to this number, exclusive."""
    max_input_len: int | None = option(None, "scenario")
    """Longer prompts of a trace are cut."""
    max_output_len: int | None = option(None, "scenario")
    """Longer outputs of a trace are cut."""
    ignore_eos: bool = option(True, "scenario")
    """Generate exactly the output length. Off for servers that do not know the field."""
    label: str | None = option(None, "results")
    """Name of this run."""
    result_dir: str | None = option(None, "results")
    """Folder for SCENARIO-RATE.json and .png; nothing is written without it."""

    def __post_init__(self) -> None:
        check_fields(self)

    def build(self) -> Scenario:
        """The scenario with what was changed. Raises ConfigError."""
        base = load_scenario(self.scenario)
        base = base.with_arrivals(
            burstiness=self.burstiness,
            max_concurrency=self.max_concurrency,
            dataset_path=self.dataset_path,
            trace_speedup=self.trace_speedup,
        )
        return replace(
            base,
            warm_up_s=base.warm_up_s if self.warm_up is None else self.warm_up,
            window_s=base.window_s if self.window is None else self.window,
            cool_down_s=base.cool_down_s if self.cool_down is None else self.cool_down,
            goodput=self.goodput or base.goodput,
        )

    def dataset(self, scenario: Scenario) -> DatasetConfig:
        """What the prompts are made of."""
        is_trace = scenario.arrivals.process == "trace"
        return DatasetConfig(
            dataset_name="mooncake" if is_trace else "random",
            dataset_path=scenario.arrivals.dataset_path if is_trace else None,
            seed=self.seed,
            vocab_size=self.vocab_size,
            max_input_len=self.max_input_len,
            max_output_len=self.max_output_len,
            ignore_eos=self.ignore_eos,
        )


COMMAND = Command(
    prog="python -m loadtest",
    summary=f"Run a scenario against a server. Scenarios: {', '.join(scenario_names())}.",
    owners=(ScenarioConfig, TargetConfig),
    positional="scenario",
)


async def measure(config: ScenarioConfig, target_config: TargetConfig) -> list[dict[str, Any]]:
    """One result per rate. Raises ConfigError, NotReadyError."""
    scenario = config.build()
    dataset = config.dataset(scenario)
    results = []
    async with open_target(target_config) as target:
        await target.warm_up(target.body("hello", 2, config.ignore_eos), 1)
        for rate in config.request_rate or (scenario.arrivals.request_rate,):
            loaded = scenario.with_arrivals(request_rate=rate)
            run = await Driver(target, loaded, dataset).run()
            results.append(
                {
                    "scenario": loaded.name,
                    "date": datetime.now().astimezone().isoformat(timespec="seconds"),
                    "label": config.label,
                    "model_id": target.model,
                    "backend": target_config.backend,
                    "seed": config.seed,
                    "process": loaded.arrivals.process,
                    "request_rate": rate,
                    "max_concurrency": loaded.arrivals.max_concurrency,
                    "warm_up_s": loaded.warm_up_s,
                    "window_s": loaded.window_s,
                    **window_figures(run, loaded),
                    "series": series(run),
                    "samples": samples(run, loaded),
                }
            )
    return results


def main(argv: Sequence[str]) -> int:
    """Run, print, write; returns the exit code."""
    resolved = parse(COMMAND, argv, os.environ)
    config = resolved.get(ScenarioConfig)
    import uvloop

    try:
        results = uvloop.run(measure(config, resolved.get(TargetConfig)))
    except ConfigError as error:
        raise UsageError(COMMAND.prog, str(error)) from None
    except NotReadyError as error:
        print(f"{COMMAND.prog}: error: {error}", file=sys.stderr)
        return 1
    for result in results:
        print(table(result))
        if result["goodput_share"] is not None:
            objectives = " ".join(result["goodput"])
            print(f"within {objectives}: {100 * result['goodput_share']:.1f} % of the requests")
        for reason, count in result["errors"].items():
            print(f"failed {count} times: {reason}", file=sys.stderr)
    if config.result_dir is not None:
        _write(results, Path(config.result_dir), config.label)
    return 0 if all(r["completed"] for r in results) else 1


def _write(results: list[dict[str, Any]], folder: Path, label: str | None) -> None:
    from loadtest.plots import plot_rates, plot_run

    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        load = result["request_rate"]
        if result["process"] == "closed":
            load = result["max_concurrency"]
        name = "-".join(filter(None, (label, result["scenario"], f"{load:g}")))
        (folder / f"{name}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
        plot_run(result, folder / f"{name}.png")
    if len(results) > 1:
        name = "-".join(filter(None, (label, results[0]["scenario"], "rates")))
        plot_rates(results, folder / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
