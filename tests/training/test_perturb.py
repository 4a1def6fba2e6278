import json
from pathlib import Path

import pytest
import torch

from tokenizer.audio import read_audio, write_audio
from tokenizer.errors import UserError
from tokenizer.pitch import track_pitch
from training.manifest import read_manifest
from training.perturb import LARGEST_DELAY_S, SAMPLE_RATE_HZ, perturb


def corpus(folder: Path) -> Path:
    """A 200 Hz tone with a text, a clip of another set, and one of the test split."""
    time = torch.arange(SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    tone = sum(torch.sin(2 * torch.pi * 200 * k * time) / k for k in range(1, 6))[None] * 0.2
    rows = []
    for name, label, split in (("a", "tone", "train"), ("b", "other", "train"), ("c", "tone", "test")):
        write_audio(folder / f"{name}.wav", tone, SAMPLE_RATE_HZ)
        rows.append({"path": f"{name}.wav", "set": label, "split": split, "text": name.upper(), "tags": ["hum"]})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_copies_are_faster_and_higher_and_keep_what_is_known_of_them(tmp_path: Path) -> None:
    count, problems = perturb(corpus(tmp_path), tmp_path / "out", speeds=(0.8, 1.25), where={"set": "tone"})
    assert (count, problems) == (2, [])
    for clip, speed in zip(read_manifest(tmp_path / "out").clips, (0.8, 1.25), strict=True):
        assert (clip.text, clip.tags, clip.split) == ("A", ("hum",), "train")
        assert clip.labels == {"set": "tone", "speed": f"{speed:g}", "source": "a.wav"}
        waveform = read_audio(clip.path, SAMPLE_RATE_HZ)
        seconds = waveform.shape[1] / SAMPLE_RATE_HZ
        assert 1 / speed <= seconds <= 1 / speed + LARGEST_DELAY_S + 1e-3
        pitch_hz, periodicity = track_pitch(waveform, SAMPLE_RATE_HZ, hop=240)
        assert pitch_hz[periodicity > 0.8].median().item() == pytest.approx(200 * speed, rel=0.02)


def test_a_copy_at_speed_1_lies_elsewhere_on_the_frame_grid(tmp_path: Path) -> None:
    perturb(corpus(tmp_path), tmp_path / "out", speeds=(1.0, 1.0), where={"set": "tone"}, seed=3)
    original = read_audio(tmp_path / "a.wav", SAMPLE_RATE_HZ)
    delays = []
    for clip in read_manifest(tmp_path / "out").clips:
        waveform = read_audio(clip.path, SAMPLE_RATE_HZ)
        delays.append(waveform.shape[1] - original.shape[1])
        assert torch.allclose(waveform[:, delays[-1] :], original, atol=1e-4)
        assert not waveform[:, : delays[-1]].any()
    assert 0 <= min(delays) < max(delays) <= LARGEST_DELAY_S * SAMPLE_RATE_HZ


def test_a_bad_file_is_reported_and_the_rest_is_copied(tmp_path: Path) -> None:
    (corpus(tmp_path) / "b.wav").write_bytes(b"no audio")
    count, problems = perturb(tmp_path, tmp_path / "out", speeds=(1.0,))
    assert count == 1 and len(problems) == 1 and "b.wav" in problems[0]


@pytest.mark.parametrize("speeds", [(0.0,), (3.0,), (1.005,)])
def test_a_speed_out_of_range_is_refused(tmp_path: Path, speeds: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="speed"):
        perturb(corpus(tmp_path), tmp_path / "out", speeds=speeds)
