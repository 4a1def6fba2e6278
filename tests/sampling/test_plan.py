"""A plan's file gives back what was saved, and whatever else stands in it is told in one line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sampling.controls import Controls
from sampling.plan import Plan
from tests.support.tiny_audio_model import tiny_model
from tests.support.tiny_tokenizers import tokenizer_of
from tokenizer.errors import UserError


def made_plan(**asked: Any) -> Plan:
    model = tiny_model(stop_bias=-2.0)
    plan = model.generate(**{"text": "good morning", "num_samples": 3, "seed": 7, "keep_plan": True, **asked}).plan
    assert plan is not None
    return plan


def test_a_saved_plan_is_the_same_plan(tmp_path: Path) -> None:
    prompt = 0.1 * torch.randn(1, 4800, generator=torch.Generator().manual_seed(0))
    controls = Controls(temperature=0.9, min_p=0.01, repetition_penalty=1.1, stop_threshold=0.9, loudness=-20.0)
    plan = made_plan(audio=prompt, tags=["speech"], controls=controls)
    plan.save(tmp_path / "new" / "plan.safetensors")
    found = Plan.load(tmp_path / "new" / "plan.safetensors")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["plan.safetensors"]
    assert torch.equal(found.codes, plan.codes) and torch.equal(found.lengths, plan.lengths)
    assert (found.origin, found.text, found.tags) == (plan.origin, "good morning", ("speech",))
    assert found.request.controls == replace(controls, cfg=3.0)
    assert found.prompt_frames == plan.prompt_frames == 5
    ours, theirs = plan.request.prompt, found.request.prompt
    assert ours is not None and theirs is not None
    assert torch.equal(theirs.codes, ours.codes) and torch.equal(theirs.latents, ours.latents)
    for name in ("prefix", "unconditional", "seeds", "context_frames"):
        assert list_of(getattr(found.request, name)) == list_of(getattr(plan.request, name))
    with safe_open(tmp_path / "new" / "plan.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()["plan"])
    assert facts["frame_rate_hz"] == 25.0 and facts["seed"] == 7 and facts["prompt_frames"] == 5


def list_of(value: Any) -> Any:
    return value if isinstance(value, int) else list(value)


def test_codes_past_a_rows_end_are_zero() -> None:
    plan = made_plan()
    lengths = plan.lengths.tolist()
    assert len(set(lengths)) > 1
    for row, length in enumerate(lengths):
        assert not bool(plan.codes[row, :, length:].any()) and bool(plan.codes[row, :, :length].any())


def test_there_is_no_plan_unless_asked_for_and_none_of_a_continuous_model() -> None:
    assert tiny_model().generate(tags=["music"], duration=0.2).plan is None
    with pytest.raises(UserError, match="a continuous model draws no codes"):
        tiny_model("continuous").generate(tags=["music"], duration=0.2, keep_plan=True)


def rewritten(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata: dict[str, Any] = dict(file.metadata())
    metadata["plan"] = json.loads(metadata["plan"])
    change(tensors, metadata)
    if not isinstance(metadata.get("plan"), str):
        metadata["plan"] = json.dumps(metadata.get("plan"))
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, metadata: metadata.update(format="pt"), "is no plan"),
        (lambda tensors, metadata: metadata.update(format_version="9"), "format_version=9"),
        (lambda tensors, metadata: metadata.update(plan="{"), "is damaged"),
        (lambda tensors, metadata: metadata.update(plan=[1]), "its JSON is no object"),
        (lambda tensors, metadata: metadata["plan"].pop("seed"), "missing key 'seed'"),
        (lambda tensors, metadata: metadata["plan"].update(seed="x"), "must be of type int"),
        (lambda tensors, metadata: metadata["plan"]["controls"].update(top_x=1), "unknown key 'top_x'"),
        (lambda tensors, metadata: metadata["plan"]["controls"].update(top_k=0), "top_k=0"),
        (lambda tensors, metadata: tensors.pop("codes"), "is damaged"),
        (lambda tensors, metadata: tensors.update(codes=tensors["codes"][0].clone()), "is damaged"),
        (lambda tensors, metadata: tensors.update(codes=tensors["codes"] - 40), "a code is negative"),
        (lambda tensors, metadata: tensors.update(lengths=tensors["lengths"] + 1), "do not fit"),
        (lambda tensors, metadata: metadata["plan"].update(prompt_frames=3), "prompt has 5 frames, not 3"),
    ],
)
def test_files_that_do_not_fit_together_are_told_in_one_line(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "plan.safetensors"
    made_plan(audio=torch.full((1, 4800), 0.1), duration=0.2, num_samples=1).save(path)
    rewritten(path, change)
    with pytest.raises(UserError, match=message) as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    plan = made_plan(duration=0.2, num_samples=1)
    plan.save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"not a plan", whole[:100], whole[:-10]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is no plan, or damaged"):
            Plan.load(path)
    tokenizer_of("f3").save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="is no plan; `hybridlm generate --save-plan FILE` writes one"):
        Plan.load(tmp_path / "tokenizer" / "model.safetensors")
    with pytest.raises(UserError, match="no such plan"):
        Plan.load(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        plan.save(tmp_path / "plan.json")
