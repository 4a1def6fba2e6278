"""How well a recogniser understands the model: word error rate by pocketsphinx, beside the same on real recordings.

    python benchmarks/speech_wer.py --sentences text/test.txt --manifest data/manifest.jsonl [--model DIR] [--json FILE]

The model speaks the first `--count` sentences, one seed each; pocketsphinx (its bundled English model) transcribes them
at 16 kHz. Both texts are normalised alike: NFKD without accents, lower case, "mr", "mrs", "dr" spelled out, hyphens and
dashes to spaces, everything but letters, digits and apostrophes inside words removed. The rate is the sum of
substitutions, insertions and deletions over the sum of reference words; its 95 % interval is a bootstrap over
sentences. The recogniser makes mistakes on real speech too: the second row says how many, on recordings chosen from the
manifest.
"""

from __future__ import annotations

import argparse
import json
import re
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path

import jiwer
import numpy as np
import torch
import torchaudio.functional as audio_functional
from pocketsphinx import Decoder
from torch import Tensor

import sampling.pipeline
from tokenizer.audio import read_audio, write_audio

RECOGNISER_RATE_HZ = 16000
SPELLED_OUT = {"mr": "mister", "mrs": "missus", "missis": "missus", "dr": "doctor", "colour": "color"}


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """One recording: what was said, what was heard, how many words went wrong."""

    name: str
    reference: str
    heard: str
    errors: int
    words: int
    seconds: float


def normalise(text: str) -> str:
    """The form in which references and transcripts are compared; see the top of this file."""
    text = unicodedata.normalize("NFKD", text).lower().replace("\u2019", "'")
    text = "".join(character for character in text if not unicodedata.combining(character))
    text = re.sub(r"\(\d+\)", " ", text)  # pocketsphinx marks variants of a pronunciation so
    text = re.sub(r"[^a-z0-9' ]+", " ", text.replace(".", ""))
    words = [word.strip("'") for word in text.split()]
    return " ".join(SPELLED_OUT.get(word, word) for word in words if word)


def transcribe(recogniser: Decoder, waveform: Tensor, sample_rate_hz: int) -> str:
    """Words that the recogniser hears in `waveform` (1, S)."""
    samples = audio_functional.resample(waveform.reshape(-1), sample_rate_hz, RECOGNISER_RATE_HZ)
    pcm = (samples.clamp(-1, 1) * 32767).to(torch.int16).numpy().tobytes()
    recogniser.start_utt()
    recogniser.process_raw(pcm, full_utt=True)
    recogniser.end_utt()
    hypothesis = recogniser.hyp()
    return hypothesis.hypstr if hypothesis else ""


def compare(name: str, reference: str, heard: str, seconds: float) -> Transcript:
    """Count the errors of one recording."""
    reference, heard = normalise(reference), normalise(heard)
    measured = jiwer.process_words(reference, heard)
    errors = measured.substitutions + measured.deletions + measured.insertions
    return Transcript(
        name=name, reference=reference, heard=heard, errors=errors, words=len(reference.split()), seconds=seconds
    )


def summarise(transcripts: list[Transcript], resamples: int = 10_000) -> dict[str, float | int | list[float]]:
    """Word error rate with a 95 % interval from a bootstrap over sentences (seed 0)."""
    errors = np.array([t.errors for t in transcripts], dtype=np.float64)
    words = np.array([t.words for t in transcripts], dtype=np.float64)
    chosen = np.random.default_rng(0).integers(len(transcripts), size=(resamples, len(transcripts)))
    rates = errors[chosen].sum(1) / words[chosen].sum(1)
    low, high = np.quantile(rates, [0.025, 0.975])
    return {
        "wer": float(errors.sum() / words.sum()),
        "interval": [float(low), float(high)],
        "sentences": len(transcripts),
        "words": int(words.sum()),
        "seconds": float(sum(t.seconds for t in transcripts)),
    }


def speak(args: argparse.Namespace, recogniser: Decoder) -> list[Transcript]:
    """The model's sentences, transcribed."""
    model = sampling.pipeline.load(args.model)
    lines = [line.strip() for line in args.sentences.read_text(encoding="utf-8").splitlines()]
    sentences = [line for line in lines if normalise(line)][: args.count]
    controls = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "cfg")}
    transcripts = []
    for index, sentence in enumerate(sentences):
        audio = model.generate(text=sentence, tags=tuple(args.tag), seed=args.seed + index, **controls)
        waveform = audio.row(0)
        if args.output_dir:
            write_audio(args.output_dir / f"{index:03d}.wav", waveform, audio.sample_rate_hz)
        heard = transcribe(recogniser, waveform, audio.sample_rate_hz)
        transcripts.append(compare(f"{index:03d}", sentence, heard, waveform.shape[-1] / audio.sample_rate_hz))
    return transcripts


def real(args: argparse.Namespace, recogniser: Decoder) -> list[Transcript]:
    """Recordings of the manifest, transcribed."""
    transcripts = []
    for line in args.manifest.read_text(encoding="utf-8").splitlines():
        clip = json.loads(line)
        if clip.get("set") == args.set and clip.get("split") == args.split and clip.get("text"):
            waveform = read_audio(args.manifest.parent / clip["path"], RECOGNISER_RATE_HZ)
            heard = transcribe(recogniser, waveform, RECOGNISER_RATE_HZ)
            transcripts.append(compare(clip["path"], clip["text"], heard, waveform.shape[-1] / RECOGNISER_RATE_HZ))
    return transcripts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=Path, required=True, help="a text file, one sentence a line")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--model", default="box")
    parser.add_argument("--tag", action="append", default=[], help="a tag of the voice; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of the first sentence; the i-th uses seed + i")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--cfg", type=float)
    parser.add_argument("--manifest", type=Path, help="JSONL of real recordings, for the second row")
    parser.add_argument("--set", default="kathleen")
    parser.add_argument("--split", default="test")
    parser.add_argument("--output-dir", type=Path, help="keep the speech here")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)

    recogniser = Decoder(samprate=RECOGNISER_RATE_HZ, loglevel="FATAL")
    results = {"model": speak(args, recogniser)}
    if args.manifest:
        results[f"real ({args.set}, {args.split})"] = real(args, recogniser)
    report = {}
    for name, transcripts in results.items():
        if not transcripts:
            raise SystemExit(f"{name}: no sentences; check --sentences, --set and --split")
        report[name] = {**summarise(transcripts), "transcripts": [asdict(t) for t in transcripts]}
        row = report[name]
        low, high = row["interval"]
        print(f"{name:28s} WER {row['wer']:.3f} [{low:.3f}, {high:.3f}]  {row['sentences']} sentences")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
