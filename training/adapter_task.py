"""Training of an adapter: a language task whose model is frozen but for what LoRA adds to it."""

from __future__ import annotations

from pathlib import Path

from hybridlm.adapter import Base, LoraConfig, add_lora, save_adapter
from hybridlm.checkpoint import Checkpoint
from training.language_task import LanguageTask, LanguageTaskConfig


class AdapterTask(LanguageTask):
    """See `LanguageTask`; what it exports are adapters.

    Args:
        config: Settings.
        lora: Size of the adapter.
        output: Folder of the run.
        start: The base.
        base: Its name and fingerprints.
        seed: Of the adapter's first weights.
    """

    def __init__(
        self, config: LanguageTaskConfig, lora: LoraConfig, *, output: Path, start: Checkpoint, base: Base, seed: int
    ) -> None:
        super().__init__(config, output=output, start=start)
        self.base = base
        add_lora(self.model, lora, seed=seed)

    def export(self, folder: Path) -> None:
        """The adapter's folder."""
        save_adapter(folder, self.model, self.base, card=f"# An adapter of `{self.base.name}`\n")
