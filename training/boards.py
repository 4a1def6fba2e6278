"""Where figures and sounds of a run are shown besides its log: TensorBoard, and Weights & Biases where asked for."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tokenizer.errors import UserError
from training.task import Sample


@runtime_checkable
class Board(Protocol):
    """Shows what a run tells."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Numbers by name, `<kind>/<name>`."""
        ...

    def sample(self, step: int, sample: Sample) -> None:
        """Audio with its spectrogram."""
        ...

    def close(self) -> None:
        """After the last step."""
        ...


class TensorBoard:
    """Event files in the run's `tensorboard/`.

    Args:
        output: Folder of the run.
        step: Step from which the run goes on; what was shown of later ones is dropped.
    """

    def __init__(self, output: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1 if step else None)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Board`."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def sample(self, step: int, sample: Sample) -> None:
        """See `Board`."""
        waveform = audible(sample)
        self._writer.add_audio(sample.name, waveform[None], step, sample_rate=sample.sample_rate_hz)
        self._writer.add_image(f"{sample.name}/spectrogram", spectrogram_image(waveform), step)

    def close(self) -> None:
        """See `Board`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, the same one when it is resumed; without a network, `WANDB_MODE=offline` keeps it in
    the run's `wandb/`.

    Args:
        output: Folder of the run.
        project: Its project.
        settings: All settings of the run, which the project's table can be sorted by.

    Raises:
        UserError: the library is missing, or it cannot begin a run.
    """

    def __init__(self, output: Path, project: str, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"wandb={project} needs the library wandb; pip install 'hybridlm[wandb]', or leave the setting out"
            ) from error
        self._library = wandb
        kept = output / "wandb.id"
        if not kept.is_file():
            kept.write_text(uuid.uuid4().hex, encoding="utf-8")
        try:
            self._run = wandb.init(
                project=project,
                name=output.name,
                dir=str(output),
                id=kept.read_text(encoding="utf-8"),
                resume="allow",
                config=dict(settings),
            )
        except wandb.Error as error:
            text = " ".join(str(error).split())
            raise UserError(f"wandb={project}: {text}; log in with `wandb login`, or set WANDB_MODE=offline") from error
        # A step of its own: the library's only goes forward, and a run that is resumed may go back.
        self._run.define_metric("*", step_metric="step")

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """See `Board`."""
        self._run.log({"step": step, **figures})

    def sample(self, step: int, sample: Sample) -> None:
        """See `Board`."""
        waveform = audible(sample)
        sound = self._library.Audio(waveform.numpy(), sample_rate=sample.sample_rate_hz)
        picture = self._library.Image(spectrogram_image(waveform)[0].numpy())
        self._run.log({"step": step, sample.name: sound, f"{sample.name}/spectrogram": picture})

    def close(self) -> None:
        """See `Board`."""
        self._run.finish()


def audible(sample: Sample) -> Float[Tensor, " S"]:
    """In main memory, finite and within [-1, 1]."""
    return sample.waveform.detach().float().cpu().nan_to_num().clamp(-1, 1)


def spectrogram_image(waveform: Tensor) -> Tensor:
    """Log-magnitude spectrogram (1, 257, frames) in [0, 1], low frequencies at the bottom, 80 dB deep."""
    if waveform.numel() < 512:
        waveform = torch.nn.functional.pad(waveform, (0, 512 - waveform.numel()))
    spectrum = torch.stft(waveform, 512, 256, window=torch.hann_window(512), return_complex=True).abs()
    decibels = 20 * torch.log10(spectrum.clamp_min(1e-5))
    return ((decibels - decibels.max()) / 80 + 1).clamp(0, 1).flip(0)[None]
