"""Likelihood of recordings: the same in any batch and window, complete, and told in the terms of the report."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hybridlm.checkpoint import Checkpoint, save_model
from hybridlm.likelihood import ClipNLL
from tests.support.tiny_audio_model import tiny_model
from tests.support.toy_corpus import write_cache
from tokenizer.errors import UserError
from tokenizer.loading import load_tokenizer
from training.corpus import TokenCache
from training.evaluate import evaluate, run
from training.manifest import TagRule
from training.scoring import score_clips


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_cache(tmp_path_factory.mktemp("corpus"), 6)


def checkpoint(folders: dict[str, str], representation: str = "hybrid", **settings: Any) -> Checkpoint:
    """A random model with the tokenizer as it is on disk."""
    made = tiny_model(representation, **settings)
    return Checkpoint(model=made.model.eval(), tokenizer=load_tokenizer(folders["tokenizer"]), text=made.text)


def scores(found: Checkpoint, cache: TokenCache, **settings: Any) -> dict[str, ClipNLL]:
    return {clip.key: clip.nll for clip in score_clips(found, cache, **{"window_frames": 250, **settings})}


def close(one: ClipNLL, other: ClipNLL) -> bool:
    numbers = ((*clip.codes, clip.latents, clip.stop) for clip in (one, other))
    return one.correct == other.correct and all(
        math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-4) for a, b in zip(*numbers, strict=True)
    )


def test_batches_change_nothing(folders: dict[str, str]) -> None:
    found, cache = checkpoint(folders), TokenCache(Path(folders["cache"]))
    alone = scores(found, cache, batch_frames=1)
    together = scores(found, cache, batch_frames=10_000)
    assert list(alone) == [cache.index.clip(i).key for i in range(len(cache))]
    assert all(close(alone[key], together[key]) for key in alone)
    only = TokenCache(Path(folders["cache"]), split="test")
    for key, nll in scores(found, only).items():
        assert close(nll, alone[key])


def test_the_figures_are_those_of_the_noised_latents(folders: dict[str, str]) -> None:
    """Against a direct computation with the model, for one clip."""
    from hybridlm.likelihood import clip_nlls, noise_latents
    from training.examples import clip_seed, make_prefix, with_latents

    found, cache = checkpoint(folders), TokenCache(Path(folders["cache"]))
    clip = cache[1]
    frames = cache.frames([clip])
    latents = noise_latents(frames.latents, found.model.config.sigma, [clip_seed(clip.key)])
    assert not torch.equal(latents, frames.latents)
    prefix = make_prefix(found.text, [(clip.text, clip.tags)])
    with torch.no_grad():
        nll = found.model.nll(
            prefix.ids, prefix.mask, with_latents(found.tokenizer, frames, latents), ended=torch.tensor([True])
        )
    assert clip.text
    assert close(scores(found, cache)[clip.key], clip_nlls(nll)[0])


def test_windows_score_every_frame_and_stop_once(folders: dict[str, str]) -> None:
    found, cache = checkpoint(folders), TokenCache(Path(folders["cache"]))
    whole, cut = scores(found, cache), scores(found, cache, window_frames=8)
    for key, nll in cut.items():
        assert nll.num_frames == whole[key].num_frames
        assert nll.total != pytest.approx(whole[key].total)
    # The stop decision is the same constant everywhere in this model, so its sum shows what was counted.
    going, over = math.log1p(math.exp(-4.0)), math.log1p(math.exp(4.0))
    for nll in cut.values():
        assert nll.stop == pytest.approx(nll.num_frames * going + over, rel=1e-4)


def test_a_model_without_memory_scores_windows_like_whole_clips(folders: dict[str, str]) -> None:
    """Heads that ignore the state make context irrelevant: what remains is which frames are counted."""
    found, cache = checkpoint(folders), TokenCache(Path(folders["cache"]))
    with torch.no_grad():
        found.model.decoder.norm.weight.zero_()
        if found.model.short_context is not None:
            for parameter in found.model.short_context.parameters():
                parameter.zero_()
    whole, cut = scores(found, cache), scores(found, cache, window_frames=8)
    assert all(close(whole[key], cut[key]) for key in whole)


def test_text_and_tags_count(folders: dict[str, str]) -> None:
    found, cache = checkpoint(folders), TokenCache(Path(folders["cache"]))
    told, untold = scores(found, cache), scores(found, cache, with_text=False)
    assert all(not close(told[key], untold[key]) for key in told)


def test_streams_of_each_representation(folders: dict[str, str]) -> None:
    cache = TokenCache(Path(folders["cache"]))
    for representation, codes, latents in (("discrete", 1, 0), ("continuous", 0, 1), ("hybrid", 1, 1)):
        report = evaluate(checkpoint(folders, representation), cache).report
        assert (report.codes is not None, report.latents is not None) == (bool(codes), bool(latents))
        assert len(report.codebook_nats) == len(report.perplexity) == 3 * codes
        parts = [stream for stream in (report.codes, report.latents, report.stop) if stream is not None]
        assert report.total.nats_per_frame.value == pytest.approx(sum(p.nats_per_frame.value for p in parts))
        assert report.sigma == 0.1


def test_run_on_audio_equals_run_on_its_cache(folders: dict[str, str], tmp_path: Path) -> None:
    found = checkpoint(folders)
    save_model(tmp_path / "model", found.model, found.tokenizer, found.text)
    text = io.StringIO()
    console = Console(file=text, width=120)
    audio = run(tmp_path / "model", Path(folders["clips"]), None, tmp_path / "figures.json", console=console)
    cached = run(tmp_path / "model", Path(folders["cache"]), None, console=console)
    assert audio.report.num_clips == cached.report.num_clips == 6
    # The cache keeps latents in half precision.
    assert audio.report.total.nats_per_frame.value == pytest.approx(cached.report.total.nats_per_frame.value, rel=0.05)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["report"]["total"]["bits_per_second"]["value"] == audio.report.total.bits_per_second.value
    assert len(figures["clips"]) == 6
    assert figures["conditions"]["window_frames"] == 250
    for word in ("sigma 0.1", "scale floor", "bits a second", "perplexity a code", "latents", "accuracy"):
        assert word in text.getvalue()


def test_split_groups_and_rules(folders: dict[str, str], tmp_path: Path) -> None:
    found = checkpoint(folders)
    cache = TokenCache(Path(folders["cache"]), split="test")
    assert {clip.key for clip in evaluate(found, cache).clips} == {"3.wav"}
    rules = (TagRule(where={"split": "test"}, tags=("nosuchtag",)), TagRule(tags=("music",)))
    result = evaluate(found, TokenCache(Path(folders["cache"]), rules=rules))
    assert result.conditions["unknown_tags"] == ["nosuchtag"]
    assert result.groups == {}


def test_bad_data_is_one_line(folders: dict[str, str], tmp_path: Path) -> None:
    found = checkpoint(folders)
    save_model(tmp_path / "model", found.model, found.tokenizer, found.text)
    with pytest.raises(UserError, match="no such file or folder"):
        run(tmp_path / "model", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no clip of split 'dev'"):
        run(tmp_path / "model", Path(folders["clips"]), "dev")
