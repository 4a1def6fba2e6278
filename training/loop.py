"""The loop: every training run goes through it, on one process or many, and can stop and go on at any step."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, send_to_device
from torch import Tensor

from tokenizer.errors import UserError
from training.allocator import keep_freed_memory
from training.background import Interrupts, Prefetch
from training.config import OptimizerConfig, RunConfig
from training.journal import Journal, Meter
from training.optimizer import AveragedWeights, gradient_norm, learning_rate, make_optimizer
from training.state import (
    Progress,
    checkpoints,
    clear_leftovers,
    load_checkpoint,
    load_weights,
    new_folder,
    save_checkpoint,
)
from training.task import Batch, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How a run ended."""

    output: Path
    step: int
    finished: bool
    """False when it was interrupted; it then resumes from `step`."""
    first: Mapping[str, float]
    """Figures of the first validation; empty if there was none yet."""
    best: Mapping[str, float]
    """Figures of the best validation."""


def fit(task: Task, config: RunConfig, resolved: Mapping[str, Any], *, resume: bool = False) -> RunResult:
    """Train `task` until `config.max_steps`, or until SIGINT or SIGTERM, after which the state is saved.

    Args:
        task: What to train. Its modules are moved to the device.
        config: Settings of the run.
        resolved: The complete settings as plain JSON types, saved with every checkpoint.
        resume: Go on from the newest checkpoint of `config.output`.

    Raises:
        UserError: an output that is taken or can't be written, a checkpoint that does not fit, a run that diverged.
    """
    torch.set_flush_denormal(True)  # AdamW's averages of tiny gradients would slow a CPU down by an order of magnitude
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but this machine has no CUDA device that PyTorch can use; set device=cpu")
    # Several processes without GPUs talk to each other only if accelerate is told that they have none.
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    accelerator = Accelerator(cpu=config.device == "cpu" or not (alone or torch.cuda.is_available()))
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    run = _Run(task, config, resolved, accelerator, resume)
    try:
        return run.train()
    finally:
        run.journal.close()


class _Run:
    """State of one run, and the steps that change it."""

    def __init__(
        self, task: Task, config: RunConfig, resolved: Mapping[str, Any], accelerator: Accelerator, resume: bool
    ) -> None:
        self.task, self.config, self.resolved, self.accelerator = task, config, resolved, accelerator
        self.output = Path(config.output)
        self.device = accelerator.device
        self.dtype = autocast_dtype(config.precision, self.device)
        self.modules = dict(task.modules())
        for module in self.modules.values():
            module.to(self.device)
        self.trained = {n: [p for p in m.parameters() if p.requires_grad] for n, m in self.modules.items()}
        self.optimizers = {n: make_optimizer(m, self.optimizer_config(n)) for n, m in self.modules.items()}
        found = self._open_output(resume)
        notes = []
        if not found and config.init_from is not None:
            filled = load_weights(config.init_from, self.modules, partial=config.init_partial)
            notes.append(f"weights of {', '.join(filled)}: {config.init_from}")
        self.ema = AveragedWeights(self.modules["model"], config.ema_decay) if config.ema_decay > 0 else None
        self.progress = Progress()
        if found:
            self.progress, changed = load_checkpoint(found[-1], self.modules, self.optimizers, self.ema, resolved)
            notes.append(f"resumed from {found[-1]}" + (f"; changed: {', '.join(changed)}" if changed else ""))
        elif resume:
            notes.append(f"{self.output} holds no checkpoint yet; starting at step 0")
        self._broadcast(parameters=True)
        self.generator = torch.Generator(self.device)
        self.bad_in_a_row = 0
        self.journal = Journal(
            self.output,
            step=self.progress.step,
            max_steps=config.max_steps,
            active=accelerator.is_main_process,
            tensorboard=config.tensorboard,
        )
        weights = sum(p.numel() for parameters in self.trained.values() for p in parameters)
        frozen = sum(p.numel() for module in self.modules.values() for p in module.parameters()) - weights
        weights_text = f"{weights / 1e6:.2f} M trained weights" + (f", {frozen / 1e6:.2f} M frozen," if frozen else "")
        notes.append(
            f"{weights_text} on {accelerator.num_processes} x {self.device.type}, "
            f"{'bf16 autocast' if self.dtype else 'fp32'}, output {self.output}"
        )
        for note in notes:
            self.journal.say(note)

    def optimizer_config(self, name: str) -> OptimizerConfig:
        return self.config.optimizers.get(name, self.config.optimizer)

    def train(self) -> RunResult:
        config, progress = self.config, self.progress
        batches = self.task.batches(
            seed=config.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            skip=progress.batches,
        )
        meter = Meter()
        with Prefetch(batches) as stream, Interrupts() as interrupts:
            self._set_training(True)
            if config.validate_first and progress.step == 0:
                self.validate()
            while progress.step < config.max_steps and not self._exhausted():
                started = time.perf_counter()
                micro_batches = [next(stream) for _ in range(config.accumulate)]
                losses, frames = self.step(micro_batches)
                elapsed = time.perf_counter() - started
                progress.seconds += elapsed
                meter.add(losses, frames * self.accelerator.num_processes, elapsed)
                last = progress.step == config.max_steps
                if progress.step % config.log_every == 0 or last:
                    self._log(meter)
                    meter = Meter(meter.seconds_per_step)
                if progress.step % config.validate_every == 0 or last:
                    self.validate()
                    last = last or self._exhausted()
                stop = self._agreed(interrupts.caught)
                if progress.step % config.checkpoint_every == 0 or last or stop:
                    self.save()
                if stop and not last:
                    self.journal.say(f"interrupted; saved at step {progress.step}: go on with --resume")
                    return self.result(finished=False)
        return self.result(finished=True)

    def _exhausted(self) -> bool:
        """Whether validations have ceased to improve."""
        return self.config.patience is not None and self.progress.stale >= self.config.patience

    def result(self, *, finished: bool) -> RunResult:
        return RunResult(
            output=self.output,
            step=self.progress.step,
            finished=finished,
            first=self.progress.first_figures or {},
            best=self.progress.best_figures or {},
        )

    def step(self, micro_batches: list[Batch]) -> tuple[dict[str, Tensor], int]:
        """One update of every module whose turn it is; returns the losses by name and the frames taken in."""
        index = self.progress.step
        losses: dict[str, Tensor] = {}
        micro_batches = [send_to_device(batch, self.device) for batch in micro_batches]
        frames = sum(self.task.size(batch) for batch in micro_batches)
        self._broadcast(parameters=False)
        healthy = True
        for turn in self.task.turns(index):
            for name, parameters in self.trained.items():
                for parameter in parameters:
                    parameter.requires_grad_(name == turn)
            total = torch.zeros((), device=self.device)
            for micro, batch in enumerate(micro_batches):
                seed = step_seed(self.config.seed, index, micro, self.accelerator.process_index)
                torch.manual_seed(seed)
                self.generator.manual_seed(seed)
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    loss, parts = self.task.loss(turn, batch, step=index, generator=self.generator)
                self.accelerator.backward(loss / len(micro_batches))
                total += loss.detach() / len(micro_batches)
                for name, value in {f"{turn}_loss": loss.detach(), **parts}.items():
                    losses[name] = losses.get(name, 0) + torch.as_tensor(value, device=self.device) / len(micro_batches)
            total, norm = self._average_gradients(turn, total)
            if torch.isfinite(total) and torch.isfinite(norm):
                losses[f"{turn}_grad_norm"] = norm
                self._update(turn, index)
            else:
                healthy = False
            self.optimizers[turn].zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.batches += len(micro_batches)
        self._guard(healthy)
        return losses if healthy else {}, frames

    def _update(self, turn: str, index: int) -> None:
        rate = learning_rate(self.optimizer_config(turn), index, self.config.max_steps)
        for group in self.optimizers[turn].param_groups:
            group["lr"] = rate
        self.optimizers[turn].step()
        if turn == "model" and self.ema is not None:
            self.ema.update()

    def _average_gradients(self, turn: str, total: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of loss and gradients over the processes, in one exchange; then clip.

        Tasks call many methods of their modules, not `forward` alone, which a wrapped module would not see.
        """
        parameters = [p for p in self.trained[turn] if p.grad is not None]
        if self.accelerator.num_processes > 1:
            parameters = self.trained[turn]
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            flat = torch.cat([total.reshape(1), *(p.grad.reshape(-1) for p in parameters)])  # type: ignore[union-attr]
            flat = self.accelerator.reduce(flat, "mean")
            total, offset = flat[0], 1
            for p in parameters:
                p.grad = flat[offset : offset + p.numel()].view_as(p)
                offset += p.numel()
        if not parameters:
            raise UserError(f"the loss of '{turn}' reaches none of its weights; check what is frozen")
        return total, gradient_norm(parameters, self.optimizer_config(turn).max_grad_norm)

    def _guard(self, healthy: bool) -> None:
        """Count the steps that were skipped, and stop when they don't end."""
        if healthy:
            self.bad_in_a_row = 0
            return
        self.bad_in_a_row += 1
        self.progress.bad_steps += 1
        self.journal.record("skipped", self.progress.step, {"in_a_row": self.bad_in_a_row})
        self.journal.say(f"step {self.progress.step}: loss or gradient is not finite; skipped")
        if self.bad_in_a_row >= self.config.max_bad_steps:
            kept = checkpoints(self.output)
            raise UserError(
                f"loss or gradient was not finite in {self.bad_in_a_row} steps in a row, up to step "
                f"{self.progress.step}; lower optimizer.learning_rate or set precision=fp32, then resume from "
                f"{kept[-1] if kept else 'the start'}"
            )

    def validate(self) -> None:
        """Figures and samples of the averaged weights; the best ones are exported to `best/`."""
        progress, improved = self.progress, False
        if self.accelerator.is_main_process:
            with self._evaluation():
                figures = {name: float(value) for name, value in self.task.validate().items()}
                improved = progress.best_figures is None or figures["loss"] < progress.best_figures["loss"]
                if improved:
                    progress.best_figures, progress.best_step = figures, progress.step
                    with new_folder(self.output / "best") as folder:
                        self.task.export(folder)
                self.journal.record("validate", progress.step, figures)
                self.journal.samples(progress.step, self.task.samples())
            text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            self.journal.say(f"validation at step {progress.step}{' (best)' if improved else ''}: {text}")
            progress.first_figures = progress.first_figures or figures
        progress.stale = 0 if self._agreed(improved) else progress.stale + 1
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        """A checkpoint, and the averaged weights as a model folder."""
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.output,
                self.progress,
                self.modules,
                self.optimizers,
                self.ema,
                self.resolved,
                self.config.keep_checkpoints,
            )
            with self._evaluation(), new_folder(self.output / "model") as folder:
                self.task.export(folder)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _evaluation(self) -> Iterator[None]:
        self._set_training(False)
        try:
            with torch.no_grad(), self.ema.swapped_in() if self.ema else contextlib.nullcontext():
                yield
        finally:
            self._set_training(True)

    def _set_training(self, mode: bool) -> None:
        for module in self.modules.values():
            module.train(mode)

    def _log(self, meter: Meter) -> None:
        means = meter.means()
        remaining = (self.config.max_steps - self.progress.step) * meter.seconds_per_step
        rate = learning_rate(self.optimizer_config("model"), self.progress.step - 1, self.config.max_steps)
        figures = {**means, "learning_rate": rate, "frames_per_s": meter.speed, "remaining_s": round(remaining)}
        self.journal.record("train", self.progress.step, figures)
        self.journal.line(self.progress.step, means, meter.speed, remaining)

    def _open_output(self, resume: bool) -> list[Path]:
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            if self.accelerator.is_main_process:
                clear_leftovers(self.output)
                clear_leftovers(self.output / "checkpoints")
        except OSError as error:
            raise UserError(f"output={self.output} cannot be made: {error.strerror}; choose another folder") from error
        if not os.access(self.output, os.W_OK):
            raise UserError(f"output={self.output} cannot be written; choose another folder")
        found = checkpoints(self.output)
        if found and not resume:
            raise UserError(f"output={self.output} holds a run already; pass --resume to go on, or choose another")
        return found

    def _agreed(self, caught: bool) -> bool:
        """Whether it holds on any process: all must take the same way."""
        if self.accelerator.num_processes == 1:
            return caught
        return bool(self.accelerator.reduce(torch.tensor(float(caught), device=self.device), "sum") > 0)

    def _broadcast(self, *, parameters: bool) -> None:
        """Hand out the main process's buffers (running statistics), and at the start its weights."""
        if self.accelerator.num_processes == 1:
            return
        with torch.no_grad():
            for module in self.modules.values():
                for tensor in (*(module.parameters() if parameters else ()), *module.buffers()):
                    tensor.copy_(broadcast(tensor.detach().clone()))


def step_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """Seed of one micro-batch's random numbers, unrelated between any two of them."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bf16 where asked for, or where `auto` finds units for it; None means fp32 throughout."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        precision = "bf16" if native else "fp32"
    return torch.bfloat16 if precision == "bf16" else None
