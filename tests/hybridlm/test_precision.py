"""Packed matrices: the same values at fp32, close ones at bf16 and int8, and clear refusals of what can't be."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hybridlm.checkpoint import Checkpoint, load_model
from hybridlm.precision import Int8Linear, PackedLinear, check, choose, pack, plain_state, unpack
from sampling.plan import Plan
from sampling.render import render
from tests.support.tiny_audio_model import tiny_model as tiny_audio_model
from tests.support.tiny_frames import VARIANTS, tiny_frames, tiny_model, tiny_prefix
from tokenizer.audio import read_audio
from tokenizer.errors import UserError

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def box() -> Checkpoint:
    return load_model("box")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices are treated as large ones are."""
    monkeypatch.setattr("hybridlm.precision.BLOCKED_FROM", 1000)
    monkeypatch.setattr("hybridlm.precision.ROUNDED_FROM", 200)


@torch.no_grad()
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_fp32_packs_without_loss(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model.nll(*tiny_prefix(), tiny_frames())
    assert pack(model, "fp32") is None
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    columns = [x for x in model.modules() if type(x) is nn.Linear and x.weight.t().is_contiguous()]
    assert len(packed) > 4 < len(columns) and model.decoder.layers[0].attention.qkv in packed
    after = model.nll(*tiny_prefix(), tiny_frames())
    torch.testing.assert_close(after.codes, before.codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after.latents, before.latents, atol=1e-4, rtol=1e-5)
    with pytest.raises(ValueError, match="no state to save"):
        model.state_dict()
    found = plain_state(model)
    assert set(found) == set(kept) and all(torch.equal(found[name], kept[name]) for name in kept)
    unpack(model)
    back = model.state_dict()
    assert list(back) == list(kept) and all(torch.equal(back[name], kept[name]) for name in kept)


@torch.no_grad()
def test_rounded_weights_cost_next_to_no_likelihood(box: Checkpoint) -> None:
    """Nats of a recording's codes within 0.5 %, of its latents within 0.05 a frame."""
    row = json.loads((DATA / "manifest.jsonl").read_text().splitlines()[1])
    waveform = read_audio(DATA / row["path"], box.tokenizer.sample_rate_hz)
    frames = box.tokenizer.encode(waveform.reshape(1, 1, -1))
    ids = torch.tensor([box.text.encode(row["text"], row["tags"])])
    exact = box.model.nll(ids, torch.ones_like(ids, dtype=torch.bool), frames)
    for precision in ("int8", "bf16"):
        model = copy.deepcopy(box.model)
        try:
            pack(model, precision)
        except UserError:
            assert precision == "bf16"  # not on every machine
            continue
        rounded = model.nll(ids, torch.ones_like(ids, dtype=torch.bool), frames)
        assert not torch.equal(rounded.codes, exact.codes)
        assert abs(float(rounded.codes.sum() / exact.codes.sum()) - 1) < 0.005
        assert abs(float((rounded.latents - exact.latents).mean())) < 0.05


@torch.no_grad()
def test_int8_rows_do_not_depend_on_their_batch() -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(24, 48), torch.randn(24), torch.randn(7, 48)
    product = Int8Linear(weight, bias)
    together = product(x)
    assert torch.equal(together, torch.cat([product(x[row : row + 1]) for row in range(7)]))
    assert float((product.packed * product.scales[:, None].float() - weight).abs().max()) <= 0.5 * float(
        product.scales.max()
    )
    torch.testing.assert_close(together, x @ weight.T + bias, atol=0.1, rtol=0.02)


def test_what_is_drawn_at_fp32_is_what_was_drawn_before(box: Checkpoint) -> None:
    from sampling.pipeline import AudioModel, load

    plain = AudioModel(box.model, box.tokenizer, box.text).generate(tags=["music"], duration=0.6, seed=3)
    packed = load("box").generate(tags=["music"], duration=0.6, seed=3)
    assert torch.equal(plain.frames.codes, packed.frames.codes)
    torch.testing.assert_close(plain.waveform, packed.waveform, atol=1e-5, rtol=0)


def test_auto_says_what_it_chose_and_measures_once(box: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    import hybridlm.precision

    monkeypatch.setattr(hybridlm.precision, "_chosen", {})
    times = iter([9.0] * 5 + [9.0] * 5 + [3.0] * 5)  # fp32, bf16, int8
    monkeypatch.setattr(hybridlm.precision, "_time", lambda *_: next(times))
    monkeypatch.setattr(hybridlm.precision, "_has_bf16", lambda _: True)
    chosen = choose(box.model)
    assert chosen.precision == "int8" and "int8: 3.0x fp32 here, not bf16: 1.0x fp32" in chosen.reason
    assert choose(box.model) is chosen  # the times would be used up
    monkeypatch.setattr(hybridlm.precision, "_chosen", {})
    times = iter([9.0] * 5 + [4.0] * 5 + [3.7] * 5)
    assert choose(box.model).precision == "bf16"  # a tenth is not worth the exactness


@pytest.mark.usefixtures("small")
def test_a_plan_knows_its_precision(tmp_path: Path) -> None:
    model = tiny_audio_model()
    plain = model.origin
    model.pack("fp32")
    assert model.origin == plain
    model.pack("int8")  # what is not rounded may still change
    made = model.generate(tags=["music"], duration=0.4, keep_plan=True)
    assert made.plan is not None
    assert made.plan.origin.precision == "int8" and made.plan.origin.model == plain.model
    made.plan.save(tmp_path / "plan.safetensors")
    again = render(model, Plan.load(tmp_path / "plan.safetensors"))
    assert torch.equal(again.waveform, made.waveform)


@pytest.mark.usefixtures("small")
def test_matrices_of_odd_width_stay() -> None:
    """The kernel reads 16 inputs at once: of others it would read past the end."""
    model = tiny_model()
    told = pack(model, "int8")
    assert told is not None and "stay at fp32" in told
    rounded = [x for x in model.modules() if isinstance(x, Int8Linear)]
    assert rounded and not any(x.packed.shape[1] % 16 for x in rounded)
    model.nll(*tiny_prefix(), tiny_frames())


@pytest.mark.usefixtures("small")
def test_what_can_not_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="precision='fp8' must be one of auto, fp32, bf16, int8"):
        check("fp8", torch.device("cpu"))
    with pytest.raises(UserError, match="int8 is for CPUs, not for cuda; use bf16"):
        check("int8", torch.device("cuda"))
    monkeypatch.setattr("hybridlm.precision._has_bf16", lambda _: False)
    with pytest.raises(UserError, match="this cpu lacks AVX512-BF16 and AMX; use fp32"):
        check("bf16", torch.device("cpu"))
    model = tiny_audio_model()
    model.pack("int8")
    with pytest.raises(UserError, match=r"loaded at precision=int8.*load it at fp32"):
        model.pack("fp32")
    monkeypatch.setattr("hybridlm.precision.adapter_names", lambda _: ["ann"])
    with pytest.raises(UserError, match="needs a model without adapters; merge first"):
        tiny_audio_model().pack("int8")
