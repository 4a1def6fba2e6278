"""Enhancement in a tokenizer's space: causal, equal when streamed, alone or in a batch, and whole on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.recordings import BlockTokenizer
from tests.tokenizer.test_dasheng import TINY as TINY_DASHENG
from tests.tokenizer.test_dasheng import make
from tests.tokenizer.test_f3 import TINY as TINY_F3
from tests.tokenizer.test_f3 import audio
from tokenizer.enhancer import EmbeddingSpace, Enhancer, EnhancerConfig, SpeechEnhancer, View, load_enhancer
from tokenizer.errors import UserError
from tokenizer.f3 import F3Tokenizer
from tokenizer.frames import Tokenizer
from tokenizer.loading import load_tokenizer

SMALL = EnhancerConfig(hidden_dim=16, num_layers=2, num_heads=2, ffn_dim=24, window_frames=4)
KINDS = ["f3", "dasheng features", "dasheng latents", "dasheng centred"]


def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "f3":
        torch.manual_seed(0)
        return F3Tokenizer(TINY_F3).eval()
    return make(replace(TINY_DASHENG, causal=kind != "dasheng centred"))


def network(dim: int, *, normalized: bool = True) -> Enhancer:
    """Random weights, so that every frame it sees matters, and statistics that do."""
    torch.manual_seed(1)
    made = Enhancer(dim, SMALL, normalized=normalized).eval()
    with torch.no_grad():
        made.head.weight.normal_(std=0.3)
        made.head.bias.normal_(std=0.3)
    made.measure(0.5 + 2.0 * torch.randn(4, 50, dim))
    return made


def enhancer_of(kind: str) -> SpeechEnhancer:
    view: View | None = "latents" if kind == "dasheng latents" else None
    space = EmbeddingSpace(tokenizer_of(kind), view)
    return SpeechEnhancer(space, network(space.dim, normalized=space.view == "latents"))


def test_dasheng_is_enhanced_where_its_decoder_reads() -> None:
    tokenizer = tokenizer_of("dasheng")
    space = EmbeddingSpace(tokenizer)
    assert (space.view, space.dim) == ("features", TINY_DASHENG.semantic.hidden_dim)
    assert (EmbeddingSpace(tokenizer, "latents").dim, EmbeddingSpace(tokenizer_of("f3")).view) == (8, "latents")
    waveform = audio(1, 900)
    frames = tokenizer.encode(waveform)
    assert torch.equal(space.encode(waveform), frames.features)
    decoded = space.decode(space.encode(waveform))
    assert not torch.allclose(decoded, tokenizer.decode_latents(frames.latents), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_network_changes_nothing(kind: str) -> None:
    space = EmbeddingSpace(tokenizer_of(kind), "latents" if kind == "dasheng latents" else None)
    waveform = audio(2, 1000)
    fresh = SpeechEnhancer(space, Enhancer(space.dim, SMALL, normalized=space.view == "latents").eval())
    coded = space.decode(space.encode(waveform))[..., :1000]
    torch.testing.assert_close(fresh.enhance(waveform), coded, atol=1e-4, rtol=0)
    assert not torch.allclose(enhancer_of(kind).enhance(waveform), coded, atol=1e-3)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_frame_sees_itself_and_the_past_alone(normalized: bool) -> None:
    embeddings = torch.randn(1, 12, 6, requires_grad=True)
    enhanced, _ = network(6, normalized=normalized)(embeddings)
    for t in (0, 5, 11):
        # A random direction: the sum over channels of a normalized frame is zero whatever the input.
        wanted = (enhanced[0, t] * torch.randn(6, generator=torch.Generator().manual_seed(t))).sum()
        (gradient,) = torch.autograd.grad(wanted, embeddings, retain_graph=True)
        reach = gradient[0].abs().sum(dim=-1) > 0
        first = max(0, t - SMALL.num_layers * (SMALL.window_frames - 1))
        assert reach.tolist() == [first <= past <= t for past in range(12)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [[1, 700, 3, 96, 1500], [5000]])
def test_streaming_equals_offline(kind: str, pieces: list[int]) -> None:
    enhancer = enhancer_of(kind)
    waveform = audio(2, 2777)
    stream, made = enhancer.stream(2, decoded=True), []
    for piece in waveform.split([*pieces, 2777 - sum(pieces)] if sum(pieces) < 2777 else 2777, dim=-1):
        made.append(stream.push(piece))
    made.append(stream.flush())
    enhanced, decoded = (torch.cat(list(part), dim=-1) for part in zip(*made, strict=True))
    assert 2777 <= enhanced.shape[-1] < 2777 + enhancer.tokenizer.hop_length
    torch.testing.assert_close(enhanced[..., :2777], enhancer.enhance(waveform), atol=1e-5, rtol=0)
    torch.testing.assert_close(decoded[..., :2777], enhancer.decoded(waveform), atol=1e-5, rtol=0)
    assert enhancer.stream(2).push(waveform).decoded is None


def test_a_causal_tokenizer_stays_causal_through_to_the_sound() -> None:
    enhancer, waveform = enhancer_of("f3"), audio(1, 20 * 96)
    changed = waveform.clone()
    changed[..., 10 * 96 :] = 0.5
    before, after = enhancer.enhance(waveform), enhancer.enhance(changed)
    assert torch.equal(before[..., : 10 * 96], after[..., : 10 * 96])
    assert not torch.equal(before[..., 10 * 96 :], after[..., 10 * 96 :])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_a_batch_equals_the_row_alone(kind: str) -> None:
    enhancer, waveform = enhancer_of(kind), audio(3, 1300)
    together = enhancer.enhance(waveform)
    assert together.shape == waveform.shape
    for row in range(3):
        alone = enhancer.enhance(waveform[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)


def test_long_recordings_go_in_blocks_without_a_seam() -> None:
    made, embeddings = network(6), torch.randn(2, 40, 6)
    with torch.no_grad():
        expected, _ = made(embeddings)
    torch.testing.assert_close(made.whole(embeddings, block=7), expected, atol=1e-5, rtol=0)
    assert made.whole(embeddings[:, :0]).shape == (2, 0, 6)


def test_statistics_by_hand() -> None:
    made = Enhancer(3, SMALL, normalized=False)
    made.measure(torch.tensor([[[1.0, 0.0, 5.0], [3.0, 4.0, 5.0]]]))
    assert made.mean.tolist() == [2.0, 2.0, 5.0]
    torch.testing.assert_close(made.std, torch.tensor([1.0, 2.0, 0.01]))  # one hundredth of the mean deviation


def test_output_is_normalized_where_the_latents_are() -> None:
    enhanced = network(6).whole(torch.randn(1, 9, 6))
    torch.testing.assert_close(enhanced.square().mean(-1), torch.ones(1, 9), atol=1e-3, rtol=0)
    torch.testing.assert_close(enhanced.mean(-1), torch.zeros(1, 9), atol=1e-5, rtol=0)
    assert network(6, normalized=False).whole(torch.randn(1, 9, 6)).square().mean() > 2


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_embeddings_through_the_decoder(kind: str) -> None:
    space = enhancer_of(kind).space
    embeddings = space.encode(audio(1, 900)).requires_grad_()
    made = space.synthesize(embeddings)
    made.square().sum().backward()
    assert embeddings.grad is not None and embeddings.grad.abs().sum() > 0
    torch.testing.assert_close(made.detach().clamp(-1, 1), space.decode(embeddings.detach()), atol=1e-5, rtol=0)


def saved(folder: Path, kind: str = "f3") -> SpeechEnhancer:
    enhancer = enhancer_of(kind)
    enhancer.save(folder)
    return enhancer


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    enhancer = saved(tmp_path / "model", kind)
    found = load_enhancer(tmp_path / "model")
    assert found.space.view == enhancer.space.view and found.network.normalized == enhancer.network.normalized
    for key, value in enhancer.network.state_dict().items():
        assert torch.equal(found.network.state_dict()[key], value), key
    assert not found.network.training
    # The tokenizer's weights are rounded on disk, as wherever it is saved.
    enhancer.tokenizer.save(tmp_path / "tokenizer")
    exact = SpeechEnhancer(EmbeddingSpace(load_tokenizer(tmp_path / "tokenizer"), found.space.view), enhancer.network)
    waveform = audio(1, 1111)
    assert torch.equal(found.enhance(waveform), exact.enhance(waveform))


def test_the_folder_counts_as_its_tokenizer(tmp_path: Path) -> None:
    enhancer = saved(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint() == enhancer.tokenizer.fingerprint()


def change(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_is_wrong_with_a_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such enhancer folder"):
        load_enhancer(tmp_path / "none")
    folder = tmp_path / "model"
    saved(folder)
    for wrong in (tmp_path, folder / "tokenizer"):
        with pytest.raises(UserError, match=r"not an enhancer's folder; .* configs/enhancement-small.yaml"):
            load_enhancer(wrong)
    for values, message in (
        ({"format_version": 2}, "format_version=2"),
        ({"view": "codes"}, "lacks a valid view"),
        ({"view": "features"}, "f3 decodes no features"),
        ({"network": {"hidden": 3}}, "unknown key 'hidden'; did you mean 'hidden_dim'"),
        ({"network": {}}, "does not fit config.json"),
        ({"tokenizer": {"fingerprint": "0"}}, "the enhancer was trained with 0"),
    ):
        saved(folder)
        change(folder, **values)
        with pytest.raises(UserError, match=message):
            load_enhancer(folder)
    saved(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(UserError, match="cut short"):
        load_enhancer(folder)
    weights.unlink()
    with pytest.raises(UserError, match="missing"):
        load_enhancer(folder)


def test_what_a_tokenizer_cannot_do_is_told() -> None:
    space = EmbeddingSpace(BlockTokenizer())
    assert space.decode(space.encode(audio(1, 160))).shape == (1, 1, 160)
    with pytest.raises(UserError, match="block passes no gradients on; use f3 or dasheng"):
        space.synthesize(torch.zeros(1, 2, 4))
    with pytest.raises(UserError, match="block decodes no features; use latents"):
        EmbeddingSpace(BlockTokenizer(), "features")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_layers": 0}, "num_layers=0 must be at least 1"), ({"num_heads": 3}, "num_heads=3 must divide hidden_dim")],
)
def test_bad_shapes(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnhancerConfig(**settings)
