"""A noisy recording through an enhancer, in pieces, so that hours need no more memory than seconds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from sampling.files import AudioWriter, check_writable, tell_figures
from sampling.reconstruct import PIECE_SECONDS, Stopwatch
from tokenizer.audio import audio_blocks
from tokenizer.enhancer import Sounds, load_enhancer
from tokenizer.errors import UserError
from tokenizer.spectral_mask import SpectralMask

Phase = Literal["noisy", "decoded"]


def run(
    input: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    phase: str = "noisy",
    device: str | None = "cpu",
    json_file: str | Path | None = None,
) -> dict[str, Any]:
    """`hybridlm enhance`: take the noise out of a recording, write it, print and return what was done.

    Args:
        input: Any audio file that soundfile reads; its channels are averaged.
        output: WAV or FLAC, at the enhancer's rate, as long as the input.
        model: An enhancer's folder; there is none in the box.
        phase: "decoded": what the tokenizer decodes, as in DashengTokenizer's paper; "noisy": the recording itself,
            masked where enhancement made it quieter (`tokenizer.spectral_mask`), which keeps the waveform.
        device: "cpu", "cuda", ...; None for CUDA where there is one.
        json_file: Where the figures go as JSON; None for nowhere.

    Returns:
        Figures: input, output, model, tokenizer, phase, sample_rate_hz, seconds, and speed (seconds of audio a
        second of computing).

    Raises:
        UserError: for no enhancer, input that is no audio, or an output that can't be written.
    """
    if model is None or str(model) == "box":
        raise UserError(
            "there is no enhancer in the box; train one with configs/enhancement-small.yaml "
            "and give its folder: --model runs/enhancement/model"
        )
    if phase not in get_args(Phase):
        raise UserError(f"phase={phase!r} must be one of {', '.join(get_args(Phase))}")
    enhancer = load_enhancer(model, device)
    if json_file is not None:
        check_writable(Path(json_file))
    where, computing = next(enhancer.network.parameters()).device, Stopwatch()
    stream, heard = enhancer.stream(decoded=phase == "noisy"), 0
    mask = SpectralMask(1, enhancer.sample_rate_hz, where) if phase == "noisy" else None

    def masked(noisy: torch.Tensor, made: Sounds) -> torch.Tensor:
        if mask is None:
            return made.enhanced
        assert made.decoded is not None
        return computing(partial(mask.push, noisy, made.decoded, made.enhanced))

    with torch.inference_mode(), AudioWriter(Path(output), enhancer.sample_rate_hz) as writer:
        for block in audio_blocks(Path(input), enhancer.sample_rate_hz, block_s=PIECE_SECONDS):
            heard += block.shape[-1]
            noisy = block.unsqueeze(0).to(where)
            writer.write(masked(noisy, computing(partial(stream.push, noisy))))
        made = computing(stream.flush)
        rest = masked(made.enhanced[..., :0], made)
        if mask is not None:
            rest = torch.cat([rest, computing(mask.flush)], dim=-1)
        writer.write(rest[..., : heard - writer.num_samples])  # the last frame reaches past the recording's end
    seconds = writer.num_samples / enhancer.sample_rate_hz
    figures: dict[str, Any] = {
        "input": str(input),
        "output": str(output),
        "model": str(model),
        "tokenizer": enhancer.tokenizer.name,
        "phase": phase,
        "sample_rate_hz": enhancer.sample_rate_hz,
        "seconds": seconds,
        "speed": seconds / computing.seconds,
    }
    tell_figures(figures, json_file)
    return figures
