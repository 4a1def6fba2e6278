"""Put a trained model, its tokenizer and its card into one folder, such as the box that ships with the package.

`python -m training.pack MODEL OUTPUT --tokenizer FOLDER --card CARD.md`: the tokenizer may be one whose decoder was
trained further, since its frames are the same; any other is refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hybridlm.checkpoint import load_model, save_model
from tokenizer.errors import UserError
from tokenizer.loading import load_tokenizer


def pack(model: Path, output: Path, *, tokenizer: Path | None = None, card: Path | None = None) -> int:
    """Write the folder `output`; returns the bytes of its weights.

    Raises:
        UserError: a folder that cannot be read or written, or a tokenizer that makes other frames.
    """
    checkpoint = load_model(model)
    chosen = checkpoint.tokenizer
    if tokenizer is not None:
        chosen = load_tokenizer(tokenizer)
        if chosen.fingerprint() != checkpoint.tokenizer.fingerprint():
            raise UserError(
                f"{tokenizer} makes other frames (fingerprint {chosen.fingerprint()}) than the model was trained on "
                f"({checkpoint.tokenizer.fingerprint()}); give the tokenizer that made its token caches"
            )
    save_model(output, checkpoint.model, chosen, checkpoint.text, card=card.read_text() if card else None)
    return sum(file.stat().st_size for file in output.rglob("*.safetensors"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Pack a model, its tokenizer and its card into one folder.")
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--card", type=Path)
    arguments = parser.parse_args()
    try:
        size = pack(arguments.model, arguments.output, tokenizer=arguments.tokenizer, card=arguments.card)
    except UserError as error:
        sys.exit(f"pack: error: {error}")
    print(f"{arguments.output}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
