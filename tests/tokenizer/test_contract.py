"""What `tokenizer.frames` promises, of every tokenizer: shapes, look-ahead, streams, batches, folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.tiny_tokenizers import KINDS, assert_same_frames, noise, pieces_of, tokenizer_of
from tokenizer.frames import AudioFrames, Source, Tokenizer, join_frames
from tokenizer.loading import load_tokenizer

pytestmark = pytest.mark.parametrize("kind", KINDS)
FRAMES = 40
"""Enough to pass every look-ahead, window and chunk of the tokenizers twice."""
PART = 16
"""Recordings are cut at multiples of this part of a frame, or what comes next to it."""


def decodings(tokenizer: Tokenizer, frames: AudioFrames) -> list[tuple[Source, Tensor, Tensor]]:
    """Source, frames and what the tokenizer decodes of them at once."""
    return [
        ("latents", frames.latents, tokenizer.decode_latents(frames.latents)),
        ("codes", frames.codes, tokenizer.decode_codes(frames.codes)),
    ]


def test_shapes_and_types(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    hop, count = tokenizer.hop_length, tokenizer.num_codebooks
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.frame_rate_hz * hop == pytest.approx(tokenizer.sample_rate_hz)
    waveform, lengths = noise(10 * hop + 1, batch=2), torch.tensor([10 * hop + 1, hop + 1])
    copies = waveform.clone(), lengths.clone()
    frames = tokenizer.encode(waveform, lengths)
    assert torch.equal(waveform, copies[0]) and torch.equal(lengths, copies[1])
    assert frames.lengths.tolist() == [11, 2]
    assert frames.codes.shape == (2, count, 11) and frames.codes.dtype == torch.long
    assert int(frames.codes.min()) >= 0 and int(frames.codes.max()) < tokenizer.codebook_size
    assert frames.latents.shape == (2, 11, tokenizer.latent_dim) and frames.latents.dtype == torch.float32
    assert (frames.features is None) == (tokenizer.feature_dim == 0)
    if frames.features is not None:
        assert frames.features.shape == (2, 11, tokenizer.feature_dim) and frames.features.dtype == torch.float32
    audio = tokenizer.decode_latents(frames.latents)
    assert audio.shape == (2, 1, 11 * hop) and audio.dtype == torch.float32
    assert frames.latents[0].std(dim=0).min() > 1e-4 and audio.std() > 1e-4  # the weights are alive


@torch.no_grad()
def test_codes_are_those_of_the_latents_and_any_first_of_them_decode(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    frames = tokenizer.encode(noise(12 * tokenizer.hop_length, batch=2))
    assert torch.equal(tokenizer.quantize(frames.latents), frames.codes)
    sounds = []
    for k in range(1, tokenizer.num_codebooks + 1):
        latents = tokenizer.dequantize(frames.codes[:, :k])
        assert latents.shape == frames.latents.shape
        sounds.append(tokenizer.decode_codes(frames.codes[:, :k]))
        if not kind.startswith("encodec-causal"):  # the silence before its codes is quantized, too
            torch.testing.assert_close(tokenizer.decode_latents(latents), sounds[-1], atol=1e-5, rtol=0)
    assert all(sound.shape == (2, 1, 12 * tokenizer.hop_length) for sound in sounds)
    assert not any(torch.equal(few, more) for few, more in zip(sounds, sounds[1:], strict=False))


@torch.no_grad()
def test_nothing_in_nothing_out(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    frames = tokenizer.encode(torch.zeros(2, 1, 0))
    assert frames.codes.shape == (2, tokenizer.num_codebooks, 0)
    assert frames.latents.shape == (2, 0, tokenizer.latent_dim)
    assert tokenizer.decode_latents(frames.latents).shape == (2, 1, 0)
    assert tokenizer.decode_codes(frames.codes).shape == (2, 1, 0)
    assert tokenizer.streaming_encoder().flush().latents.shape == (1, 0, tokenizer.latent_dim)
    assert tokenizer.streaming_decoder().flush().shape == (1, 1, 0)
    assert tokenizer.encode(noise(1)).latents.shape == (1, 1, tokenizer.latent_dim)


def test_stereo_is_refused(kind: str) -> None:
    with pytest.raises(Exception, match=r"\(B, 1, S\)|1 S"):
        tokenizer_of(kind).encode(torch.zeros(1, 2, 640))


@torch.no_grad()
def test_frames_look_as_far_ahead_as_stated_and_no_further(kind: str) -> None:
    tokenizer, ahead = tokenizer_of(kind), KINDS[kind].lookahead
    hop = tokenizer.hop_length
    assert tokenizer.lookahead_frames == ahead
    waveform = noise(FRAMES * hop)
    before = tokenizer.encode(waveform)
    for t in (0, 1, 4, 9, 15):
        changed = waveform.clone()
        changed[..., (t + ahead + 1) * hop :] = noise(FRAMES * hop, seed=1)[..., (t + ahead + 1) * hop :]
        after = tokenizer.encode(changed)
        assert torch.equal(after.latents[:, : t + 1], before.latents[:, : t + 1])
        assert torch.equal(after.codes[..., : t + 1], before.codes[..., : t + 1])
        if before.features is not None and after.features is not None:
            assert torch.equal(after.features[:, : t + 1], before.features[:, : t + 1])
    reached = []
    for t in range(11):
        changed = waveform.clone()
        changed[..., (t + ahead) * hop : (t + ahead + 1) * hop] *= -1.5
        reached.append(not torch.equal(tokenizer.encode(changed).latents[:, t], before.latents[:, t]))
    assert any(reached)


@torch.no_grad()
def test_samples_look_as_far_ahead_as_known_and_no_further(kind: str) -> None:
    tokenizer, ahead = tokenizer_of(kind), KINDS[kind].decoder_lookahead
    hop = tokenizer.hop_length
    latents, others = (tokenizer.encode(noise(FRAMES * hop, seed=seed)).latents for seed in (0, 1))
    before = tokenizer.decode_latents(latents)
    for t in (0, 1, 4, 9, 15):
        changed = torch.cat([latents[:, : t + ahead + 1], others[:, t + ahead + 1 :]], dim=1)
        end = (t + 1) * hop
        assert torch.equal(tokenizer.decode_latents(changed)[..., :end], before[..., :end])
    reached = []
    for t in range(11):
        changed = latents.clone()
        changed[:, t + ahead] = others[:, t + ahead]
        own = slice(t * hop, (t + 1) * hop)
        reached.append(not torch.equal(tokenizer.decode_latents(changed)[..., own], before[..., own]))
    assert any(reached)


@torch.no_grad()
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    parts=st.integers(1, FRAMES * PART),
    odd=st.integers(0, 3),
    cuts=st.lists(st.integers(0, 8 * PART), max_size=8),
)
def test_streaming_equals_offline_however_it_is_cut(kind: str, parts: int, odd: int, cuts: list[int]) -> None:
    tokenizer = tokenizer_of(kind)
    hop = tokenizer.hop_length
    waveform = noise(max(1, parts * hop // PART - odd), batch=2)
    whole = tokenizer.encode(waveform)
    encoder = tokenizer.streaming_encoder(batch_size=2)
    pieces = [encoder.push(piece) for piece in pieces_of(waveform, [cut * hop // PART + odd for cut in cuts], -1)]
    assert_same_frames(join_frames([*pieces, encoder.flush()]), whole)
    for source, frames, expected in decodings(tokenizer, whole):
        decoder = tokenizer.streaming_decoder(batch_size=2, source=source)
        time = 2 if source == "codes" else 1
        found = [decoder.push(piece) for piece in pieces_of(frames, [cut // PART for cut in cuts], time)]
        joined = torch.cat([*found, decoder.flush()], dim=-1)
        assert joined.shape[-1] == frames.shape[time] * hop
        torch.testing.assert_close(joined, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_flush_ends_the_recording_and_the_next_push_starts_another(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    waveform = noise(11 * tokenizer.hop_length - 3, batch=2)
    whole = tokenizer.encode(waveform)
    encoder = tokenizer.streaming_encoder(batch_size=2)
    for _ in range(2):
        assert_same_frames(join_frames([encoder.push(waveform), encoder.flush()]), whole)
    for source, frames, expected in decodings(tokenizer, whole):
        decoder = tokenizer.streaming_decoder(batch_size=2, source=source)
        for _ in range(2):
            joined = torch.cat([decoder.push(frames), decoder.flush()], dim=-1)
            torch.testing.assert_close(joined, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    hop = tokenizer.hop_length
    lengths = [0, 1, 3 * hop + 7, 20 * hop, 24 * hop - 2, 24 * hop]
    rows = [noise(length, seed=length) for length in lengths]
    batch = torch.ones(len(lengths), 1, 24 * hop)  # what lies past a row's length is not silent, and must not matter
    for index, row in enumerate(rows):
        batch[index, :, : row.shape[-1]] = row[0]
    together = tokenizer.encode(batch, torch.tensor(lengths))
    assert together.codes.shape[2] == together.latents.shape[1] == 24
    for index, row in enumerate(rows):
        alone = tokenizer.encode(row)
        count = int(alone.lengths)
        assert count == int(together.lengths[index]) == -(-lengths[index] // hop)
        torch.testing.assert_close(together.latents[index, :count], alone.latents[0], atol=1e-5, rtol=0)
        assert torch.equal(together.codes[index, :, :count], alone.codes[0])
        if together.features is not None and alone.features is not None:
            torch.testing.assert_close(together.features[index, :count], alone.features[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_saved_equals_loaded(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind)
    tokenizer.save(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"config.json", "model.safetensors"}
    loaded = load_tokenizer(tmp_path / "saved")
    assert type(loaded) is type(tokenizer) and loaded.config == tokenizer.config  # type: ignore[attr-defined]
    assert loaded.fingerprint() == tokenizer.fingerprint() and len(loaded.fingerprint()) == 16
    waveform = noise(10 * tokenizer.hop_length - 3)
    assert_same_frames(loaded.encode(waveform), tokenizer.encode(waveform))
    codes = tokenizer.encode(waveform).codes
    assert torch.equal(loaded.decode_codes(codes), tokenizer.decode_codes(codes))
