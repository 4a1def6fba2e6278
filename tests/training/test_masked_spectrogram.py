"""Training of a semantic encoder: what is hidden stays hidden, one batch is learned, every weight moves."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tokenizer.test_dasheng import HOP, TINY, audio
from tokenizer.dasheng_weights import load_semantic_encoder
from tokenizer.errors import UserError
from training.masked_spectrogram import (
    MaskedAutoencoder,
    MaskedSpectrogramConfig,
    normalize_patches,
    to_patches,
)
from training.run import train_mapping
from training.tokenizer_data import TokenizerDataConfig

DATA = Path(__file__).parent.parent / "data"
SEGMENT: dict[str, Any] = {"sources": (str(DATA),), "batch_size": 4, "segment_frames": 5, "validation_fraction": 0.0}
SMALL = MaskedSpectrogramConfig(
    data=TokenizerDataConfig(**SEGMENT),
    encoder=TINY.semantic,
    decoder_dim=16,
    decoder_layers=1,
    decoder_heads=2,
    mask_share=0.6,
)


def mapping(output: Path, **changes: Any) -> dict[str, Any]:
    settings = {key: value for key, value in asdict(SMALL).items() if key != "data"}
    return {
        "task": "masked_spectrogram",
        "output": str(output),
        "max_steps": 3,
        "validate_every": 3,
        "checkpoint_every": 3,
        "precision": "fp32",
        "tensorboard": False,
        "ema_decay": 0.0,
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
        "masked_spectrogram": {**settings, "data": SEGMENT, **changes},
    }


def semantic_encoder(folder: Path) -> Path:
    """The folder of an encoder that was trained for three steps on real recordings."""
    train_mapping(mapping(folder / "semantic"), "test")
    return folder / "semantic" / "model"


def test_a_run_moves_every_weight_and_exports_an_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = MaskedAutoencoder(SMALL).encoder.state_dict()
    after = load_semantic_encoder(semantic_encoder(tmp_path)).state_dict()
    assert not [key for key in after if torch.equal(after[key].bfloat16(), before[key].bfloat16())]


def test_patches_are_the_encoder_s_and_normalized() -> None:
    spectrogram = torch.randn(2, 8, 20)
    patches = to_patches(spectrogram, 4)
    assert torch.equal(patches[1, 3], spectrogram[1, :, 12:16].flatten())
    normalized = normalize_patches(10 * patches - 40)
    torch.testing.assert_close(normalized.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalized.std(-1), torch.ones(2, 5), atol=1e-5, rtol=0)


def test_hidden_frames_are_hidden() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(SMALL).eval()
    tokens, visible = torch.randn(1, 5, 24), torch.tensor([[3, 0]])
    changed = tokens.clone()
    changed[:, [1, 2, 4]] += 1.0
    assert torch.equal(model.predict(tokens, visible), model.predict(changed, visible))
    changed[:, 3] += 1.0
    assert not torch.equal(model.predict(tokens, visible), model.predict(changed, visible))
    # The order in which visible frames are named does not matter: each goes back to its place.
    torch.testing.assert_close(model.predict(tokens, visible), model.predict(tokens, visible.flip(1)))


def test_one_batch_is_learned() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(replace(SMALL, decoder_dim=32))
    time = torch.arange(5 * HOP) / 1600
    waveform = torch.stack([torch.sin(2 * torch.pi * hz * time * (1 + time)) for hz in (100, 200, 300, 400)])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        loss = model(waveform, torch.Generator().manual_seed(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[0] > 0.8 and losses[-1] < 0.4 * losses[0]


def test_the_loss_is_of_hidden_frames_alone() -> None:
    torch.manual_seed(0)
    model = MaskedAutoencoder(SMALL).eval()
    waveform = audio(1, 5 * HOP)[:, 0]
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.bias.zero_()  # predicts the mean: each hidden patch then costs its variance, 31 / 32
    assert float(model(waveform, torch.Generator().manual_seed(0))) == pytest.approx(31 / 32, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_share": 1.5}, "mask_share=1.5 must lie between 0 and 1"),
        ({"mask_share": 0.95}, "mask_share=0.95 leaves 0 of 5 frames"),
        ({"decoder_heads": 3}, "decoder_heads=3 must divide decoder_dim=16"),
        ({"data": {**SEGMENT, "segment_frames": 6}}, "data.segment_frames=6 must be at least 2 and at most"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train_mapping(mapping(tmp_path, **change), "test")
