"""EnCodec as a tokenizer: parity with the package, causality, batches, folders, and where weights come from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.encodec_reference import package_model
from tokenizer import encodec_weights
from tokenizer.encodec import SILENT_FRAMES, EncodecConfig, EncodecTokenizer
from tokenizer.encodec_weights import find_checkpoint, fold_weight_norm, read_checkpoint, rename
from tokenizer.errors import UserError

HOP = 320


@pytest.fixture(scope="module")
def reflect() -> EncodecTokenizer:
    return EncodecTokenizer.random(seed=0)


@pytest.fixture(scope="module")
def causal() -> EncodecTokenizer:
    return EncodecTokenizer.random(EncodecConfig(start="silence"), seed=0)


@pytest.fixture(scope="module")
def package(reflect: EncodecTokenizer):
    return package_model(reflect)


def noise(samples: int, batch: int = 1, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_parity_with_the_package(reflect: EncodecTokenizer, package) -> None:
    waveform = noise(20 * HOP, batch=2)
    frames = reflect.encode(waveform)
    [(codes, _)] = package.encode(waveform)
    assert torch.equal(frames.codes, codes)
    torch.testing.assert_close(frames.latents, package.encoder(waveform).transpose(1, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(reflect.decode_codes(codes), package.decode([(codes, None)]), atol=1e-5, rtol=0)
    latents = frames.latents
    expected = package.decoder(latents.transpose(1, 2))
    torch.testing.assert_close(reflect.decode_latents(latents), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_decoding_a_few_frames_is_the_package_s(reflect: EncodecTokenizer, package, steps: int) -> None:
    codes = torch.randint(1024, (1, 8, steps), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(reflect.decode_codes(codes), package.decode([(codes, None)]), atol=1e-5, rtol=0)


@torch.no_grad()
def test_silent_start_is_the_package_after_silence(causal: EncodecTokenizer, package) -> None:
    waveform = noise(12 * HOP)
    led = torch.cat([torch.zeros(1, 1, SILENT_FRAMES * HOP), waveform], dim=-1)
    [(codes, _)] = package.encode(led)
    assert torch.equal(causal.encode(waveform).codes, codes[..., SILENT_FRAMES:])
    decoded = package.decode([(codes, None)])[..., SILENT_FRAMES * HOP :]
    torch.testing.assert_close(causal.decode_codes(codes[..., SILENT_FRAMES:]), decoded, atol=1e-5, rtol=0)


def test_prefixes_of_codebooks(reflect: EncodecTokenizer, package) -> None:
    frames = reflect.encode(noise(10 * HOP))
    few = EncodecTokenizer(EncodecConfig(num_codebooks=2), reflect.state_dict())
    assert torch.equal(few.encode(noise(10 * HOP)).codes, frames.codes[:, :2])
    torch.testing.assert_close(few.decode_codes(frames.codes[:, :2]), reflect.decode_codes(frames.codes[:, :2]))
    errors = [(frames.latents - reflect.dequantize(frames.codes[:, :k])).square().mean() for k in (1, 2, 8)]
    assert errors[0] > errors[1] > errors[2]
    assert torch.equal(reflect.quantize(frames.latents), frames.codes)
    with pytest.raises(ValueError, match="3 codebooks, but the tokenizer has 1 to 2"):
        few.decode_codes(frames.codes[:, :3])


@pytest.mark.parametrize("name", ["reflect", "causal"])
def test_only_the_first_three_frames_ever_look_ahead(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: EncodecTokenizer = request.getfixturevalue(name)
    waveform = noise(12 * HOP).requires_grad_()
    latents = tokenizer.encode(waveform).latents
    reach = []  # per frame: the last frame whose samples have an influence
    for t in range(12):
        (gradient,) = torch.autograd.grad(latents[:, t].square().sum(), waveform, retain_graph=True)
        reach.append(int(gradient.abs().flatten().nonzero().max()) // HOP)
    assert reach == ([6, 5, 4] if name == "reflect" else [0, 1, 2]) + list(range(3, 12))


@torch.no_grad()
def test_causal_frames_and_samples_come_at_once(causal: EncodecTokenizer) -> None:
    encoder, decoder = causal.streaming_encoder(), causal.streaming_decoder(source="codes")
    for _ in range(3):
        frames = encoder.push(noise(HOP))
        assert frames.codes.shape[2] == 1
        assert decoder.push(frames.codes[:, :2]).shape[-1] == HOP
    assert encoder.flush().codes.shape[2] == decoder.flush().shape[-1] == 0


@torch.no_grad()
def test_reflecting_start_waits_for_the_seventh_frame(reflect: EncodecTokenizer) -> None:
    encoder, decoder = reflect.streaming_encoder(), reflect.streaming_decoder()
    frames = [encoder.push(piece) for piece in noise(9 * HOP).split(HOP, dim=-1)]
    assert [piece.latents.shape[1] for piece in frames] == [0] * reflect.lookahead_frames + [7, 1, 1]
    latents = torch.cat([piece.latents for piece in frames], dim=1)
    samples = [decoder.push(latents[:, t : t + 1]).shape[-1] for t in range(9)]
    assert samples == [0] * 6 + [7 * HOP, HOP, HOP]


@torch.no_grad()
def test_blocks_do_not_show(reflect: EncodecTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    waveform = noise(30 * HOP - 5)
    whole = reflect.encode(waveform)
    audio = reflect.decode_codes(whole.codes)
    monkeypatch.setattr("tokenizer.encodec.BLOCK_FRAMES", 8)
    blocks = reflect.encode(waveform)
    assert torch.equal(blocks.codes, whole.codes)
    torch.testing.assert_close(blocks.latents, whole.latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(reflect.decode_codes(whole.codes), audio, atol=1e-5, rtol=0)


def test_the_global_generator_stays_as_it_is() -> None:
    state = torch.random.get_rng_state()
    EncodecTokenizer.random(seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_fingerprint_tells_tokenizers_apart(reflect: EncodecTokenizer, causal: EncodecTokenizer) -> None:
    others = [
        causal,
        EncodecTokenizer.random(seed=1),
        EncodecTokenizer(EncodecConfig(num_mels=64), reflect.state_dict()),
    ]
    prints = {tokenizer.fingerprint() for tokenizer in [reflect, *others]}
    assert len(prints) == 4
    assert all(len(value) == 16 for value in prints)


@pytest.mark.parametrize(
    ("settings", "message"), [({"num_codebooks": 33}, "num_codebooks=33"), ({"n_fft": 64}, "n_fft=64")]
)
def test_bad_settings(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncodecConfig(**settings)  # type: ignore[arg-type]


@pytest.fixture
def published(package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the published file, in its format, with the checksum in its name."""
    file = tmp_path / "weights.th"
    torch.save(package.state_dict(), file)
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(encodec_weights, "CHECKPOINT", f"encodec_24khz-{checksum}.th")
    monkeypatch.setattr(encodec_weights, "URL", (tmp_path / "nowhere").as_uri())
    monkeypatch.delenv(encodec_weights.ENVIRONMENT, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(encodec_weights, "_hub_cache", lambda: None)
    return file.rename(tmp_path / encodec_weights.CHECKPOINT)


def test_published_weights_are_found_and_folded(
    reflect: EncodecTokenizer, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waveform = noise(8 * HOP)
    expected = reflect.encode(waveform).codes
    assert torch.equal(EncodecTokenizer.pretrained(repository=published).encode(waveform).codes, expected)
    assert find_checkpoint(published.parent) == published
    monkeypatch.setenv(encodec_weights.ENVIRONMENT, str(published))
    assert find_checkpoint() == published
    monkeypatch.delenv(encodec_weights.ENVIRONMENT)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / published.name
    cached.parent.mkdir(parents=True)
    published.rename(cached)
    assert find_checkpoint() == cached


def test_published_weights_are_downloaded_where_they_can_be(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodec_weights, "URL", published.as_uri())
    found = find_checkpoint()
    assert found == Path(torch.hub.get_dir()) / "checkpoints" / published.name
    assert found.read_bytes() == published.read_bytes()
    assert [path.name for path in found.parent.iterdir()] == [found.name]


def test_folding_is_exactly_weight_norm(package) -> None:
    with torch.no_grad():
        package.encoder(torch.zeros(1, 1, HOP))  # weight_norm computes its weight on the way forward
    folded = fold_weight_norm(package.state_dict())
    assert torch.equal(folded["encoder.model.3.conv.conv.weight"], package.encoder.model[3].conv.conv.weight)


def test_offline_message_says_which_file_goes_where(published: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_checkpoint()
    message = str(caught.value)
    assert f"put {published.name} into {torch.hub.get_dir()}/checkpoints" in message
    assert "HYBRIDLM_ENCODEC" in message
    assert "\n" not in message


def test_an_unknown_pickle_is_never_opened(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published.write_bytes(published.read_bytes() + b"0")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled a file of unknown content"))
    with pytest.raises(UserError, match="SHA-256"):
        read_checkpoint(published)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("encoder.layers.0.conv.bias", "encoder.model.0.conv.conv.bias"),
        ("encoder.layers.0.conv.parametrizations.weight.original0", "encoder.model.0.conv.conv.weight_g"),
        ("encoder.layers.1.block.3.conv.weight_v", "encoder.model.1.block.3.conv.conv.weight_v"),
        ("encoder.layers.1.shortcut.conv.weight_g", "encoder.model.1.shortcut.conv.conv.weight_g"),
        ("encoder.layers.13.lstm.weight_ih_l0", "encoder.model.13.lstm.weight_ih_l0"),
        ("encoder.layers.3.conv.bias", "encoder.model.3.conv.conv.bias"),
        ("decoder.layers.0.conv.bias", "decoder.model.0.conv.conv.bias"),
        ("decoder.layers.3.conv.bias", "decoder.model.3.convtr.convtr.bias"),
        ("decoder.layers.12.conv.parametrizations.weight.original1", "decoder.model.12.convtr.convtr.weight_v"),
        ("decoder.layers.13.block.1.conv.weight_g", "decoder.model.13.block.1.conv.conv.weight_g"),
        ("decoder.layers.15.conv.weight_g", "decoder.model.15.conv.conv.weight_g"),
        ("quantizer.layers.31.codebook.embed", "quantizer.vq.layers.31._codebook.embed"),
    ],
)
def test_names_of_transformers(theirs: str, ours: str) -> None:
    marker = "encoder.layers.0.conv.bias"  # what tells such a file
    tensor = torch.zeros(1)
    renamed = rename({marker: torch.ones(1), theirs: tensor})
    assert renamed[ours] is tensor
    assert rename({ours: tensor}) == {ours: tensor}


def test_foreign_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    save_file({"encoder.model.0.conv.conv.bias": torch.zeros(32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="EnCodec weights lack 'encoder"):
        EncodecTokenizer.pretrained(repository=tmp_path)
    with pytest.raises(UserError, match="neither a file nor a folder"):
        find_checkpoint(tmp_path / "absent")
