"""`hybridlm merge`: an adapter written into the weights of its base, as a model's folder of its own."""

from __future__ import annotations

from pathlib import Path

import torch

from hybridlm.adapter import is_adapter, merge_adapter
from hybridlm.checkpoint import base_of, load_model, resolve, save_model
from tokenizer.errors import UserError


def run(adapter: str | Path, output: Path, model: str | Path | None = None) -> Path:
    """Write the model that an adapter and its base make together.

    The weights are kept in float32: what an adapter adds is small, and some of it would be lost in bfloat16.

    Args:
        adapter: Its folder or hub id.
        output: The new model's folder.
        model: The base; None: the one that the adapter names.

    Returns:
        `output`.

    Raises:
        UserError: an adapter or base that is not there or don't belong together, or an output that holds a model.
    """
    folder, output = resolve(adapter), Path(output)
    if (output / "config.json").exists() or is_adapter(output):
        raise UserError(f"--output {output} holds a model already; choose another folder")
    if not is_adapter(folder):
        raise UserError(f"--adapter {adapter} is no adapter; give a folder that `hybridlm finetune --lora` made")
    found = load_model(base_of(folder) if model is None else model, adapter=folder)
    merge_adapter(found.model)
    assert found.base is not None
    card = f"# `{folder.name}`, merged into `{Path(found.base.name).name}`\n"
    if (folder / "README.md").is_file():
        card += f"\n{(folder / 'README.md').read_text(encoding='utf-8')}"
    save_model(output, found.model, found.tokenizer, found.text, card=card, dtype=torch.float32)
    print(f"model: {output}")
    return output
