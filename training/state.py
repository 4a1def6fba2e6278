"""A run on disk: checkpoint folders that are whole or absent, whatever moment the process dies.

A checkpoint holds, by module name, `<module>.safetensors` and `optimizer_<module>.safetensors`, for the averaged
weights `ema.safetensors`, and `state.json` (step, best figure, resolved settings). Random numbers need no state: every
step's are drawn from (seed, step, micro-batch, rank), and the data's position is the number of batches taken.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenizer.errors import UserError
from training.config import FREE_ON_RESUME, changed_keys

VERSION = 1


class CannotWrite(UserError):
    """A folder that could not be written; what stood there before still does."""


@dataclass(kw_only=True, slots=True)
class Progress:
    """What a run knows of itself besides tensors."""

    step: int = 0
    """Updates made."""
    batches: int = 0
    """Batches taken from the data of each rank."""
    processes: int | None = None
    """Ranks that took them; None in a checkpoint that does not know."""
    bad_steps: int = 0
    """Steps skipped in all."""
    best_step: int | None = None
    first_figures: dict[str, float] | None = None
    """Of the first validation."""
    best_figures: dict[str, float] | None = None
    """Of the best validation, whose model is in `best/`."""
    stale: int = 0
    """Validations since the best."""
    latest: dict[str, list[list[float]]] = field(default_factory=dict)
    """Loss and gradient norm of the latest updates of each module, where spikes are watched for."""
    seconds: float = 0.0
    """Time spent in steps, over all sessions of the run."""

    def shared_by(self, processes: int) -> None:
        """Go on with this many ranks: what was taken in all is what counts; a fraction of a batch is taken again."""
        if self.processes is not None:
            self.batches = self.batches * self.processes // processes
        self.processes = processes


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `target` when the block ends without an error.

    Raises:
        CannotWrite: the disk is full, or the place can't be written; what stood at `target` stays.
    """
    temporary = target.with_name(f".{target.name}.writing")
    retired = target.with_name(f".{target.name}.retired")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        shutil.rmtree(retired, ignore_errors=True)
        if target.exists():
            target.rename(retired)
        temporary.rename(target)
        shutil.rmtree(retired, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if not target.exists() and retired.exists():
            retired.rename(target)
        raise CannotWrite(
            f"cannot write {target}: {error}; free space or choose another output (what was saved before is kept)"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Undo what a process that was killed inside `new_folder` left in `folder`."""
    for retired in folder.glob(".*.retired"):
        target = folder / retired.name[1 : -len(".retired")]
        if target.exists():
            shutil.rmtree(retired)
        else:
            retired.rename(target)
    for temporary in folder.glob(".*.writing"):
        if temporary.is_dir():
            shutil.rmtree(temporary)


def _flush(file: Path) -> None:
    """Rename must not overtake the content on its way to the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((output / "checkpoints").glob("step_*"))


def save_checkpoint(
    output: Path,
    progress: Progress,
    states: Iterable[tuple[str, Mapping[str, Tensor]]],
    config: Mapping[str, Any],
    keep: int,
    ema_updates: int = 0,
) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`.

    Args:
        output: Folder of the run.
        progress: Where it stands.
        states: Tensors by name for every file's stem; taken one file at a time.
        config: Resolved settings.
        keep: Number of checkpoints.
        ema_updates: Updates that the averaged weights have taken in.

    Raises:
        CannotWrite: the earlier checkpoints stay.
    """
    target = output / "checkpoints" / f"step_{progress.step:08d}"
    with new_folder(target) as folder:
        for stem, tensors in states:
            save_tensors(folder / f"{stem}.safetensors", tensors)
        state = {
            "version": VERSION,
            "progress": {name: getattr(progress, name) for name in Progress.__slots__},
            "ema_updates": ema_updates,
            "config": config,
        }
        (folder / "state.json").write_text(json.dumps(state, indent=1))
    for old in checkpoints(output)[:-keep]:
        half = old.with_name(f".{old.name}.writing")  # a folder that lacks files must not look like a checkpoint
        old.rename(half)
        shutil.rmtree(half, ignore_errors=True)
    return target


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A checkpoint's `state.json`, and what was made of its settings."""

    folder: Path
    progress: Progress
    ema_updates: int
    accumulate: int | None
    """Micro-batches that a step took on each process; None where the settings do not say."""
    changed: list[str]
    """Names of the settings that changed since, all of them allowed to."""


def load_checkpoint(folder: Path, modules: Mapping[str, nn.Module], config: Mapping[str, Any]) -> Found:
    """Fill modules from a checkpoint; `load_training_state` reads the rest.

    Raises:
        UserError: a setting changed that the saved state depends on; or the checkpoint is cut short or of another
            version.
    """
    with _reading(folder):
        state = json.loads((folder / "state.json").read_text())
        if state["version"] != VERSION:
            raise UserError(
                f"{folder} has checkpoint version {state['version']}, this program reads {VERSION}; start a new run "
                f"with init_from={folder}"
            )
        changed = changed_keys(state["config"], config)
        free = [name for name in changed if name.split(".")[0] in FREE_ON_RESUME]
        told = [
            f"'{name}' was {_value(state['config'], name)!r} and is now {_value(config, name)!r}"
            for name in changed
            if name not in free
        ]
        if told:
            back, allowed = "it" if len(told) == 1 else "them", f" ({', '.join(free)} may change)" if free else ""
            raise UserError(
                f"cannot resume: {', '.join(told)}; set {back} back, or start a new output with "
                f"init_from={folder}{allowed}"
            )
        for name, module in modules.items():
            load_module_state(module, load_file(folder / f"{name}.safetensors"))
        return Found(
            folder=folder,
            progress=Progress(**state["progress"]),
            ema_updates=state["ema_updates"],
            accumulate=state["config"].get("accumulate"),
            changed=changed,
        )


def load_training_state(folder: Path, stem: str, fill: Callable[[Iterator[tuple[str, Tensor]]], None]) -> None:
    """Hand the tensors of one of a checkpoint's files to `fill`, one by one and in main memory.

    Raises:
        UserError: the file is cut short, or does not fit.
    """
    with _reading(folder), safe_open(folder / f"{stem}.safetensors", framework="pt", device="cpu") as file:
        fill((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (no mapping)


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"checkpoint {folder} is cut short or damaged ({' '.join(str(error).split())[:200]}); remove it to resume "
            "from the one before"
        ) from error


def load_weights(folder: str | Path, modules: Mapping[str, nn.Module], *, partial: bool = False) -> list[str]:
    """Start modules from a folder's `<module>.safetensors`; `model` must be there, others may be missing.

    Args:
        folder: Where the weights are.
        modules: What to fill.
        partial: Take over what fits by name and shape, instead of refusing what does not.

    Returns:
        The names of the modules that were filled, with the number of tensors that were not, where there are any.

    Raises:
        UserError: no weights there, or of another shape than the modules'.
    """
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"init_from={folder} holds no model.safetensors; name a model's or a checkpoint's folder")
    filled = []
    for name, module in modules.items():
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            continue
        try:
            state = load_file(path)
            if partial:
                own = module_state(module)
                fitting = {n: v for n, v in state.items() if n in own and own[n].shape == v.shape}
                missing = len(own) - len(fitting)
                name += f" (but for {missing} of {len(own)} tensors)" if missing else ""
                state = {**own, **fitting}
            load_module_state(module, state)
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"init_from: {path} does not fit {name}: {' '.join(str(error).split())[:300]}") from error
        filled.append(name)
    return filled


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and every buffer, those too that a model's folder leaves out (running statistics of a quantizer)."""
    return {**module.state_dict(), **dict(module.named_buffers())}


def load_module_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The inverse of `module_state`; also takes a plain state dict, which leaves the other buffers as they are.

    Raises:
        RuntimeError: names or shapes that do not fit.
    """
    persistent = module.state_dict().keys()
    extra = {name: buffer for name, buffer in module.named_buffers() if name not in persistent}
    module.load_state_dict({name: value for name, value in state.items() if name not in extra})
    for name, buffer in extra.items():
        if name in state:
            buffer.copy_(state[name])


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """safetensors with tied tensors and views written out in full."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def _value(config: Mapping[str, Any], name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
