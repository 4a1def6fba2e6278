"""Synthetic speech from text by espeak-ng, for learning how text and frames align before the real voices come.

`python -m training.synthesize SENTENCES.txt OUTPUT --num-sentences N` writes FLAC files and a `manifest.jsonl`, each
clip marked as what it is by `"set": "espeak"`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tokenizer.audio import read_audio, write_audio
from tokenizer.errors import UserError
from tokenizer.files import replacing

SAMPLE_RATE_HZ = 24000


def synthesize(
    sentences: list[str], output: Path, *, voice: str = "en-us+f3", words_per_minute: tuple[int, int] = (140, 180)
) -> int:
    """Speak each sentence into `output/NNNNN.flac` and write `output/manifest.jsonl`; returns the number of clips.

    The speaking rate is drawn per sentence from `words_per_minute`, always the same way.

    Raises:
        UserError: when espeak-ng is not installed.
    """
    if shutil.which("espeak-ng") is None:
        raise UserError("espeak-ng is not installed; install it (Debian: apt-get install espeak-ng) and run this again")
    output.mkdir(parents=True, exist_ok=True)

    def speak(item: tuple[int, str]) -> dict[str, object]:
        index, sentence = item
        rate = random.Random(index).randint(*words_per_minute)
        path = output / f"{index:05d}.flac"
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder) / "speech.wav"
            subprocess.run(["espeak-ng", "-v", voice, "-s", str(rate), "-w", str(raw), "--", sentence], check=True)
            waveform = read_audio(raw, SAMPLE_RATE_HZ)
        write_audio(path, 0.5 * waveform / waveform.abs().max().clamp(min=1e-3), SAMPLE_RATE_HZ)
        return {
            "path": path.name,
            "duration": round(waveform.shape[-1] / SAMPLE_RATE_HZ, 3),
            "text": sentence,
            "split": "train",
            "set": "espeak",
            "speaker": "espeak",
            "language": "en",
        }

    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(speak, enumerate(sentences)))
    with replacing(output / "manifest.jsonl") as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Speak the sentences of a text file with espeak-ng.")
    parser.add_argument("sentences", type=Path, help="text file, one sentence a line")
    parser.add_argument("output", type=Path)
    parser.add_argument("--num-sentences", type=int, default=3000)
    parser.add_argument("--min-characters", type=int, default=15)
    parser.add_argument("--max-characters", type=int, default=90)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lines = [line.strip() for line in arguments.sentences.read_text().splitlines()]
    lines = [line for line in lines if arguments.min_characters <= len(line) <= arguments.max_characters]
    random.Random(arguments.seed).shuffle(lines)
    count = synthesize(lines[: arguments.num_sentences], arguments.output)
    print(f"{count} clips in {arguments.output}")


if __name__ == "__main__":
    main()
