"""A stream is, sample for sample, what is made at once: with the box, and with decoders that hold samples back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sampling.longform import LongForm
from sampling.monitor import Watch
from sampling.pipeline import AudioModel, load
from tests.support.tiny_audio_model import tiny_model
from tests.support.tiny_tokenizers import KINDS, tokenizer_of

CHUNKS = (1, 3, 100)


def assert_streams(model: AudioModel, lookahead_frames: int, **asked: Any) -> None:
    once = model.generate(**asked)
    assert int(once.lengths[0]) == once.waveform.shape[-1] > 0
    for chunk_frames in CHUNKS:
        stream = model.generate_stream(**asked, chunk_frames=chunk_frames)
        pieces = list(stream)
        assert stream.num_samples == once.waveform.shape[-1]
        torch.testing.assert_close(torch.cat(pieces, dim=-1), once.waveform, atol=1e-5, rtol=0)
        hop = model.tokenizer.hop_length
        most = hop if lookahead_frames == 0 else hop * (chunk_frames + lookahead_frames)
        assert 0 < pieces[0].shape[-1] <= most, "sound comes with the first frame, as far as the decoder lets it"


def test_the_box() -> None:
    model = load()
    assert_streams(model, 0, tags=["music"], duration=0.36, seed=4)
    assert_streams(model, 0, text="Hm.", duration=0.36, seed=4)


@pytest.mark.parametrize("kind", ["dasheng", "dasheng-centred"])
@pytest.mark.parametrize("in_segments", [False, True])
def test_other_tokenizers(kind: str, in_segments: bool) -> None:
    model = tiny_model("hybrid", tokenizer=tokenizer_of(kind))  # type: ignore[arg-type]
    seconds = 12 / model.tokenizer.frame_rate_hz
    long_form = None
    if in_segments:
        watch = Watch(window_seconds=seconds / 6, step_seconds=seconds / 6, anchor_seconds=seconds / 3)
        long_form = LongForm(segment_seconds=seconds / 3, carry_seconds=1.0, max_drift=1e9, watch=watch)
    assert_streams(model, KINDS[kind].decoder_lookahead, duration=seconds, seed=4, long_form=long_form)
    if in_segments:
        stream = model.generate_stream(duration=seconds, seed=4, long_form=long_form)
        list(stream)
        assert len(stream.report()["drift"]["windows"]) == 4
