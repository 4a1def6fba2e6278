"""The loop: every training run goes through it, on one process or many, and can stop and go on at any step."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from tokenizer.errors import UserError
from training.allocator import keep_freed_memory
from training.background import Interrupts, Prefetch
from training.boards import Board, TensorBoard, WeightsAndBiases
from training.config import OptimizerConfig, RunConfig
from training.distributed import Replicas, open_backend
from training.first_lines import native_bf16, note_on_resume, notes_on_backend, notes_on_data, notes_on_weights
from training.guard import Guard
from training.journal import Journal, Meter, clock, pooled_means
from training.layers import compile_layers, compiler_errors, keep_inputs_alone, uncompiled
from training.optimizer import learning_rate, set_learning_rate
from training.processes import before_joining
from training.state import (
    CannotWrite,
    Found,
    Progress,
    checkpoints,
    clear_leftovers,
    load_checkpoint,
    load_training_state,
    load_weights,
    new_folder,
    save_checkpoint,
)
from training.task import Batch, Task

SETTLED_STEPS = 3
"""The first ones take longer: kernels are chosen, memory is fetched, layers compiled."""
SOON_S = 10.0
"""Where the first figures come sooner, nothing is foretold."""


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
    with before_joining():
        backend = open_backend(config.device, lambda device: autocast_dtype(config.precision, device))
    if backend.device.type == "cpu":
        keep_freed_memory()
    run = _Run(task, config, resolved, backend, resume)
    try:
        with compiler_errors():
            return run.train()
    finally:
        run.journal.close()


class _Run:
    """State of one run, and the steps that change it."""

    def __init__(
        self, task: Task, config: RunConfig, resolved: Mapping[str, Any], backend: Replicas, resume: bool
    ) -> None:
        self.task, self.config, self.resolved, self.backend = task, config, resolved, backend
        self.output = Path(config.output)
        self.device = backend.device
        self.modules = dict(task.modules())
        backend.place(self.modules)
        with backend.processes.agreed():  # the first that the processes of a run tell each other
            backend.check(self.modules)
            found, about = self._begin(resume)
            self.batches = task.batches(
                seed=config.seed, rank=backend.rank, world_size=backend.num_processes, skip=self.progress.batches
            )
        notes = [*notes_on_weights(self.modules), *notes_on_data(task, backend), *about]
        if config.gradient_checkpointing:
            backend.warnings += keep_inputs_alone(self.modules)
        if config.compile:
            backend.warnings += compile_layers(self.modules, backend)
        self.optimizers = backend.prepare(task, self.modules, self.optimizer_config)
        self.trained = {n: [p for p in m.parameters() if p.requires_grad] for n, m in self.modules.items()}
        self.ema = backend.averages(self.modules["model"], config.ema_decay) if config.ema_decay > 0 else None
        if found is not None:
            self._load_training_state(found.folder, found.ema_updates)
        self.generator = torch.Generator(self.device)
        self.journal = Journal(
            self.output,
            step=self.progress.step,
            max_steps=config.max_steps,
            active=backend.is_main,
            boards=self._boards(),
        )
        self.guard = Guard(config, self.progress, backend, self.journal)
        if config.spikes.norm_ratio > 0 and not backend.limits_norm:
            backend.warnings.append(f"spikes.norm_ratio is not used: {backend.name} tells the norm after the update")
        for note in (*notes, *notes_on_backend(backend, self.modules, self.optimizers, config)):
            self.journal.say(note)

    def _begin(self, resume: bool) -> tuple[Found | None, list[str]]:
        """Fill the modules, from the run's newest checkpoint if it goes on; returns that, and what to say of it."""
        config, notes = self.config, list[str]()
        self.progress = Progress()
        checkpoint, found = self._open_output(resume), None
        if checkpoint is not None:
            found = load_checkpoint(checkpoint, self.modules, self.resolved)
            self.progress = found.progress
            notes.append(note_on_resume(found, config, self.backend.num_processes))
        elif config.init_from is not None:
            filled = load_weights(config.init_from, self.modules, partial=config.init_partial)
            notes.append(f"weights of {', '.join(filled)}: {config.init_from}")
        if resume and checkpoint is None:
            notes.append(f"{self.output} holds no checkpoint yet; starting at step 0")
        self.progress.shared_by(self.backend.num_processes)
        return found, notes

    def _load_training_state(self, checkpoint: Path, ema_updates: int) -> None:
        for name, module in self.modules.items():
            optimizer = self.optimizers[name]
            load_training_state(
                checkpoint, f"optimizer_{name}", partial(self.backend.load_optimizer, module, optimizer)
            )
        ema = self.ema
        if ema is not None and (checkpoint / "ema.safetensors").exists():
            model = self.modules["model"]
            load_training_state(
                checkpoint, "ema", lambda state: self.backend.load_averages(model, ema, state, ema_updates)
            )

    def _boards(self) -> list[Callable[[], Board]]:
        config, boards = self.config, list[Callable[[], Board]]()
        if config.tensorboard:
            boards.append(lambda: TensorBoard(self.output, self.progress.step))
        if (project := config.wandb) is not None:
            boards.append(lambda: WeightsAndBiases(self.output, project, self.resolved))
        return boards

    def optimizer_config(self, name: str) -> OptimizerConfig:
        return self.config.optimizers.get(name, self.config.optimizer)

    def train(self) -> RunResult:
        config, progress = self.config, self.progress
        meter, made = Meter(), 0
        stream = Prefetch(self.batches, warning_s=config.stall_warning_s, limit_s=config.stall_limit_s, tell=self._tell)
        with stream, Interrupts() as interrupts:
            self._set_training(True)
            if config.validate_first and progress.step == 0:
                self.validate()
            while progress.step < config.max_steps and not self._exhausted():
                started = time.perf_counter()
                micro_batches = [next(stream) for _ in range(config.accumulate)]
                losses, frames = self.step(micro_batches)
                elapsed = time.perf_counter() - started
                progress.seconds += elapsed
                made += 1
                meter.add(losses, frames * self.backend.num_processes, elapsed)
                last = progress.step == config.max_steps
                if progress.step % config.log_every == 0 or last:
                    self._log(meter)
                    meter = Meter(meter.seconds_per_step)
                elif made == SETTLED_STEPS:
                    self._foretell(elapsed)
                validating = progress.step % config.validate_every == 0 or last
                listening = progress.step % (config.sample_every or config.validate_every) == 0 or last
                if validating:
                    self.validate(listen=listening, final=last)
                    last = last or self._exhausted()
                elif listening:
                    self.listen()
                stop = self.backend.agreed(interrupts.caught)
                if progress.step % config.checkpoint_every == 0 or last or stop:
                    self.save(final=last or stop)
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
        self.backend.share_buffers(self.modules)
        reason: str | None = None
        for turn in self.task.turns(index):
            for name, parameters in self.trained.items():
                for parameter in parameters:
                    parameter.requires_grad_(name == turn)
            total = torch.zeros((), device=self.device)
            spike = None
            for micro, batch in enumerate(micro_batches):
                seed = step_seed(self.config.seed, index, micro, self.backend.rank)
                torch.manual_seed(seed)
                self.generator.manual_seed(seed)
                loss, parts = self.backend.loss(turn, batch, step=index, generator=self.generator)
                total += loss.detach() / len(micro_batches)
                last = micro == len(micro_batches) - 1
                if last and self.guard.watches_loss:
                    spike = self.guard.loss_reason(turn, self.backend.mean(total))
                    # What is not finite makes every backend skip the update, on all processes.
                    loss = loss if spike is None else loss * torch.nan
                self.backend.backward(loss / len(micro_batches), last=last)
                for name, value in {f"{turn}_loss": loss.detach(), **parts}.items():
                    losses[name] = losses.get(name, 0) + torch.as_tensor(value, device=self.device) / len(micro_batches)
            norm, updated = self._update(turn, index, total)
            if updated:
                losses[f"{turn}_grad_norm"] = norm
            else:
                reason = reason or spike or self.guard.norm_reason(turn, float(norm))
        self.progress.step += 1
        self.progress.batches += len(micro_batches)
        self.guard.after_step(reason, micro_batches, self.output)
        return losses if reason is None else {}, frames

    def _update(self, turn: str, index: int, total: Tensor) -> tuple[Tensor, bool]:
        config, optimizer = self.optimizer_config(turn), self.optimizers[turn]
        rate = learning_rate(config, index, self.config.max_steps)
        set_learning_rate(optimizer, rate)
        limit = self.guard.norm_limit(turn)
        norm, updated = self.backend.update(turn, self.trained[turn], optimizer, total, config.max_grad_norm, limit)
        if updated and self.guard.watches:
            self.guard.updated(turn, self.backend.mean(total), float(norm))
        if updated and turn == "model" and self.ema is not None:
            self.ema.update()
        return norm, updated

    def listen(self) -> None:
        """Samples of the averaged weights."""
        with self._evaluation():
            if self.backend.is_main:
                self._write_samples()
        self.backend.wait()

    def _write_samples(self) -> None:
        with self._later(False):
            self.journal.samples(self.progress.step, self.task.samples())

    def validate(self, *, listen: bool = True, final: bool = False) -> None:
        """Figures and, with `listen`, samples of the averaged weights; the best ones are exported to `best/`."""
        progress, improved = self.progress, False
        with self._evaluation():
            if self.backend.is_main:
                figures = {name: float(value) for name, value in self.task.validate().items()}
                improved = progress.best_figures is None or figures["loss"] < progress.best_figures["loss"]
                if improved:
                    with self._later(final):
                        with new_folder(self.output / "best") as folder:
                            self.task.export(folder)
                        progress.best_figures, progress.best_step = figures, progress.step
                self.journal.record("validate", progress.step, figures)
                if listen:
                    self._write_samples()
                text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
                self.journal.say(f"validation at step {progress.step}{' (best)' if improved else ''}: {text}")
                progress.first_figures = progress.first_figures or figures
        progress.stale = 0 if self.backend.agreed(improved) else progress.stale + 1
        self.backend.wait()

    def save(self, *, final: bool = False) -> None:
        """A checkpoint, and the averaged weights as a model folder.

        Args:
            final: The run ends here, so what cannot be written is lost.
        """
        states = self.backend.states(self.modules, self.optimizers, self.ema)
        if self.backend.is_main:
            updates = self.ema.updates if self.ema is not None else 0
            keep = self.config.keep_checkpoints
            with self._later(final):
                save_checkpoint(self.output, self.progress, states, self.resolved, keep, updates)
        deque(states, maxlen=0)  # the other processes', and what a full disk left of the main one's
        with self._evaluation():
            if self.backend.is_main:
                with self._later(final), new_folder(self.output / "model") as folder:
                    self.task.export(folder)
        self.backend.wait()

    @contextlib.contextmanager
    def _later(self, final: bool) -> Iterator[None]:
        """Go on if something cannot be written, for the steps since the last checkpoint would be lost with the run, and
        disks that are full for a while are common where many share them; the next time may do.

        Raises:
            CannotWrite: there is no next time.
        """
        try:
            yield
        except CannotWrite as error:
            if final:
                raise
            every, kept = self.config.checkpoint_every, checkpoints(self.output)
            self.journal.say(
                f"warning: step {self.progress.step}: {error}; training goes on, the next checkpoint is due at step "
                f"{(self.progress.step // every + 1) * every}, the newest is {kept[-1].name if kept else 'none'}"
            )

    def _tell(self, text: str) -> None:
        """A line of any process."""
        if self.backend.is_main:
            self.journal.say(text)
        else:
            print(f"process {self.backend.rank}: {text}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _evaluation(self) -> Iterator[None]:
        self._set_training(False)
        try:
            with torch.no_grad(), uncompiled(self.modules), self.backend.whole(self.modules, self.ema):
                yield
        finally:
            self._set_training(True)

    def _set_training(self, mode: bool) -> None:
        for module in self.modules.values():
            module.train(mode)

    def _foretell(self, seconds: float) -> None:
        """How long a step takes, where the first figures keep one waiting."""
        step, every, steps = self.progress.step, self.config.log_every, self.config.max_steps
        if seconds * (min(steps, every) - step % every) >= SOON_S:
            self.journal.say(
                f"a step takes {seconds:.1f} s, {clock((steps - step) * seconds)} left; figures every {every} steps"
            )

    def _log(self, meter: Meter) -> None:
        means = pooled_means(self.backend.everybody(meter.totals()))
        remaining = (self.config.max_steps - self.progress.step) * meter.seconds_per_step
        rate = learning_rate(self.optimizer_config("model"), self.progress.step - 1, self.config.max_steps)
        figures = {**means, "learning_rate": rate, "frames_per_s": meter.speed, "remaining_s": round(remaining)}
        self.journal.record("train", self.progress.step, figures)
        self.journal.line(self.progress.step, means, meter.speed, remaining)

    def _open_output(self, resume: bool) -> Path | None:
        """Make or check the folder of the run; returns its newest checkpoint, if it has one."""
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            if self.backend.is_main:
                clear_leftovers(self.output)
                clear_leftovers(self.output / "checkpoints")
                clear_leftovers(self.output / "samples")
        except OSError as error:
            raise UserError(f"output={self.output} cannot be made: {error.strerror}; choose another folder") from error
        if not os.access(self.output, os.W_OK):
            raise UserError(f"output={self.output} cannot be written; choose another folder")
        found = checkpoints(self.output)
        if found and not resume:
            raise UserError(f"output={self.output} holds a run already; pass --resume to go on, or choose another")
        return found[-1] if found else None


def step_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """Seed of one micro-batch's random numbers, unrelated between any two of them."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bf16 where asked for, or where `auto` finds units for it; None means fp32 throughout."""
    if precision == "auto":
        precision = "bf16" if native_bf16(device) else "fp32"
    return torch.bfloat16 if precision == "bf16" else None
