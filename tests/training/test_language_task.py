"""Training of a language model: what it is shown, that it learns, and that it goes on exactly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hybridlm.checkpoint import load_model
from hybridlm.frame_nll import FrameNLL
from tests.support.toy_corpus import TINY_MODEL, write_cache
from tokenizer.errors import UserError
from tokenizer.settings import from_mapping
from training.corpus import Window
from training.examples import make_prefix
from training.language_loss import LanguageLossConfig, combine
from training.language_task import LanguageTask, LanguageTaskConfig
from training.loop import RunResult
from training.new_model import codebook_vectors
from training.run import train_mapping
from training.state import checkpoints


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_cache(tmp_path_factory.mktemp("corpus"))


def language(folders: dict[str, str], **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tokenizer": folders["tokenizer"],
        "data": {"caches": [folders["cache"]], "validation_fraction": 0.2, "batch_frames": 120},
        "text": {"vocab_size": 320},
        "model": dict(TINY_MODEL),
        "losses": {},
    }
    for name, values in changes.items():
        settings[name] = {**settings[name], **values}
    return settings


def task(folders: dict[str, str], output: Path, **changes: Any) -> LanguageTask:
    torch.manual_seed(0)
    config = from_mapping(LanguageTaskConfig, language(folders, **changes))
    return LanguageTask(config, output=output)


def run(folders: dict[str, str], output: Path, *, resume: bool = False, steps: int = 6, **changes: Any) -> RunResult:
    mapping = {
        "task": "language",
        "output": str(output),
        "max_steps": steps,
        "tensorboard": False,
        "device": "cpu",
        "checkpoint_every": 3,
        "optimizer": {"learning_rate": 0.003, "warmup_steps": 2},
        "language": language(folders, **changes),
    }
    return train_mapping(mapping, "test", resume)


def watch(trained: LanguageTask, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Notes (prefix, mask, frames) of every call of the model."""
    seen: list[tuple] = []
    original = trained.model.nll

    def forward(*inputs: Any, **settings: Any) -> FrameNLL:
        seen.append(inputs)
        return original(*inputs, **settings)

    monkeypatch.setattr(trained.model, "forward", forward)
    return seen


@pytest.mark.parametrize(
    ("representation", "more"),
    [("discrete", {}), ("continuous", {}), ("hybrid", {}), ("hybrid", {"flow_layers": 1, "flow_distill": 0.5})],
)
def test_one_batch_is_learned_and_every_parameter_moves(
    folders: dict[str, str], tmp_path: Path, representation: str, more: dict[str, Any]
) -> None:
    settings = {"representation": representation, "history_noise": 0.1, "sigma": 0.02, **more}
    trained = task(folders, tmp_path, model=settings)
    batch = next(trained.batches(seed=0, rank=0, world_size=1, skip=0))
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    optimizer = torch.optim.AdamW(trained.model.parameters(), lr=0.01, weight_decay=0.0)
    trained.model.train()
    losses = []
    for step in range(60):
        generator = torch.Generator().manual_seed(step)
        loss, _ = trained.loss("model", batch, step=step, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0
    still = [name for name, p in trained.model.named_parameters() if torch.equal(p, before[name])]
    assert not still


def test_codes_are_those_of_the_noised_latents(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = task(folders, tmp_path, model={"sigma": 0.5})
    # Codes far out and close together: half precision would find others.
    codebooks = trained.tokenizer.quantizer.codebooks
    codebooks.copy_(5.0 + 0.3 * torch.randn(codebooks.shape, generator=torch.Generator().manual_seed(0)))
    batch = next(trained.batches(seed=0, rank=0, world_size=1, skip=0))
    seen = watch(trained, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        trained.loss("model", batch, step=0, generator=torch.Generator().manual_seed(0))
    frames = seen[0][2]
    noise = frames.latents - batch["latents"]
    assert 0.45 < float(noise.std()) < 0.55
    assert torch.equal(frames.codes, trained.tokenizer.quantize(frames.latents))
    assert not torch.equal(frames.codes, trained.tokenizer.quantize(batch["latents"]))


def test_windows_know_what_they_cut_off(folders: dict[str, str], tmp_path: Path) -> None:
    trained = task(folders, tmp_path)
    cache = trained.train_data
    clip = next(i for i in range(len(cache)) if cache.index.has_text[i])
    length = cache.num_frames(clip)
    batch = trained.batch(cache, [Window(clip, 0, length), Window(clip, 0, length - 2), Window(clip, 2, length - 2)])
    assert batch["ended"].tolist() == [True, False, True]
    assert batch["aligned"].tolist() == [True, False, False]
    assert batch["text_mask"].any(dim=1).tolist() == [True, True, False]
    assert batch["lengths"].tolist() == [length, length - 2, length - 2]
    assert torch.equal(batch["latents"][2, : length - 2], batch["latents"][0, 2:])


def test_prefix_is_left_padded_tags_text_audio(folders: dict[str, str], tmp_path: Path) -> None:
    text = task(folders, tmp_path).text
    prefix = make_prefix(text, [("good morning", ["speech"]), (None, ["music"]), (None, [])])
    assert (prefix.ids[:, -1] == text.audio_id).all()
    assert prefix.mask.sum(dim=1).tolist() == [prefix.ids.shape[1], 2, 1]
    assert prefix.ids[1, -2] == text.tag_id("music")
    assert prefix.ids[0, 0] == text.tag_id("speech")
    assert text.decode(prefix.ids[0][prefix.text_mask[0]].tolist()) == "good morning"
    assert not prefix.text_mask[1:].any()
    short = make_prefix(text, [("good morning", ["speech"])], max_pieces=3)
    assert short.ids.tolist() == [[text.tag_id("speech"), text.audio_id]]


def test_hidden_text_leaves_the_tags(folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = task(folders, tmp_path, losses={"text_dropout": 1.0}, model={"condition_dropout": 0.0})
    batch = trained.batch(trained.train_data, [Window(i, 0, 5) for i in range(len(trained.train_data))])
    seen = watch(trained, monkeypatch)
    trained.loss("model", batch, step=0, generator=torch.Generator().manual_seed(0))
    assert batch["text_mask"].any()
    assert torch.equal(seen[0][1], batch["prefix_mask"] & ~batch["text_mask"])


def test_weights_of_the_parts() -> None:
    mask = torch.tensor([[True, True, False]])
    nll = FrameNLL(
        codes=torch.tensor([[[1.0, 3.0, 0.0], [10.0, 20.0, 0.0]]]),
        latents=torch.tensor([[8.0, 16.0, 0.0]]),
        stop=torch.tensor([[0.5, 0.5, 2.0, 0.0]]),
        correct=torch.tensor([[[True, False, False], [True, True, False]]]),
        mask=mask,
        stop_mask=torch.tensor([[True, True, True, False]]),
        alignment=torch.tensor([0.25]),
    )
    losses = LanguageLossConfig(
        code_weights=(3.0, 1.0), code_weight=2.0, latent_weight=0.5, stop_weight=4.0, alignment_weight=8.0
    )
    total, parts = combine(nll, losses, latent_dim=4, aligned=torch.tensor([True]))
    assert float(total) == pytest.approx(2.0 * (3 * 2 + 15) / 4 + 0.5 * 12 / 4 + 4.0 * 1.0 + 8.0 * 0.25)
    assert {name: float(value) for name, value in parts.items()} == pytest.approx(
        {"stop": 1.0, "code": 8.5, "first_code": 2.0, "accuracy": 0.75, "latent": 3.0, "alignment": 0.25}
    )


def test_code_vectors_are_the_codebooks(folders: dict[str, str], tmp_path: Path) -> None:
    tokenizer = task(folders, tmp_path).tokenizer
    torch.testing.assert_close(codebook_vectors(tokenizer), tokenizer.quantizer.codebooks, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("model", "warned"),
    [
        ({"code_embedding_dim": 3}, True),
        ({}, False),
        ({"code_embedding_dim": 3, "representation": "continuous"}, False),
    ],
)
def test_a_new_model_without_the_codebooks_is_warned_of(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], model: dict[str, Any], warned: bool
) -> None:
    run(folders, tmp_path / "run", steps=1, model=model)
    told = "warning: code embeddings start at random, not as the codec's codebooks"
    assert (told in capsys.readouterr().err) is warned


def test_a_run_resumes_exactly_and_leaves_a_model(folders: dict[str, str], tmp_path: Path) -> None:
    dropout = {"dropout": 0.2}
    run(folders, tmp_path / "whole", steps=6, model=dropout)
    original = LanguageTask.loss

    def crash(self, turn, batch, *, step, generator):
        if step == 4:
            raise MemoryError
        return original(self, turn, batch, step=step, generator=generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageTask, "loss", crash)
        with pytest.raises(MemoryError):
            run(folders, tmp_path / "parts", steps=6, model=dropout)
    run(folders, tmp_path / "parts", resume=True, steps=6, model=dropout)
    for name in ("model", "ema", "optimizer_model"):
        one, two = (checkpoints(tmp_path / run_name)[-1] / f"{name}.safetensors" for run_name in ("whole", "parts"))
        assert one.read_bytes() == two.read_bytes()
    found = load_model(tmp_path / "whole/model")
    assert found.text.tags == ["music", "speech"]
    assert found.model.config.num_codebooks == found.tokenizer.num_codebooks


def test_validation_does_not_depend_on_batches_or_chance(folders: dict[str, str], tmp_path: Path) -> None:
    first = task(folders, tmp_path)
    second = task(folders, tmp_path, data={"batch_frames": 40})
    second.model.load_state_dict(first.model.state_dict())
    first.model.eval()
    second.model.eval()
    torch.manual_seed(1)
    with torch.no_grad():
        figures = first.validate()
        torch.manual_seed(2)
        assert second.validate() == pytest.approx(figures, rel=1e-5)
    assert figures["loss"] == pytest.approx(figures["codes"] + figures["latents"] + figures["stop"])


def test_validation_hears_neither_train_nor_test(folders: dict[str, str], tmp_path: Path) -> None:
    trained = task(folders, tmp_path)
    keys = {
        name: {cache.index.clip(i).key for i in range(len(cache))}
        for name, cache in (("train", trained.train_data), ("validation", trained.validation_data))
    }
    assert keys["train"]
    assert keys["validation"]
    assert not keys["train"] & keys["validation"]
    assert not {"3.wav", "7.wav"} & (keys["train"] | keys["validation"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"hiden_dim": 8}}, "language.model: unknown key 'hiden_dim'; did you mean 'hidden_dim'?"),
        ({"model": {"num_codebooks": 4}}, "language.model.num_codebooks is decided by the tokenizer and the text"),
        ({"losses": {"code_weights": [1.0]}}, "losses.code_weights has 1 numbers, but the model predicts 3 codebooks"),
        ({"data": {"rules": [{"where": {"colour": "red"}}]}}, "no clip has the label 'colour'"),
        ({"data": {"caches": ["nowhere"]}}, "nowhere"),
        ({"data": {"caches": []}}, "caches=[] must name at least one folder"),
        ({"text": {"sentences": "nowhere.txt"}}, "text.sentences=nowhere.txt cannot be read"),
    ],
)
def test_bad_settings_are_one_line(
    folders: dict[str, str], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        task(folders, tmp_path, **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_clip_tag_that_the_text_model_lacks_is_named(folders: dict[str, str], tmp_path: Path) -> None:
    task(folders, tmp_path)  # leaves text.model with the tags of the clips
    changes = {
        "text": {"model": str(tmp_path / "text.model")},
        "data": {"rules": [{"tags": ["speach"]}]},
    }
    with pytest.raises(UserError, match="unknown tag 'speach'; did you mean speech"):
        task(folders, tmp_path, **changes)


def test_start_keeps_weights_and_takes_training_settings(folders: dict[str, str], tmp_path: Path) -> None:
    run(folders, tmp_path / "run", steps=2)
    start = load_model(tmp_path / "run/model")
    config = from_mapping(LanguageTaskConfig, {**language(folders), "model": {"dropout": 0.3}})
    trained = LanguageTask(config, output=tmp_path, start=start)
    assert trained.model.config == dataclasses.replace(start.model.config, dropout=0.3)
    assert torch.equal(trained.model.stop.weight, start.model.stop.weight)
    config = from_mapping(LanguageTaskConfig, {**language(folders), "model": {"ffn_dim": 32}})
    with pytest.raises(UserError, match="does not fit the model's weights"):
        LanguageTask(config, output=tmp_path, start=start)


def test_a_flow_head_is_added_to_a_trained_model(folders: dict[str, str], tmp_path: Path) -> None:
    """Nothing else learns, so that the likelihoods stay what they are."""
    run(folders, tmp_path / "first", steps=2)
    mapping = {
        "task": "language",
        "output": str(tmp_path / "second"),
        "max_steps": 2,
        "tensorboard": False,
        "device": "cpu",
        "precision": "fp32",
        "init_from": str(tmp_path / "first" / "model"),
        "init_partial": True,
        "language": {**language(folders, model={"flow_layers": 1, "flow_dim": 16}), "trained": "flow_head"},
    }
    mapping["language"]["text"] = {"model": str(tmp_path / "first" / "model")}
    train_mapping(mapping, "test")
    old, new = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(new[name], weight) for name, weight in old.items())
    lines = (tmp_path / "second" / "log.jsonl").read_text().splitlines()
    figures = next(line for line in map(json.loads, reversed(lines)) if line["kind"] == "validate")
    assert figures["loss"] == figures["flow"] > 0
    added = [name for name in new if name not in old]
    assert added and all(name.startswith("flow_head.") for name in added)
    assert bool(new["flow_head.output.weight"].any())  # it was zero
    with pytest.raises(UserError, match=r"trained=flow_head needs a model with one; set model.flow_layers"):
        LanguageTask(from_mapping(LanguageTaskConfig, {**language(folders), "trained": "flow_head"}), output=tmp_path)
