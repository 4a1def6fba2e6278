"""From samples to logits: what is predicted of a frame hears nothing of it, nor of what follows.

In WHISPER-GPT's input a mel slice stands beside its frame's code. A centred window would let it hear the next frame,
which is to be predicted; ours end with the frame, and what a codec's encoder hears ahead is stated by the tokenizer.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hybridlm.config import ModelConfig
from hybridlm.model import HybridLM
from tests.support.tiny_tokenizers import noise, tokenizer_of
from tokenizer.frames import AudioFrames, Tokenizer

FRAMES = 24


def whisper_gpt(tokenizer: Tokenizer) -> HybridLM:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=3,
        num_codebooks=tokenizer.num_codebooks,
        codebook_size=tokenizer.codebook_size,
        latent_dim=tokenizer.latent_dim,
        feature_dim=tokenizer.feature_dim,
        frame_rate_hz=tokenizer.frame_rate_hz,
        representation="discrete",
        continuous_input="features",
        fusion="concat",
        num_input_codebooks=1,
        num_output_codebooks=1,
        hidden_dim=32,
        num_layers=2,
        num_heads=2,
        ffn_dim=48,
        slice_layers=2,
        slice_dim=16,
        slice_heads=2,
        slice_ffn_dim=24,
        alignment_heads=0,
    )
    model = HybridLM(config).eval()
    with torch.no_grad():  # as large as trained ones, so that every input moves every logit
        for name, weights in model.named_parameters():
            if weights.dim() > 1:
                weights.normal_(std=0.5 / weights.shape[-1] ** 0.5, generator=torch.Generator().manual_seed(len(name)))
    return model


@torch.no_grad()
def logits(model: HybridLM, frames: AudioFrames) -> Tensor:
    """(T + 1, V) of the coarse code; row t predicts frame t."""
    assert model.code_head is not None
    h = model.states(torch.tensor([[2]]), torch.ones(1, 1, dtype=torch.bool), frames)[0]
    return model.code_head.logits(h, torch.zeros(len(h), 1, dtype=torch.int64))[0]


@pytest.mark.parametrize("kind", ["f3-log-mel", "encodec-causal", "encodec", "hf-mimi"])
def test_logits_hear_only_what_came_before(kind: str) -> None:
    """Other samples after frame t leave the logits of frames 0 .. t + 1 the same to the bit, and move later ones."""
    tokenizer = tokenizer_of(kind)
    model, hop, ahead = whisper_gpt(tokenizer), tokenizer.hop_length, tokenizer.lookahead_frames
    waveform, other = noise(FRAMES * hop), noise(FRAMES * hop, seed=1)
    before = logits(model, tokenizer.encode(waveform))
    for t in (0, 3, 9):
        end = (t + ahead + 1) * hop
        changed = torch.cat([waveform[..., :end], other[..., end:]], dim=-1)
        after = logits(model, tokenizer.encode(changed))
        assert torch.equal(after[: t + 2], before[: t + 2])
        assert not torch.allclose(after[t + ahead + 2 :], before[t + ahead + 2 :], atol=1e-4)


def test_a_centred_window_would_be_found_out() -> None:
    """The same test on slices that reach half a window ahead, as librosa's and Whisper's do."""
    tokenizer = tokenizer_of("f3-log-mel")
    model, hop = whisper_gpt(tokenizer), tokenizer.hop_length
    waveform = noise(FRAMES * hop)
    changed = waveform.clone()
    changed[..., 10 * hop :] = noise(FRAMES * hop, seed=1)[..., 10 * hop :]

    def centred(sound: Tensor) -> AudioFrames:
        frames = tokenizer.encode(sound)
        ahead = torch.cat([sound[..., hop // 2 :], torch.zeros(1, 1, hop // 2)], dim=-1)
        later = tokenizer.encode(ahead).features
        return AudioFrames(codes=frames.codes, latents=frames.latents, lengths=frames.lengths, features=later)

    assert not torch.equal(logits(model, centred(changed))[:11], logits(model, centred(waveform))[:11])
