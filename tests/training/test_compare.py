"""`hybridlm compare`: trains, resumes, pairs differences by clip, and compares only what may be compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure

from tests.support.command import runner
from tests.support.tiny_audio_model import tiny_tokenizer
from tests.support.toy_corpus import TINY_MODEL, write_clips
from tokenizer.errors import UserError
from tokenizer.settings import from_mapping
from training import compare, estimates
from training.compare_report import markdown, report_of, write_picture
from training.config import OptimizerConfig
from training.corpus import TokenCache
from training.derived import clips_beyond, write_derived
from training.recipe import Recipe

SLICES = {"continuous_input": "features", "fusion": "concat", "slice_layers": 1, "slice_dim": 16, "slice_ffn_dim": 16}
DISCRETE = {"representation": "discrete"}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "RESAMPLES", 100)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("corpus")
    manifest = write_clips(folder / "clips")
    tiny_tokenizer().save(folder / "tokenizer")
    shared = {name: value for name, value in TINY_MODEL.items() if name not in ("ffn_dim", "max_frames")}
    return {
        "output": str(folder / "runs"),
        "tokenizer": f"log-mel:{folder / 'tokenizer'}",
        "domains": {
            "tones": {
                "data": str(manifest),
                "about": "sines",
                "fidelity": {"clips": 1, "seconds": 0.5, "speech": False},
            }
        },
        "base": "discrete",
        "variants": {
            "discrete": {"model": {**DISCRETE, "ffn_dim": 64}},
            "continuous": {"model": {"representation": "continuous", "ffn_dim": 80}, "against": []},
            "hybrid": {"model": {"representation": "hybrid", "ffn_dim": 48}, "against": ["discrete", "continuous"]},
            "half": {"model": {**DISCRETE, "ffn_dim": 64}, "share": 0.5, "seeds": 1, "about": "half of the data"},
            "zeroed": {
                "optimizer": {"learning_rate": 1e-4},
                "model": {**DISCRETE, **SLICES},
                "control": "zeroed",
                "seeds": 1,
            },
            "coarsest": {"model": {**DISCRETE, "num_output_codebooks": 1}, "seeds": 1},
        },
        "model": {**shared, "short_context_frames": 0, "history_noise": 0, "condition_dropout": 0},
        "optimizer": {"base_width": 8},
        "steps": 2,
        "seeds": 2,
        "validate_every": 1,
        "validation_fraction": 0.3,
        "batch_frames": 40,
        "max_frames": 16,
        "test_seconds": 0.8,
        "calibration_clips": 2,
        "losses": {"alignment_weight": 0},
    }


def run(recipe: dict[str, Any], folder: Path, *overrides: str, **options: Any) -> int:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return compare.run(file, overrides, report=folder / "report", **options)


def test_a_comparison_from_one_command(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(recipe, tmp_path) == 0
    text = (tmp_path / "report.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "## tones (sines)" in text and "- half: half of the data\n" in text
    assert "- zeroed: peak learning rate 0.0001 (the decoder's matrices at 8 / hidden_dim of it)\n" in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "report.json").read_text())["domains"]["tones"]
    found = report["variants"]
    assert {name: set(row["streams"]) for name, row in found.items()} == {
        "discrete": {"codes", "stop", "total"},
        "continuous": {"latents", "stop", "total"},
        "hybrid": {"codes", "latents", "stop", "total"},
        "half": {"codes", "stop", "total"},
        "zeroed": {"codes", "stop", "total"},
        "coarsest": {"codes", "stop", "total"},
    }
    for row in found.values():
        parts = [stream["value"] for name, stream in row["streams"].items() if name != "total"]
        assert row["streams"]["total"]["value"] == pytest.approx(sum(parts), abs=1e-4)
        assert sum(book["value"] for book in row["codebooks"]) == pytest.approx(
            row["streams"].get("codes", {"value": 0})["value"], abs=1e-4
        )
        assert row["flop"] > 0 and [point["step"] for point in row["curves"][0]] == [1, 2]
    # A random model is nearly uniform over its 32 codes, and knows that it is.
    assert found["coarsest"]["streams"]["codes"]["value"] == pytest.approx(math.log(32), abs=1)
    assert found["coarsest"]["calibration"]["codes"]["expected"] == pytest.approx(math.log(32), abs=0.5)
    assert len(found["hybrid"]["cell_mass"]) == found["hybrid"]["output_codebooks"] and not found["half"]["cell_mass"]
    assert set(report["fidelity"]) == {recipe["tokenizer"]}
    assert {"latents", "codes 1"} < set(report["fidelity"][recipe["tokenizer"]])

    differences = {(row["first"], row["second"], row["stream"]): row for row in report["differences"]}
    # The coarsest codes alone are another target; a discrete model's total is no continuous one's.
    assert set(differences) == {
        ("hybrid", "discrete", "codes"),
        ("hybrid", "continuous", "total"),
        ("half", "discrete", "codes"),
        ("zeroed", "discrete", "codes"),
    }
    codes = {name: row["streams"]["codes"] for name, row in found.items() if "codes" in row["streams"]}
    row = differences["hybrid", "discrete", "codes"]
    assert row["value"] == pytest.approx(codes["hybrid"]["value"] - codes["discrete"]["value"])
    alone = differences["half", "discrete", "codes"]  # one seed, held against the same one of the base
    assert alone["per_seed"] == pytest.approx([codes["half"]["per_seed"][0] - codes["discrete"]["per_seed"][0]])
    assert alone["value"] != 0

    # Test clips have 20 frames (0.8 s) and more: all are cut there.
    folder = Path(recipe["output"]) / "tones"
    for name, rate in (("discrete", OptimizerConfig().learning_rate), ("zeroed", 1e-4)):
        made = json.loads((folder / name / "seed0" / "result.json").read_text())
        assert made["training"]["optimizer"]["learning_rate"] == rate
        assert made["training"]["optimizer"]["base_width"] == 8
    result = json.loads((folder / "hybrid" / "seed1" / "result.json").read_text())
    assert [clip["nll"]["num_frames"] for clip in result["clips"]] == [20, 20]
    assert all(clip["labels"]["goes_on"] == "true" for clip in result["clips"])

    # What is there is not made again, what is missing is, by another process from the last checkpoint.
    (folder / "hybrid" / "seed1" / "result.json").unlink()
    monkeypatch.setattr(compare, "make", lambda *_: pytest.fail("must run in a process of its own"))
    assert run(recipe, tmp_path, jobs=2) == 0
    assert "resumed from" in (folder / "hybrid" / "seed1" / "output.txt").read_text()
    assert json.loads((folder / "hybrid" / "seed1" / "result.json").read_text())["clips"] == result["clips"]
    with pytest.raises(UserError, match="other settings \\(split, validation_fraction\\)"):
        run(recipe, tmp_path, "score=validation")
    with pytest.raises(UserError, match=r"other settings \(.*data.max_frames"):
        run({**recipe, "max_frames": 12}, tmp_path)


def test_equal_compute_buys_a_cheaper_model_more_steps(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = {"discrete": recipe["variants"]["discrete"]}
    variants["wide"] = {"model": {**DISCRETE, "ffn_dim": 640}}
    changed = {**recipe, "steps": None, "variants": variants, "output": str(tmp_path / "runs")}
    step = {}
    for name in variants:
        loaded = from_mapping(Recipe, {**changed, "compute": 1.0})
        compare.check(loaded)
        step[name] = compare.cost_of(loaded, "tones", name)["step_flop"]
        assert compare.steps_of(loaded, "tones", name) == 1
    capsys.readouterr()
    assert run({**changed, "compute": 4 * step["wide"]}, tmp_path, seeds=1) == 0
    found = json.loads((tmp_path / "report.json").read_text())["domains"]["tones"]["variants"]
    assert found["wide"]["steps"] == 4 < found["discrete"]["steps"] == round(4 * step["wide"] / step["discrete"])
    for row in found.values():
        assert row["flop"] == pytest.approx(4 * step["wide"], rel=0.2)


def test_controls_change_the_features_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    loaded = from_mapping(Recipe, {**recipe, "output": str(tmp_path / "runs")})
    compare.prepare_domain(loaded, "tones", loaded.tokenizer)
    source = next((tmp_path / "runs" / "tokens").glob("*/tones"))
    plain = TokenCache(source)
    for control in ("shuffled", "zeroed"):
        for _ in range(2):  # the second call goes on, and has nothing to do
            write_derived(source, tmp_path / control, control=control)
        changed = TokenCache(tmp_path / control)
        assert len(changed) == len(plain) and changed.tokenizer == plain.tokenizer
        for number in range(len(plain)):
            a, b = plain[number], changed[number]
            assert torch.equal(a.codes, b.codes) and torch.equal(a.latents, b.latents)
            assert (a.key, a.split, a.text, a.tags, a.labels) == (b.key, b.split, b.text, b.tags, b.labels)
            assert a.features is not None and b.features is not None and not torch.equal(a.features, b.features)
            if control == "zeroed":
                assert bool((b.features == 0).all())
            else:
                assert torch.equal(a.features.sort(dim=0).values, b.features.sort(dim=0).values)

    rules = loaded.domains["tones"].rules
    trained = TokenCache(source, split="train", validation_fraction=0.3, rules=rules)
    out = {share: clips_beyond([source], share, 0.3, rules) for share in (0.25, 0.5, 1.0)}
    assert out[1.0] < out[0.5] < out[0.25] < {trained.index.clip(i).key for i in range(len(trained))}
    write_derived(source, tmp_path / "half", left_out=out[0.5])
    half = TokenCache(tmp_path / "half", split="train", validation_fraction=0.3, rules=rules)
    assert 0.5 <= float(half.index.rows.sum()) / float(trained.index.rows.sum()) < 0.8
    for split in ("validation", "test"):
        caches = [TokenCache(f, split=split, validation_fraction=0.3) for f in (source, tmp_path / "half")]
        assert len(caches[0]) == len(caches[1])


def test_a_control_needs_features(tmp_path: Path, recipe: dict[str, Any]) -> None:
    plain = {**recipe, "tokenizer": recipe["tokenizer"].removeprefix("log-mel:"), "output": str(tmp_path / "runs")}
    with pytest.raises(UserError, match="has no features"):
        run({**plain, "variants": {"discrete": {}, "zeroed": {"control": "zeroed"}}}, tmp_path)


def test_the_command_line(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**recipe, "base": "GPT-X"}, sort_keys=False))
    command = runner(monkeypatch, capsys)
    found = command("compare", file)
    assert found.status == 2 and "base=GPT-X must be one of the variants" in found.err
    found = command("compare", file, "base=discrete", "--one", "tones/GPT/0")
    assert found.status == 2 and "--one tones/GPT/0 is none of tones/discrete/0, tones/continuous/0" in found.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"same_parameters": 0.01}, r"must agree within same_parameters=1%; change the variants' ffn_dim"),
        ({"compute": 1e9}, "give either steps=2 or compute=1000000000.0"),
        ({"variants": {"discrete": {"seeds": 3}}}, "seeds=3 must be from 1 to seeds=2"),
        ({"variants": {"discrete": {"against": ["other"]}}}, "against=other must be another one of discrete"),
        (
            {"variants": {"discrete": {"optimizer": {"learning_rate": 0}}}},
            r"discrete.optimizer: learning_rate=0.0 must",
        ),
        ({"variants": {"discrete": {"optimizer": {"rate": 1.0}}}}, r"variants.discrete.optimizer.*rate"),
        ({"variants": {"discrete": {"share": 0}}}, "share=0.0 must be above 0"),
        ({"domains": {"tones": {"caches": ["x"], "data": "y"}}}, "give either data, .* or caches"),
        ({"domains": {"tones": {"caches": ["x"], "fidelity": {}}}}, "fidelity needs the recordings themselves"),
        ({"domains": {"tones": {"data": "x", "rules": [{}]}}}, "every rule needs text: false and no tags"),
        ({"domains": {"a/b": {"data": "x"}}}, "the name a/b must have no '/'"),
    ],
)
def test_bad_recipes(recipe: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run({**recipe, "output": str(tmp_path / "runs"), **changes}, tmp_path)


def results(kind: str, nats: float, seeds: int = 2, **other: Any) -> list[dict[str, Any]]:
    """Clips of unequal difficulty and length, every frame `nats` above it; sets a and b; seeds 0.1 apart."""
    found = []
    for seed in range(seeds):
        clips = []
        for number in range(12):
            frames = 10 + number
            code = 0.0 if kind == "continuous" else (number + nats + 0.1 * seed) * frames
            latent = 0.0 if kind == "discrete" else 2.0 * frames
            nll = {"num_frames": frames, "codes": [] if kind == "continuous" else [code], "latents": latent}
            nll |= {"stop": 0.0, "correct": [] if kind == "continuous" else [1]}
            clips.append({"key": str(number), "labels": {"set": "ab"[number % 2]}, "nll": nll})
        about = {"sigma": 0.1, "scale_floor": 0.02, "machine": "a machine", "tokenizer": "f3 1", "frame_rate_hz": 25.0}
        about |= {
            "steps": 5,
            "scored_step": 5,
            "frames_trained": 100 + seed,
            "training_seconds": 60.0,
            "parameters": 1000,
            "flop": 1e9,
        }
        about |= {"codebook_size": 32, "output_codebooks": 0 if kind == "continuous" else 1, "calibration": {}}
        about |= {"cell_mass": [], "curve": [], "targets": {"codes": "c", "latents": "z"}, **other}
        found.append({"representation": kind, "clips": clips, **about})
    return found


def recipe_of(base: str, *variants: str) -> Recipe:
    domains = {"tones": {"data": "x"}}
    named: dict[str, Any] = {name: {} for name in (base, *variants)}
    return from_mapping(Recipe, {"output": "x", "domains": domains, "variants": named, "base": base, "steps": 1})


def test_differences_are_paired() -> None:
    """A difference far below the spread of the clips is exact when each clip is held against itself."""
    made = {"discrete": results("discrete", 0.25), "hybrid": results("hybrid", 0.0)}
    figures = report_of(recipe_of("discrete", "hybrid"), made)
    rows = {(row["stream"], row["set"]): row for row in figures["differences"]}
    assert set(rows) == {("codes", "all"), ("codes", "a"), ("codes", "b")}
    for row in rows.values():
        assert [row["value"], *row["interval"]] == pytest.approx([-0.25] * 3)
        assert row["per_seed"] == pytest.approx([-0.25, -0.25])
    absolute = figures["variants"]["hybrid"]["streams"]["codes"]
    assert absolute["interval"][1] - absolute["interval"][0] > 1.0
    assert absolute["per_seed"][1] - absolute["per_seed"][0] == pytest.approx(0.1)


def test_a_difference_of_seeds_widens_the_interval() -> None:
    made = {"discrete": results("discrete", 0.25), "hybrid": results("hybrid", 0.0)}
    for clip in made["hybrid"][1]["clips"]:
        clip["nll"]["codes"][0] += 0.5 * clip["nll"]["num_frames"]
    row = report_of(recipe_of("discrete", "hybrid"), made)["differences"][0]
    assert row["per_seed"] == pytest.approx([-0.25, 0.25])
    assert row["value"] == pytest.approx(0.0)
    assert row["interval"] == pytest.approx([-0.25, 0.25])


def test_a_run_that_waited_does_not_count_as_slow() -> None:
    made = {"discrete": results("discrete", 0.25), "hybrid": results("hybrid", 0.0)}
    made["hybrid"][0]["training_seconds"], made["hybrid"][1]["training_seconds"] = 6000.0, 30.0
    recipe = recipe_of("discrete", "hybrid")
    text = markdown(recipe, {"tones": report_of(recipe, made)}, "hybridlm compare", "x.png")
    row = next(line for line in text.splitlines() if line.startswith("| hybrid |"))
    assert row.endswith("| 0.5 | 3 |")


def test_no_two_lines_of_the_picture_look_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{number}" for number in range(23)]
    recipe = recipe_of(*names)
    report = report_of(recipe, {name: results("hybrid", 0.25) for name in names})
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    write_picture(tmp_path / "x.png", {"tones": report})
    lines = [line for line in drawn[0].axes[0].get_lines() if line.get_label() in names]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) == len(names)


@pytest.mark.parametrize("other", [{"sigma": 0.2}, {"targets": {"codes": "d", "latents": "y"}}])
def test_other_targets_are_not_compared(other: dict[str, Any]) -> None:
    made = {"one": results("hybrid", 0.25), "two": results("hybrid", 0.0, **other)}
    assert not report_of(recipe_of("one", "two"), made)["differences"]
    made = {"one": results("hybrid", 0.25), "two": results("hybrid", 0.0)}
    assert {row["stream"] for row in report_of(recipe_of("one", "two"), made)["differences"]} == {"codes", "total"}
    made = {"one": results("hybrid", 0.25), "two": results("hybrid", 0.0, scale_floor=0.1)}
    assert {row["stream"] for row in report_of(recipe_of("one", "two"), made)["differences"]} == {"codes"}


def test_a_variant_of_another_tokenizer_needs_data() -> None:
    mapping = {"output": "x", "domains": {"tones": {"caches": ["x"]}}, "base": "a", "steps": 1}
    with pytest.raises(UserError, match="the caches of domain tones are the tokenizer box's; give data instead"):
        from_mapping(Recipe, {**mapping, "variants": {"a": {}, "b": {"tokenizer": "encodec"}}})
