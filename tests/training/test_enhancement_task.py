"""Training of enhancement: the tokenizer provably stays as it was, everything else moves, and one batch is learned."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tokenizer.test_dasheng import make
from tests.tokenizer.test_f3 import TINY
from tokenizer.audio import write_audio
from tokenizer.enhancer import EnhancerConfig, load_enhancer
from tokenizer.errors import UserError
from tokenizer.f3 import F3Tokenizer
from tokenizer.loading import load_tokenizer
from tokenizer.settings import from_mapping
from training.enhancement_task import EnhancementTask, EnhancementTaskConfig
from training.run import train_mapping
from training.task import Batch

SMALL = asdict(EnhancerConfig(hidden_dim=32, num_layers=2, num_heads=2, ffn_dim=48, window_frames=6))


def write_kinds(folder: Path, rate: int) -> dict[str, str]:
    """Folders of chirping `speech` and of hissing `noise`."""
    time = torch.arange(3 * rate) / rate
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        chirp = 0.4 * torch.sin(2 * torch.pi * (60 + 20 * number + 30 * time) * time)
        hiss = 0.2 * torch.randn(time.shape, generator=generator)
        for kind, waveform in (("speech", chirp), ("noise", hiss)):
            (folder / kind).mkdir(exist_ok=True)
            write_audio(folder / kind / f"{number}.wav", waveform[None], rate)
    return {kind: str(folder / kind) for kind in ("speech", "noise")}


@pytest.fixture(scope="module")
def f3(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("f3")
    torch.manual_seed(0)
    F3Tokenizer(TINY).save(folder / "tokenizer")
    return {"tokenizer": str(folder / "tokenizer"), **write_kinds(folder, TINY.sample_rate_hz)}


@pytest.fixture(scope="module")
def dasheng(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("dasheng")
    tokenizer = make()
    tokenizer.save(folder / "tokenizer")
    return {"tokenizer": str(folder / "tokenizer"), **write_kinds(folder, tokenizer.sample_rate_hz)}


def mapping(places: dict[str, str], output: Path, **task: Any) -> dict[str, Any]:
    data = {"sources": [places["speech"]], "batch_size": 4, "segment_frames": 8, "validation_segments": 5}
    return {
        "task": "enhancement",
        "output": str(output),
        "max_steps": 4,
        "validate_every": 4,
        "checkpoint_every": 2,
        "precision": "fp32",
        "tensorboard": False,
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 10},
        "enhancement": {
            "tokenizer": places["tokenizer"],
            "data": {**data, "validation_fraction": 0.0},
            "noise": {"sources": [places["noise"]], "validation_fraction": 0.0},
            "enhancer": SMALL,
            "losses": {"mel_weight": 0.1, "mel_share": 0.5},
            **task,
        },
    }


def task_of(places: dict[str, str], **settings: Any) -> EnhancementTask:
    torch.manual_seed(0)
    return EnhancementTask(
        from_mapping(EnhancementTaskConfig, mapping(places, Path("unused"), **settings)["enhancement"])
    )


def first_batch(task: EnhancementTask) -> Batch:
    return next(task.batches(seed=0, rank=0, world_size=1, skip=0))


@pytest.mark.parametrize("kind", ["f3", "dasheng"])
def test_the_tokenizer_does_not_change_and_all_else_does(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    places = request.getfixturevalue(kind)
    before = load_tokenizer(places["tokenizer"])
    start = task_of(places).network.state_dict()
    train_mapping({**mapping(places, tmp_path / "run"), "ema_decay": 0.0}, "test")
    for folder in ("model", "best"):
        after = load_enhancer(tmp_path / "run" / folder)
        assert isinstance(after.tokenizer, torch.nn.Module) and isinstance(before, torch.nn.Module)
        kept = after.tokenizer.state_dict()
        assert kept.keys() == before.state_dict().keys()
        for key, value in before.state_dict().items():
            assert torch.equal(kept[key], value), key
    assert after.space.view == ("features" if kind == "dasheng" else "latents")
    for key, value in after.network.state_dict().items():
        assert torch.equal(value, start[key]) == (key in ("mean", "std")), key


def test_nothing_of_the_tokenizer_is_within_reach_of_training(f3: dict[str, str]) -> None:
    task = task_of(f3)
    assert isinstance(task.tokenizer, F3Tokenizer)
    weights = {key: value.clone() for key, value in task.tokenizer.state_dict().items()}
    loss, _ = task.loss("model", first_batch(task), step=0, generator=torch.Generator())
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in task.tokenizer.parameters())
    assert not task.tokenizer.training
    assert all(torch.equal(value, weights[key]) for key, value in task.tokenizer.state_dict().items())
    mine = {id(p) for module in task.modules().values() for p in module.parameters()}
    assert mine and not mine & {id(p) for p in task.tokenizer.parameters()}


def test_an_interrupted_run_equals_an_uninterrupted_one(f3: dict[str, str], tmp_path: Path) -> None:
    train_mapping(mapping(f3, tmp_path / "whole"), "test")
    train_mapping({**mapping(f3, tmp_path / "halves"), "max_steps": 2}, "test")
    train_mapping(mapping(f3, tmp_path / "halves"), "test", resume=True)
    one, two = (load_enhancer(tmp_path / name / "model").network.state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize("kind", ["f3", "dasheng"])
def test_one_batch_is_learned(kind: str, request: pytest.FixtureRequest) -> None:
    task = task_of(request.getfixturevalue(kind), losses={"embedding_weight": 1.0})
    batch = first_batch(task)
    optimizer = torch.optim.Adam(task.network.parameters(), lr=1e-2)
    history = []
    for step in range(150):
        loss, figures = task.loss("model", batch, step=step, generator=torch.Generator())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert history[0] == pytest.approx(float(figures["unchanged"]), rel=1e-3), "an untrained network changes nothing"
    assert history[-1] < 0.3 * history[0], (history[0], history[-1])


def test_the_mel_loss_alone_teaches_through_the_frozen_decoder(dasheng: dict[str, str]) -> None:
    task = task_of(dasheng, losses={"embedding_weight": 0.0, "mel_weight": 1.0, "mel_share": 0.5})
    batch, history = first_batch(task), []
    seen, whole = [], task.space.synthesize

    def watched(embeddings: torch.Tensor) -> torch.Tensor:
        seen.append(len(embeddings))
        return whole(embeddings)

    task.space.synthesize = watched  # type: ignore[method-assign]
    optimizer = torch.optim.Adam(task.network.parameters(), lr=1e-2)
    for step in range(40):
        loss, _ = task.loss("model", batch, step=step, generator=torch.Generator())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert set(seen) == {2}
    assert history[-1] < 0.9 * history[0], (history[0], history[-1])


def test_distances_count_in_deviations_of_clean_speech(dasheng: dict[str, str]) -> None:
    task = task_of(dasheng)
    clean = task._clean_embeddings()
    torch.testing.assert_close(task.network.mean, clean.flatten(0, 1).mean(0))
    assert not task.network.normalized and task.network.std.std() > 0
    assert float(task.distance(clean + 2 * task.network.std, clean)) == pytest.approx(4.0, rel=1e-4)
    assert task_of(dasheng, view="latents").network.normalized


def test_validation_says_where_it_began_and_how_far_it_could_come(f3: dict[str, str]) -> None:
    task = task_of(f3)
    with torch.no_grad():
        figures = task.validate()
    assert figures["embedding"] == pytest.approx(figures["unchanged"], rel=1e-3)
    assert figures["mel_enhanced"] == pytest.approx(figures["mel_noisy"], rel=1e-3)
    assert figures["loss"] == pytest.approx(figures["embedding"] + 0.1 * figures["mel_enhanced"])
    assert figures["mel_clean"] != pytest.approx(figures["mel_noisy"], rel=1e-3)
    names = [sample.name for sample in task.samples()]
    assert names == [f"{name}/{row}" for name in ("clean", "noisy", "enhanced") for row in range(4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "nowhere"}, "'nowhere' is not a folder"),
        ({"view": "features"}, "f3 decodes no features"),
        ({"view": "codes"}, "view='codes' must be one of latents, features"),
        ({"losses": {"mel_weight": -1}}, "mel_weight=-1.0 must not be negative"),
        ({"losses": {"embedding_weight": 0}}, "are both 0"),
        ({"losses": {"mel_share": 0}}, "mel_share=0.0 must be above 0"),
        ({"enhancer": {"num_heads": 7}}, "num_heads=7 must divide hidden_dim=256"),
        ({"noise": {"caches": ["nowhere"]}}, "nowhere"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str, f3: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train_mapping(mapping(f3, tmp_path / "run", **change), "test")
