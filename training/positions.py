"""Likelihood by position: nats a frame against the time in a clip, and by codebook, as sums and as a picture.

Memory does not grow with the corpus: positions past the last are counted with it.

Shapes: B batch, T frames, K codebooks, P positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hybridlm.frame_nll import FrameNLL
from tokenizer.files import replacing

LONGEST_S = 60.0
BINS = 60
"""Of the picture's time axis, at most."""


class PositionNLL:
    """Sums of nats over clips, by codebook (and the latents) and position in the clip.

    Args:
        num_codebooks: K of the model's predictions; 0 for a continuous model.
        frame_rate_hz: Frames a second.
    """

    def __init__(self, num_codebooks: int, frame_rate_hz: float) -> None:
        self.frame_rate_hz = frame_rate_hz
        length = round(LONGEST_S * frame_rate_hz)
        self.codes = torch.zeros(num_codebooks, length, dtype=torch.float64)
        self.latents = torch.zeros(length, dtype=torch.float64)
        self.frames = torch.zeros(length, dtype=torch.float64)

    def add(self, nll: FrameNLL, first: Sequence[int]) -> None:
        """Count scored frames.

        Args:
            nll: Of windows.
            first: Position in its clip of each window's first frame.
        """
        place = torch.tensor(first)[:, None] + torch.arange(nll.mask.shape[1])  # (B, T)
        place = place.clamp(max=len(self.frames) - 1).flatten()
        mask = nll.mask.cpu().flatten()
        place = place[mask]
        self.frames.index_add_(0, place, torch.ones(len(place), dtype=torch.float64))
        self.latents.index_add_(0, place, nll.latents.detach().cpu().double().flatten()[mask])
        codes = nll.codes.detach().cpu().double().transpose(0, 1).flatten(1)[:, mask]  # (K, N)
        self.codes.index_add_(1, place, codes)

    def join(self, total: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Add up the sums of several processes, with what adds a tensor up over them."""
        self.codes, self.latents, self.frames = total(self.codes), total(self.latents), total(self.frames)

    def curves(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Seconds (bins,), nats a frame of codes and of latents (bins,), of bins that frames fell into."""
        last = int(self.frames.nonzero().max()) + 1
        width = -(-last // BINS)
        bins = torch.arange(len(self.frames)) // width

        def binned(sums: torch.Tensor) -> torch.Tensor:
            return torch.zeros(int(bins.max()) + 1, dtype=torch.float64).index_add(0, bins, sums)

        counts = binned(self.frames)
        some = counts > 0
        seconds = (torch.arange(len(counts)) + 0.5) * width / self.frame_rate_hz
        return (
            seconds[some],
            (binned(self.codes.sum(dim=0)) / counts)[some],
            (binned(self.latents) / counts)[some],
        )

    def write_picture(self, path: Path, title: str) -> None:
        """Draw nats a frame over time, and by codebook, as a PNG.

        Raises:
            UserError: a place that cannot be written.
        """
        from matplotlib.figure import Figure  # imported here: it takes half a second

        seconds, codes, latents = (x.tolist() for x in self.curves())
        figure = Figure(figsize=(10, 4), layout="constrained")
        over_time, by_book = figure.subplots(1, 2, width_ratios=(2, 1))
        if len(self.codes):
            over_time.plot(seconds, codes, label="codes")
            each = (self.codes.sum(dim=1) / self.frames.sum()).tolist()
            by_book.bar(range(len(each)), each)
        if bool((self.latents != 0).any()):
            over_time.plot(seconds, latents, label="latents")
        over_time.set_xlabel("seconds from the beginning of the clip")
        over_time.set_ylabel("nats a frame")
        over_time.legend()
        by_book.set_xlabel("codebook")
        by_book.set_ylabel("nats a code")
        figure.suptitle(title)
        with replacing(Path(path)) as temporary:
            figure.savefig(temporary, format="png", dpi=100)
