"""Train the demo model: `python -m quire.demo.train --out DIR [--minutes N | --steps N]`.

The life of a run: read the library and split it (`corpus.py`), make conversations from it
(`chat.py`), train the tokenizer (`tokens.py`), write both as one stream of token ids and step
through windows of it (`data.py`). Short windows come first and long ones last, the learning rate
follows the progress of the run, and every few minutes the state is saved under `--state` (from
where the same command goes on after an interruption) and the model exported to `--out`.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from quire.demo.data import Data, WindowSampler, prepare_data
from quire.demo.evaluate import held_out_loss
from quire.demo.export import export, write_atomically
from quire.demo.network import Llama, LlamaShape
from quire.demo.tokens import BOS, special_id

logger = logging.getLogger("quire.demo.train")

LossFunction = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True, slots=True)
class Recipe:
    """The constants of the training run."""

    seed: int = 0
    tokens_per_step: int = 8192
    short_window: int = 512
    long_window: int = 2048
    long_from: float = 0.8  # progress at which the windows become long
    peak_lr: float = 3e-3
    warmup_until: float = 0.02  # progress
    decay_from: float = 0.35  # progress; linear to zero at the end
    weight_decay: float = 0.1
    z_weight: float = 1e-4
    max_grad_norm: float = 1.0


@dataclass(slots=True)
class Progress:
    """How far the run is; saved with the state."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Budget:
    """When the run ends: after so many steps or so much time, whichever is given."""

    max_steps: int | None
    max_s: float | None

    def share_used(self, progress: Progress) -> float:
        """0 at the start of the run, 1 at its end."""
        if self.max_steps is not None:
            return min(1.0, progress.step / self.max_steps)
        assert self.max_s is not None
        return min(1.0, progress.elapsed_s / self.max_s)


class Optimizers:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""

    def __init__(self, model: Llama, recipe: Recipe) -> None:
        named = list(model.named_parameters())
        matrices = [w for name, w in named if w.ndim == 2 and "embed_tokens" not in name]
        embeddings = [w for name, w in named if "embed_tokens" in name]
        norms = [w for _, w in named if w.ndim == 1]
        self.adamw_weights = embeddings + norms
        self.muon = torch.optim.Muon(
            matrices,
            lr=recipe.peak_lr,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = torch.optim.AdamW(
            [
                {"params": embeddings, "weight_decay": recipe.weight_decay},
                {"params": norms, "weight_decay": 0.0},
            ],
            lr=recipe.peak_lr,
            betas=(0.9, 0.95),
        )

    def step(self, lr: float) -> None:
        """Update all weights at this learning rate and clear their gradients."""
        optimizers: tuple[torch.optim.Optimizer, ...] = (self.muon, self.adamw)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def learning_rate(recipe: Recipe, share_used: float) -> float:
    """Warm up, hold, then decay linearly to zero."""
    warm = min(1.0, share_used / recipe.warmup_until + 0.01)
    cool = min(1.0, (1.0 - share_used) / (1.0 - recipe.decay_from))
    return recipe.peak_lr * warm * cool


class Trainer:
    """One run: the model, its optimizers and how far they are."""

    def __init__(self, data: Data, recipe: Recipe, device: torch.device, *, compiled: bool) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.device = device
        self.data = data
        self.model = Llama(LlamaShape()).to(device)
        self.optimizers = Optimizers(self.model, recipe)
        bos_id = special_id(data.tokenizer, BOS)
        self.sampler = WindowSampler(data.train, bos_id, recipe.seed)
        loss: LossFunction = self.model.loss
        self.loss = torch.compile(loss, dynamic=False) if compiled else loss
        self.progress = Progress()

    def step(self, share_used: float) -> float:
        """One optimizer step; returns the training loss in nats per token."""
        recipe = self.recipe
        window = recipe.long_window if share_used >= recipe.long_from else recipe.short_window
        count = recipe.tokens_per_step // window
        inputs, targets = self.sampler.batch(self.progress.tokens, count, window)
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.loss(inputs.to(self.device), targets.to(self.device), recipe.z_weight)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.optimizers.adamw_weights, recipe.max_grad_norm)
        self.optimizers.step(learning_rate(recipe, share_used))
        self.progress.step += 1
        self.progress.tokens += count * window
        return loss.item()

    def save(self, folder: Path) -> None:
        """Write all that `resume` needs, in one step."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".state.pt.tmp"
        state = {
            "model": self.model.state_dict(),
            "muon": self.optimizers.muon.state_dict(),
            "adamw": self.optimizers.adamw.state_dict(),
            "progress": asdict(self.progress),
        }
        torch.save(state, temporary)
        temporary.replace(folder / "state.pt")

    def resume(self, folder: Path) -> bool:
        """Go on from the saved state, if there is one."""
        path = folder / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizers.muon.load_state_dict(state["muon"])
        self.optimizers.adamw.load_state_dict(state["adamw"])
        self.progress = Progress(**state["progress"])
        return True


@dataclass(frozen=True, slots=True)
class Output:
    """Where a run writes, and how often."""

    model: Path
    state: Path
    every_s: float

    def write(self, trainer: Trainer) -> None:
        """Save the state and export the model, with a record of the run beside the state."""
        trainer.save(self.state)
        export(self.model, trainer.model, trainer.data.tokenizer)
        record = json.dumps(asdict(trainer.progress), indent=2) + "\n"
        write_atomically(self.state / "run.json", record.encode())


def run(trainer: Trainer, budget: Budget, output: Output) -> None:
    """Step until the budget is used; save and export on the way and at the end."""
    progress = trainer.progress
    started = time.monotonic() - progress.elapsed_s
    last_output_s = progress.elapsed_s
    mean_loss = float("nan")
    while (share_used := budget.share_used(progress)) < 1.0:
        step_started = time.monotonic()
        loss = trainer.step(share_used)
        progress.elapsed_s = time.monotonic() - started
        mean_loss = loss if progress.step == 1 or mean_loss != mean_loss else mean_loss
        mean_loss += 0.05 * (loss - mean_loss)
        if progress.step % 20 == 0:
            rate = trainer.recipe.tokens_per_step / (time.monotonic() - step_started)
            logger.info(
                "step %d  used %.3f  loss %.3f  %.0f tokens/s  %.0f s",
                progress.step, share_used, mean_loss, rate, progress.elapsed_s,
            )  # fmt: skip
        if progress.elapsed_s - last_output_s >= output.every_s:
            output.write(trainer)
            log_held_out_loss(trainer)
            last_output_s = progress.elapsed_s
    output.write(trainer)
    log_held_out_loss(trainer)


def log_held_out_loss(trainer: Trainer) -> None:
    """Log the loss on the held-out files, in nats per token."""
    loss = held_out_loss(trainer.model, trainer.data.held_out, trainer.device)
    logger.info("step %d  held-out loss %.4f", trainer.progress.step, loss.nats_per_token)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m quire.demo.train", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the exported model")
    parser.add_argument("--state", type=Path, help="folder of the saved state (OUT.state)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=60.0, help="training time (60)")
    length.add_argument("--steps", type=int, help="optimizer steps, instead of a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's choice)")
    parser.add_argument("--export-every", type=float, default=10.0, help="minutes (10)")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.threads:
        torch.set_num_threads(args.threads)
    recipe = Recipe()
    data = prepare_data(recipe.seed)
    logger.info("%d training tokens, %d held out", len(data.train), sum(map(len, data.held_out)))
    trainer = Trainer(data, recipe, torch.device(args.device), compiled=not args.no_compile)
    output = Output(
        args.out, args.state or args.out.with_name(args.out.name + ".state"), args.export_every * 60
    )
    if trainer.resume(output.state):
        logger.info("resumed at step %d", trainer.progress.step)
    budget = Budget(args.steps, None if args.steps else args.minutes * 60)
    run(trainer, budget, output)


if __name__ == "__main__":
    main()
