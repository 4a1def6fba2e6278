"""What enhancement does to noisy speech: PESQ-WB, STOI and SI-SDR before and after, by ratio of speech to noise.

    python -m benchmarks.enhancement --manifest M --enhancers DIR [DIR ...] [--split test] [--snr -5 0 5 10 15]
        [--sets librispeech kathleen] [--noise-set esc10] [--limit 50] [--seed 0] [--markdown FILE] [--json FILE]
        [--clips FILE]

Speech and noise are of the same split: with `test`, clips that no recipe trains on (of the voices, those of librispeech
are unseen; kathleen speaks unseen sentences). A clip's noise, and where in it the clip begins, follow from the clip's
key and the seed alone, and are the same at all ratios (`training.noisy_speech.mix_at_snr`); shorter noise is repeated.

Every row is judged against the clean speech at the tokenizer's rate:

- noisy: the mixture as it is.
- spectral gate: the mixture under a classical mask (`spectral_gate`), which knows nothing but the mixture.
- codec of noisy, codec of clean: through the tokenizer and back. The latter is as far as any enhancer in this
  tokenizer's space could come. A codec's decoder makes sound that is alike, not a copy of the waveform, so that SI-SDR,
  which compares waveforms, can be poor in both.
- enhanced: what is decoded; masked: the mixture, turned down where that is quieter than the codec of noisy, as
  `hybridlm enhance` does unless it is told `--phase decoded`. One row an enhancer, and, where there are several (such
  as three seeds), the mean of a clip's figures.

Figures are means over clips with 95 % bootstrap intervals; so are the differences from noisy, which are paired by clip.
With `--against "codec of noisy"` they tell what the enhancer does, apart from what the codec costs. Of several
enhancers the table has the means alone; `--json` has every row, `--clips` every clip.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.codec_quality import choose, finite
from tokenizer.audio import read_audio
from tokenizer.enhancer import SpeechEnhancer, load_enhancer
from tokenizer.errors import UserError
from tokenizer.files import replacing
from tokenizer.metrics import Interval, bootstrap_interval, compare_audio
from tokenizer.spectral_mask import mask_noise
from training.examples import clip_seed
from training.index import VALIDATION, split_clips
from training.machine import machine
from training.manifest import Clip, TagRule, apply_rules, read_manifest
from training.noisy_speech import NoiseConfig, mix_at_snr
from training.probe import write_json

COLUMNS = {
    "pesq_wb": ("PESQ-WB", "{:.2f}"),
    "stoi": ("STOI", "{:.3f}"),
    "si_sdr_db": ("SI-SDR (dB)", "{:.1f}"),
}
NOISY, CODED, ENHANCED, MASKED = "noisy", "codec of noisy", "enhanced", "masked"
GATE_WINDOW, GATE_FLOOR, GATE_QUANTILE = 512, 0.1, 0.1


def spectral_gate(noisy: Float[Tensor, "1 S"]) -> Float[Tensor, "1 S"]:
    """Wiener gains over an STFT, the noise in each bin taken to be its quietest tenth: max(1 - N / |X|^2, floor).

    The quantile of an exponential distribution is turned into its mean, so that steady noise is estimated without bias.
    """
    window = torch.hann_window(GATE_WINDOW)
    settings = {"n_fft": GATE_WINDOW, "hop_length": GATE_WINDOW // 4, "window": window}
    spectrum = torch.stft(noisy, **settings, return_complex=True, pad_mode="constant")  # (1, F, H)
    power = spectrum.abs().square()
    floor = power.quantile(GATE_QUANTILE, dim=-1, keepdim=True) / -math.log(1 - GATE_QUANTILE)
    gain = (1 - floor / power.clamp(min=1e-12)).clamp(min=GATE_FLOOR)
    return torch.istft(spectrum * gain, **settings, length=noisy.shape[-1])


def noise_clips(manifest: Path, split: str, noise_set: str) -> list[Clip]:
    """Clips of noise; of `validation`, what the recipes hold back of the training split's."""
    held_out = NoiseConfig(sources=("-",)).validation_fraction if split == VALIDATION else 0.0
    of_set = apply_rules(read_manifest(manifest).clips, [TagRule(where={"set": noise_set})])
    found = split_clips(list(of_set), split, held_out)
    if not found:
        raise UserError(f"--noise-set {noise_set}: {manifest} has no clip of that set in '{split}'")
    return sorted(found, key=lambda clip: clip.key)


def draw_noise(
    clip: Clip, noises: Sequence[Clip], seed: int, num_samples: int, sample_rate_hz: int
) -> tuple[str, Tensor]:
    """The key of a clip's noise, and (1, S) samples of it, repeated from a random place on."""
    generator = torch.Generator().manual_seed(clip_seed(f"{seed}/{clip.key}"))
    chosen = noises[int(torch.randint(len(noises), (), generator=generator))]
    noise = read_audio(chosen.audio, sample_rate_hz, chosen.start, chosen.read_duration)
    first = int(torch.randint(noise.shape[-1], (), generator=generator))
    return chosen.key, noise[:, (first + torch.arange(num_samples)) % noise.shape[-1]]


@torch.inference_mode()
def judge(
    speech: Float[Tensor, "1 S"],
    noise: Float[Tensor, "1 S"],
    snr_db: Sequence[float],
    enhancers: Mapping[str, SpeechEnhancer],
) -> list[dict[str, Any]]:
    """Figures of one clip: one record for each ratio and row."""
    first = next(iter(enhancers.values()))
    space, rate = first.space, first.sample_rate_hz
    records = []
    for snr in snr_db:
        mixture = mix_at_snr(speech[None], noise[None], torch.tensor([float(snr)]), rate)
        noisy, clean = mixture.noisy, mixture.clean[0, 0]
        made = {
            NOISY: noisy,
            "spectral gate": spectral_gate(noisy[0]),
            CODED: space.decode(space.encode(noisy)),
            "codec of clean": space.decode(space.encode(mixture.clean)),
            **{name: enhancer.enhance(noisy) for name, enhancer in enhancers.items()},
        }
        masked = {masked_row(name): mask_noise(noisy, made[CODED], made[name], rate) for name in enhancers}
        kinds = {ENHANCED: set(enhancers), MASKED: set(masked)}
        made |= masked
        for row, audio in made.items():
            estimate = audio.reshape(-1)[: len(clean)]
            judged = compare_audio(clean, estimate, rate, speech=True)
            records.append({"snr_db": snr, "row": row, **{name: getattr(judged, name) for name in COLUMNS}})
        if len(enhancers) > 1:
            for kind, names in kinds.items():
                own = [record for record in records[-len(made) :] if record["row"] in names]
                means = {name: sum(record[name] for record in own) / len(own) for name in COLUMNS}
                records.append({"snr_db": snr, "row": f"{kind}, mean", **means})
    return records


def masked_row(enhanced: str) -> str:
    """Of an enhancer's rows the other one."""
    return enhanced.replace(ENHANCED, MASKED, 1)


def summarize(records: Sequence[dict[str, Any]], against: str) -> list[dict[str, Any]]:
    """One row for each set, ratio and kind: means, and paired differences from the kind `against`."""
    groups: dict[tuple[str, float, str], dict[str, dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["set"], record["snr_db"], record["row"]), {})[record["clip"]] = record
    rows = []
    for (set_name, snr, row), clips in groups.items():
        base = groups[set_name, snr, against]
        found: dict[str, Any] = {"set": set_name, "snr_db": snr, "row": row, "clips": len(clips)}
        for name in COLUMNS:
            found[name] = asdict(bootstrap_interval([_defined(clip[name]) for clip in clips.values()]))
            changes = [_defined(clip[name] - base[key][name]) for key, clip in clips.items()]
            found[f"{name}_change"] = asdict(bootstrap_interval(changes))
        rows.append(found)
    return rows


def _defined(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def table(rows: Sequence[dict[str, Any]], against: str) -> str:
    """The rows in Markdown: each figure, and beside it how far it is from that of the row `against`."""
    titles = [title for title, _ in COLUMNS.values()]
    head = ["speech", "SNR (dB)", "", "clips", *(t for title in titles for t in (title, f"{title}, change"))]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["set"], f"{row['snr_db']:g}", row["row"], str(row["clips"])]
        for name, (_, form) in COLUMNS.items():
            cells.append(_cell(Interval(**row[name]), form, row["clips"]))
            change = Interval(**row[f"{name}_change"])
            cells.append("" if row["row"] == against else _cell(change, form.replace(":", ":+"), row["clips"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(interval: Interval, form: str, clips: int) -> str:
    if not interval.count:
        return "-"
    mean, low, high = (form.format(value) for value in (interval.mean, interval.low, interval.high))
    missing = f", n={interval.count}" if interval.count != clips else ""
    return f"{mean} [{low}, {high}{missing}]"


def load_all(folders: Sequence[str]) -> dict[str, SpeechEnhancer]:
    """Enhancers by the name of their rows; all of one tokenizer, which the other rows are of."""
    found: dict[str, SpeechEnhancer] = {}
    for folder in folders:
        enhancer = load_enhancer(folder)
        first = next(iter(found.values()), enhancer)
        mine, theirs = (e.tokenizer.fingerprint() for e in (enhancer, first))
        if (mine, enhancer.space.view) != (theirs, first.space.view):
            raise UserError(f"--enhancers: {folder} has another tokenizer or view than {folders[0]}; measure it alone")
        found["enhanced" if len(folders) == 1 else f"enhanced, {folder}"] = enhancer
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True, help="manifest.jsonl or a folder of audio")
    parser.add_argument("--enhancers", nargs="+", required=True, metavar="DIR", help="enhancers' folders")
    parser.add_argument("--split", choices=["test", VALIDATION], default="test", help="choose settings on validation")
    parser.add_argument("--sets", nargs="+", default=["librispeech", "kathleen"], help="speech, by the label 'set'")
    parser.add_argument("--noise-set", default="esc10", help="noise, by the label 'set'")
    parser.add_argument("--snr", type=float, nargs="+", default=[-5.0, 0.0, 5.0, 10.0, 15.0], metavar="DB")
    parser.add_argument("--limit", type=int, help="clips a set, evenly spread; all of them by default")
    parser.add_argument("--against", choices=[NOISY, CODED], default=NOISY, help="what differences are from")
    parser.add_argument("--seed", type=int, default=0, help="of the pairing of speech and noise")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    parser.add_argument("--json", type=Path, help="write the figures of every row here")
    parser.add_argument("--clips", type=Path, help="write every clip's figures here, a JSON object a line")
    options = parser.parse_args(arguments)
    for name in ("limit", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    records, problems = [], []
    try:
        enhancers = load_all(options.enhancers)
        noises = noise_clips(options.manifest, options.split, options.noise_set)
        chosen = choose(options.manifest, options.split, options.sets, options.limit)
        rate = next(iter(enhancers.values())).sample_rate_hz
        for number, (set_name, clip) in enumerate(chosen, start=1):
            print(f"{number}/{len(chosen)} {set_name} {clip.key}", file=sys.stderr, flush=True)
            try:
                speech = read_audio(clip.audio, rate, clip.start, clip.read_duration)
                noise_key, noise = draw_noise(clip, noises, options.seed, speech.shape[-1], rate)
            except UserError as error:
                problems.append(f"{clip.key}: {error}")
                continue
            place = {"set": set_name, "clip": clip.key, "noise": noise_key}
            records += [{**place, **record} for record in judge(speech, noise, options.snr, enhancers)]
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    rows = summarize(records, options.against)
    command = shlex.join(
        ["python", "-m", "benchmarks.enhancement", *(sys.argv[1:] if arguments is None else arguments)]
    )
    tokenizer = next(iter(enhancers.values())).tokenizer.fingerprint()
    about = (
        f"{machine('fp32')}; tokenizer {tokenizer}; speech and noise ({options.noise_set}) of split {options.split}."
    )
    shown = [row for row in rows if len(enhancers) == 1 or row["row"] not in {*enhancers, *map(masked_row, enhancers)}]
    text = "\n".join(["# Enhancement", "", f"`{command}`", "", about, "", table(shown, options.against)]) + "\n"
    print(text)
    if problems:
        print(f"{len(problems)} of {len(chosen)} clips left out, the first: {problems[0]}")
    if options.markdown:
        with replacing(options.markdown) as path:
            path.write_text(text, encoding="utf-8")
    if options.clips:
        with replacing(options.clips) as path:
            path.write_text("".join(json.dumps(finite(record)) + "\n" for record in records), encoding="utf-8")
    if options.json:
        report = {
            "command": command,
            "machine": machine("fp32"),
            "enhancers": options.enhancers,
            "tokenizer": tokenizer,
            "split": options.split,
            "seed": options.seed,
            "against": options.against,
            "noise_set": options.noise_set,
            "rows": rows,
            "problems": problems,
        }
        write_json(options.json, finite(report))
    return 0 if rows else 2


if __name__ == "__main__":
    sys.exit(main())
