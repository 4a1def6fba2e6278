import math

import pytest
import torch
from jaxtyping import TypeCheckError

from tokenizer.mel import CausalLogMel, MultiResolutionMelLoss, mel_filterbank

RATE = 24_000


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sine(hz: float, num_samples: int, amplitude: float = 1.0) -> torch.Tensor:
    return amplitude * torch.sin(2 * math.pi * hz * torch.arange(num_samples) / RATE)[None, None]


@pytest.mark.parametrize(("n_fft", "hop_length"), [(1024, 320), (2048, 960), (512, 960)])
def test_frames_see_no_sample_after_their_end(n_fft: int, hop_length: int) -> None:
    mel = CausalLogMel(RATE, n_fft, hop_length, 40)
    waveform = noise(1, 1, 6 * hop_length)
    frame = 3
    changed = waveform.clone()
    changed[..., (frame + 1) * hop_length :] = 0.7
    assert torch.equal(mel(waveform)[:, : frame + 1], mel(changed)[:, : frame + 1])
    waveform.requires_grad_()
    mel(waveform)[:, frame].sum().backward()
    gradient = waveform.grad[0, 0]
    end = (frame + 1) * hop_length
    assert bool((gradient[end:] == 0).all())
    assert bool((gradient[max(0, end - n_fft) : end].abs() > 0).float().mean() > 0.9), "the whole window counts"


@pytest.mark.parametrize("num_samples", [0, 1, 319, 320, 321, 3333])
def test_last_frame_is_filled_with_silence(num_samples: int) -> None:
    mel = CausalLogMel(RATE, 1024, 320, 40)
    waveform = noise(2, 1, num_samples)
    frames = mel(waveform)
    assert frames.shape == (2, math.ceil(num_samples / 320), 40)
    filled = torch.nn.functional.pad(waveform, (0, -num_samples % 320))
    torch.testing.assert_close(frames, mel(filled))


def test_pieces_with_context_equal_the_whole() -> None:
    mel = CausalLogMel(RATE, 1024, 320, 40)
    waveform = noise(1, 1, 320 * 9)
    cut = 320 * 4
    tail = mel(waveform[..., cut:], context=waveform[..., cut - mel.context_samples : cut])
    torch.testing.assert_close(torch.cat([mel(waveform[..., :cut]), tail], dim=1), mel(waveform))


def test_sine_lights_up_its_own_band() -> None:
    mel = CausalLogMel(RATE, 2048, 960, 64)
    bank = mel_filterbank(RATE, 2048, 64)
    for hz in (300.0, 1000.0, 6000.0):
        nearest = int(bank[round(hz * 2048 / RATE)].argmax())
        assert int(mel(sine(hz, RATE))[0, 10].argmax()) == nearest


def test_silence_is_the_logarithm_of_the_floor() -> None:
    mel = CausalLogMel(RATE, 1024, 320, 40, floor=1e-3)
    assert mel(torch.zeros(1, 1, 640)).unique().tolist() == [pytest.approx(math.log(1e-3))]


def test_filters_sum_to_one_and_empty_ones_are_refused() -> None:
    torch.testing.assert_close(mel_filterbank(RATE, 512, 64).sum(0), torch.ones(64))
    with pytest.raises(ValueError, match="num_mels=200 leaves bands empty at n_fft=256"):
        mel_filterbank(RATE, 256, 200)


def test_shapes_are_checked() -> None:
    with pytest.raises(TypeCheckError):
        CausalLogMel(RATE, 1024, 320, 40)(torch.zeros(1, 320))


def test_loss_is_zero_for_equal_and_grows_with_distance() -> None:
    loss = MultiResolutionMelLoss(RATE)
    target = sine(440.0, 12_000, 0.3) + 0.05 * noise(1, 1, 12_000)
    assert loss(target, target).item() == 0.0
    distances = [loss(target + amount * noise(1, 1, 12_000, seed=1), target).item() for amount in (0.01, 0.1, 1.0)]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_log_term_is_the_ratio_of_levels() -> None:
    target = noise(2, 1, 8_000)
    loss = MultiResolutionMelLoss(RATE, magnitude_weight=0.0)
    assert loss(target / 4, target).item() == pytest.approx(math.log(4), rel=1e-3)


def test_loss_sees_a_shift_in_pitch_but_hardly_one_of_a_few_samples() -> None:
    loss = MultiResolutionMelLoss(RATE)
    target = sine(440.0, 12_000, 0.3)
    moved = torch.roll(target, 7, dims=-1)
    assert loss(sine(523.0, 12_000, 0.3), target) > 3 * loss(moved, target)


def test_descending_the_loss_restores_the_spectrum() -> None:
    loss = MultiResolutionMelLoss(RATE, n_ffts=(256, 512), num_mels=(40, 64))
    target = 0.1 * noise(1, 1, 1_500)
    found = (0.01 * noise(1, 1, 1_500, seed=1)).requires_grad_()
    optimizer = torch.optim.Adam([found], lr=2e-2)
    start = loss(found, target).item()
    for _ in range(25):
        optimizer.zero_grad()
        value = loss(found, target)
        value.backward()
        optimizer.step()
    assert value.item() < 0.5 * start


@pytest.mark.parametrize("num_samples", [1, 100])
def test_short_and_silent_waveforms_have_finite_gradients(num_samples: int) -> None:
    loss = MultiResolutionMelLoss(RATE)
    silent = torch.zeros(1, 1, num_samples, requires_grad=True)
    loss(silent, noise(1, 1, num_samples)).backward()
    assert bool(torch.isfinite(silent.grad).all())


def test_buffers_stay_out_of_checkpoints_and_resolutions_must_pair() -> None:
    assert not MultiResolutionMelLoss(RATE).state_dict()
    assert not CausalLogMel(RATE, 1024, 320, 40).state_dict()
    with pytest.raises(ValueError, match="of one length"):
        MultiResolutionMelLoss(RATE, n_ffts=(256,), num_mels=(40, 64))
