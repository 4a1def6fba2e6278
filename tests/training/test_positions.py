"""Likelihood by position: every scored frame once, at its place in the clip, whatever the windows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridlm.checkpoint import Checkpoint
from hybridlm.frame_nll import FrameNLL
from tests.support.tiny_audio_model import tiny_model
from tests.support.toy_corpus import write_cache
from tokenizer.loading import load_tokenizer
from training.corpus import TokenCache
from training.evaluate import evaluate, run
from training.positions import PositionNLL
from training.scoring import score_clips


def test_sums_are_those_of_the_clips_in_any_windows(tmp_path: Path) -> None:
    folders = write_cache(tmp_path, 6)
    made = tiny_model("hybrid")
    found = Checkpoint(model=made.model.eval(), tokenizer=load_tokenizer(folders["tokenizer"]), text=made.text)
    cache = TokenCache(Path(folders["cache"]))
    lengths = [cache.num_frames(clip) for clip in range(len(cache))]
    counts = torch.tensor([sum(length > place for length in lengths) for place in range(1500)]).double()
    for window in (250, 8):
        positions = PositionNLL(3, 25.0)
        clips = list(score_clips(found, cache, window_frames=window, positions=positions))
        assert torch.equal(positions.frames, counts)
        latents, codes = (sum(of(clip.nll) for clip in clips) for of in (lambda n: n.latents, lambda n: sum(n.codes)))
        assert float(positions.latents.sum()) == pytest.approx(latents, rel=1e-6)
        assert float(positions.codes.sum()) == pytest.approx(codes, rel=1e-6)
    plain = [clip.nll for clip in score_clips(found, cache, window_frames=8)]
    assert [clip.nll for clip in clips] == plain
    assert evaluate(found, cache).report.num_frames == sum(lengths)


def frame_nll(codes: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor) -> FrameNLL:
    batch, length = mask.shape
    nothing = torch.zeros(batch, length + 1)
    hits = torch.zeros(codes.shape, dtype=torch.bool)
    return FrameNLL(codes=codes, latents=latents, stop=nothing, correct=hits, mask=mask, stop_mask=nothing.bool())


def test_a_frame_counts_where_it_stands() -> None:
    positions = PositionNLL(1, 25.0)
    mask = torch.tensor([[False, True, True], [True, False, False]])
    latents = torch.tensor([[100.0, 2.0, 3.0], [5.0, 100.0, 100.0]])
    positions.add(frame_nll(latents[:, None] * 10, latents, mask), [4, 9000])
    assert positions.frames.nonzero().flatten().tolist() == [5, 6, 1499]  # past a minute, all in the last
    assert positions.latents[[5, 6, 1499]].tolist() == [2.0, 3.0, 5.0]
    assert positions.codes[0, [5, 6, 1499]].tolist() == [20.0, 30.0, 50.0]
    seconds, codes, curve = positions.curves()
    assert len(seconds) == 2 and curve.tolist() == [2.5, 5.0] and codes.tolist() == [25.0, 50.0]  # 25 frames a bin


@pytest.mark.parametrize("representation", ["discrete", "continuous", "hybrid"])
def test_the_picture(representation: str, tmp_path: Path) -> None:
    from hybridlm.checkpoint import save_model

    folders = write_cache(tmp_path, 4)
    made = tiny_model(representation)
    save_model(tmp_path / "model", made.model, load_tokenizer(folders["tokenizer"]), made.text)
    run(tmp_path / "model", Path(folders["cache"]), picture=tmp_path / "nats.png")
    assert (tmp_path / "nats.png").read_bytes().startswith(b"\x89PNG")
