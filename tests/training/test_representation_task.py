"""Training of features: both losses fall, the autoencoder stays, and the result is a tokenizer like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.tiny_audio_model import SENTENCES, tiny_text, tiny_tokenizer
from tests.support.toy_corpus import write_cache
from tokenizer.errors import UserError
from tokenizer.f3 import F3Tokenizer
from tokenizer.loading import load_tokenizer
from tokenizer.settings import from_mapping
from training import representation_task
from training.representation_task import RepresentationTask, RepresentationTaskConfig, caption_of, drawn_latents
from training.run import train_mapping

ENCODER = {"feature_dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "window_frames": 8}


@pytest.fixture(autouse=True)
def few_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(representation_task, "STANDARDIZING_BATCHES", 5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A token cache, its tokenizer, and a tiny text model trained for a few steps."""
    root = tmp_path_factory.mktemp("corpus")
    found = write_cache(root)
    (root / "sentences.txt").write_text("\n".join(SENTENCES * 3))
    result = train_mapping(
        {
            "task": "text",
            "output": str(root / "llm"),
            "max_steps": 30,
            "tensorboard": False,
            "device": "cpu",
            "validate_every": 10,
            "validate_first": True,
            "ema_decay": 0.5,
            "optimizer": {"learning_rate": 0.01, "warmup_steps": 0},
            "text": {
                "sentences": str(root / "sentences.txt"),
                "vocab_size": 320,
                "batch_size": 4,
                "hidden_dim": 16,
                "num_layers": 1,
                "num_heads": 2,
                "ffn_dim": 24,
            },
        },
        "text",
    )
    assert result.best["loss"] < 0.8 * result.first["loss"]
    return {**found, "llm": str(root / "llm" / "model")}


def settings(folders: dict[str, str], **losses: Any) -> dict[str, Any]:
    return {
        "tokenizer": folders["tokenizer"],
        "data": {"caches": [folders["cache"]], "validation_fraction": 0.0, "batch_frames": 200},
        "encoder": ENCODER,
        "losses": {"num_offsets": 2, "codebook_size": 8, "projection_dim": 4, "llm": folders["llm"], **losses},
    }


@pytest.mark.parametrize(("rq", "llm"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_it_learns_and_leaves_the_autoencoder_alone(
    folders: dict[str, str], tmp_path: Path, rq: float, llm: float
) -> None:
    result = train_mapping(
        {
            "task": "representation",
            "output": str(tmp_path / "run"),
            "max_steps": 40,
            "tensorboard": False,
            "device": "cpu",
            "precision": "fp32",
            "validate_every": 20,
            "validate_first": True,
            "ema_decay": 0.5,
            "optimizer": {"learning_rate": 0.01, "warmup_steps": 0},
            "representation": settings(folders, rq_weight=rq, llm_weight=llm),
        },
        "representation",
    )
    assert ("rq_mtp" in result.first) == (rq > 0) and ("llm" in result.first) == (llm > 0)
    if rq:
        assert result.best["rq_mtp"] < 0.9 * result.first["rq_mtp"]
    if llm:  # as far as a language model of one layer can be told anything; see the next test
        assert result.best["llm"] < result.first["llm"] - 0.1
    made, plain = load_tokenizer(tmp_path / "run" / "model"), tiny_tokenizer()
    assert made.feature_dim == 16
    waveform = 0.1 * torch.randn(1, 1, 9600, generator=torch.Generator().manual_seed(0))
    with_it, without = made.encode(waveform), plain.encode(waveform)
    assert torch.equal(with_it.latents, without.latents) and torch.equal(with_it.codes, without.codes)
    assert with_it.features is not None and with_it.features.isfinite().all()


def test_features_tell_a_frozen_model_which_text_is_theirs(folders: dict[str, str], tmp_path: Path) -> None:
    """Large random weights listen to their prefix, but know no text: all that is gained came through the features."""
    text = tiny_text()
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=text.vocab_size, initializer_range=0.3, tie_word_embeddings=False, **shape)
    )
    model.save_pretrained(tmp_path)
    text.save(tmp_path)
    wanted = settings(folders, rq_weight=0.0, captions=False, llm=str(tmp_path))
    task = RepresentationTask(from_mapping(RepresentationTaskConfig, wanted))
    assert task.targets is None and task.learner.heads is None
    batch = next(task.batches(seed=0, rank=0, world_size=1, skip=0))
    own = [words for words in batch["texts"] if words]
    assert len(set(own)) > 2
    others = iter(own[1:] + own[:1])
    swapped = {**batch, "texts": [next(others) if words else None for words in batch["texts"]]}

    def nats(of: dict[str, Any]) -> float:
        with torch.no_grad():
            return float(task.loss("model", of, step=0, generator=torch.Generator())[1]["llm"])

    first = nats(batch)
    assert nats(swapped) == pytest.approx(first, abs=0.3)
    optimizer = torch.optim.Adam(task.learner.parameters(), lr=1e-2)
    for _ in range(60):
        loss, _ = task.loss("model", batch, step=0, generator=torch.Generator())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert nats(batch) < 0.5 * first and nats(swapped) > nats(batch) + 2.0


def test_texts_are_transcripts_of_whole_clips_or_captions(folders: dict[str, str]) -> None:
    config = from_mapping(RepresentationTaskConfig, settings(folders))
    task = RepresentationTask(config)
    batch = next(task.batches(seed=0, rank=0, world_size=1, skip=0))
    assert set(batch["texts"]) <= {*SENTENCES, "music"} and "music" in _texts(task)
    assert any(text in SENTENCES for text in _texts(task))
    plain = RepresentationTask(from_mapping(RepresentationTaskConfig, settings(folders, captions=False)))
    assert None in _texts(plain) and "music" not in _texts(plain)


def test_captions_are_words_and_every_text_counts_alike(folders: dict[str, str]) -> None:
    assert caption_of(("sound", "Glas-Tür_2!", "3")) == "sound Glas Tür" and caption_of(("12",)) == ""
    task = RepresentationTask(from_mapping(RepresentationTaskConfig, settings(folders, rq_weight=0.0)))
    batch = next(task.batches(seed=0, rank=0, world_size=1, skip=0))
    batch = {
        **batch,
        "texts": ["a", "the quick brown fox jumps over the lazy dog", *[None] * (len(batch["texts"]) - 2)],
    }

    def nats(texts: list[str | None]) -> float:
        with torch.no_grad():
            return float(task.loss("model", {**batch, "texts": texts}, step=0, generator=torch.Generator())[0])

    each = [nats([text if row == other else None for row, text in enumerate(batch["texts"])]) for other in (0, 1)]
    assert nats(batch["texts"]) == pytest.approx(sum(each) / 2, abs=1e-4) and abs(each[0] - each[1]) > 0.05


def test_targets_and_features_are_standardized_on_what_is_trained_on(folders: dict[str, str], tmp_path: Path) -> None:
    task = RepresentationTask(from_mapping(RepresentationTaskConfig, settings(folders, llm_weight=0.0, llm=None)))
    frames = torch.cat(list(drawn_latents(task.train_data, task.config.data)))
    assert task.targets is not None
    torch.testing.assert_close(task.targets.target_mean, frames.mean(dim=0))
    task.export(tmp_path)
    made = load_tokenizer(tmp_path)
    assert isinstance(made, F3Tokenizer) and made.representation is not None
    features = made.representation.features(frames[None])[0]
    assert features.mean(dim=0).abs().max() < 0.2 and (features.std(dim=0) - 1).abs().max() < 0.2
    assert bool((task.learner.encoder.feature_scale == 1).all())  # training goes on with what it had


def _texts(task: RepresentationTask) -> list[str | None]:
    batches = task.batches(seed=0, rank=0, world_size=1, skip=0)
    return [text for _ in range(4) for text in next(batches)["texts"]]


def test_settings_that_do_not_fit_are_refused(folders: dict[str, str]) -> None:
    with pytest.raises(UserError, match="llm names no language model"):
        from_mapping(RepresentationTaskConfig, settings(folders, llm=None))
    with pytest.raises(UserError, match="nothing would be learned"):
        from_mapping(RepresentationTaskConfig, settings(folders, rq_weight=0.0, llm_weight=0.0))
    with pytest.raises(UserError, match="cannot be loaded"):
        RepresentationTask(from_mapping(RepresentationTaskConfig, settings(folders, llm=folders["clips"])))
