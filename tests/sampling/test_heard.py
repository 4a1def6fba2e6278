"""Generation by models that read features: each frame is heard before the next is drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sampling.heard import HeardFeatures
from sampling.pipeline import AudioModel
from tests.support.tiny_audio_model import tiny_model, tiny_tokenizer
from tests.support.tiny_tokenizers import tokenizer_of
from tokenizer.errors import UserError
from tokenizer.f3 import F3Tokenizer
from tokenizer.frames import AudioFrames
from tokenizer.representation import RepresentationConfig, RepresentationEncoder

SLICES: dict[str, Any] = {"slice_layers": 1, "slice_dim": 16, "slice_heads": 2, "slice_ffn_dim": 24}
WHISPER_GPT = {"continuous_input": "features", "fusion": "concat", "num_input_codebooks": 1, **SLICES}
KINDS = ("log-mel", "representation")


def tokenizer(kind: str) -> F3Tokenizer:
    if kind == "log-mel":
        return tiny_tokenizer().with_log_mel(num_mels=12)
    torch.manual_seed(0)
    config = RepresentationConfig(feature_dim=16, num_layers=1, num_heads=2, ffn_dim=24, window_frames=4)
    return tiny_tokenizer().with_representation(RepresentationEncoder(8, config)).eval()


def model(kind: str, representation: str = "discrete", **settings: Any) -> AudioModel:
    return tiny_model(representation, tokenizer=tokenizer(kind), **{**WHISPER_GPT, **settings})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["codes", "latents"])
def test_what_is_heard_frame_by_frame_is_what_the_whole_sounds_like(kind: str, source: Any) -> None:
    codec = tokenizer(kind)
    frames = codec.encode(0.1 * torch.randn(2, 1, 12 * 960, generator=torch.Generator().manual_seed(0)))
    given = frames.codes if source == "codes" else frames.latents
    time = 2 if source == "codes" else 1
    audio = codec.decode_codes(given) if source == "codes" else codec.decode_latents(given)
    expected = codec.encode(audio).features
    heard = HeardFeatures(codec, source, 2, None)
    found = torch.cat([heard.push(one) for one in given.split(1, dim=time)], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

    # One prompt before all rows: what follows is heard after it.
    prompt = AudioFrames(codes=frames.codes[:1, :, :5], latents=frames.latents[:1, :5], lengths=torch.tensor([5]))
    heard = HeardFeatures(codec, source, 1, prompt)
    after = heard.push(given[:1, :, 5:] if source == "codes" else given[:1, 5:])
    torch.testing.assert_close(after, found[:1, 5:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("representation", ["discrete", "hybrid"])
def test_the_same_alone_in_a_batch_streamed_and_continued(kind: str, representation: str) -> None:
    maker = model(kind, representation)
    batch = maker.generate(tags=["music"], duration=0.6, num_samples=2, seed=4)
    for row in range(2):
        alone = maker.generate(tags=["music"], duration=0.6, seed=4 + row)
        assert torch.equal(alone.frames.codes[0], batch.frames.codes[row])
        streamed = torch.cat(list(maker.stream(tags=["music"], duration=0.6, seed=4 + row, chunk_frames=4)), dim=-1)
        torch.testing.assert_close(streamed[0], alone.row(0), atol=1e-5, rtol=0)
        # What is heard goes back into what is drawn, and rounding, which differs in a batch, with it.
        torch.testing.assert_close(streamed[0], batch.row(row), atol=1e-3, rtol=0)
    longer = maker.generate(audio=batch.row(0), duration=0.4, seed=1, num_samples=2)
    assert longer.frames.lengths.tolist() == [25, 25] and not torch.equal(
        longer.frames.codes[0, :, 15:], longer.frames.codes[1, :, 15:]
    )


def test_what_was_heard_decides_what_is_drawn_next() -> None:
    """Teacher-forced on its own frames and the features of its own sound, the model is in the states it drew from."""
    maker = model("log-mel")
    made = maker.generate(tags=["music"], duration=0.8, seed=2, top_k=1)
    features = maker.tokenizer.encode(made.waveform).features
    prefix = torch.tensor([maker.text.encode("", ["music"])])
    frames = AudioFrames(
        codes=made.frames.codes, latents=made.frames.latents, lengths=made.frames.lengths, features=features
    )

    def likeliest(of: AudioFrames) -> torch.Tensor:
        with torch.no_grad():
            h = maker.model.states(prefix, torch.ones_like(prefix, dtype=torch.bool), of)[0, :-1]
            assert maker.model.code_head is not None
            return maker.model.code_head.logits(h, of.codes[0].T).argmax(dim=-1)  # (K, T)

    assert torch.equal(likeliest(frames), made.frames.codes[0])
    deaf = AudioFrames(
        codes=frames.codes, latents=frames.latents, lengths=frames.lengths, features=torch.zeros_like(features)
    )
    assert not torch.equal(likeliest(deaf), made.frames.codes[0])


def test_guidance_hears_too() -> None:
    maker = model("log-mel")
    guided = maker.generate(tags=["music"], duration=0.4, seed=0, cfg=3.0)
    assert not torch.equal(guided.frames.codes, maker.generate(tags=["music"], duration=0.4, seed=0).frames.codes)


def test_features_that_come_too_late_are_refused() -> None:
    late = tokenizer_of("encodec")
    frames = torch.zeros(1, late.num_codebooks, 1, dtype=torch.int64)
    with pytest.raises(UserError, match=r"decodes 0 samples of 1 frames at once.*encodec-causal"):
        HeardFeatures(late, "codes", 1, None).push(frames)
    maker = model("log-mel")
    maker.tokenizer.lookahead_frames = 2
    with pytest.raises(UserError, match="features that look 2 frames ahead"):
        maker.generate(tags=["music"])
