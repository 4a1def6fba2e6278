"""What a model that generates is loaded from: weights at a precision, adapters, and where all of it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from hybridlm.adapter import Base, adapter_names, load_adapter, use_adapter
from hybridlm.checkpoint import resolve
from hybridlm.compiling import compile_step, drop
from hybridlm.folder import fingerprint
from hybridlm.model import HybridLM
from hybridlm.precision import AUTO, Precision, check, choose, pack, plain_state, unpack
from sampling.plan import Origin
from tokenizer.frames import Tokenizer
from tokenizer.text import TextTokenizer


class LoadedModel:
    """A language model, the tokenizer of its frames and the pieces of its text.

    Args:
        model: In evaluation mode.
        tokenizer: The one whose frames the model was trained on.
        text: The text pieces and tags of its prefix.
        base: Which weights the model has, so that adapters can be told to be of this model.
        name: What it was loaded by.
    """

    def __init__(
        self,
        model: HybridLM,
        tokenizer: Tokenizer,
        text: TextTokenizer,
        base: Base | None = None,
        name: str = "unnamed",
    ) -> None:
        self.model, self.tokenizer, self.text, self.base, self.name = model, tokenizer, text, base, name
        self.sample_rate_hz = tokenizer.sample_rate_hz
        self.told: tuple[str, ...] = ()
        """What a user should know of how the model was loaded, a line each."""
        self._fingerprint: str | None = None
        """Of the weights, before they were rounded."""

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are loaded."""
        return adapter_names(self.model)

    def add_adapter(self, folder: str | Path, name: str) -> None:
        """Load an adapter beside those that are loaded, and use it.

        Args:
            folder: Made by `hybridlm finetune --lora`, or a hub id.
            name: For `use_adapter`.

        Raises:
            UserError: a name that is taken, or an adapter that is damaged or of another model.
        """
        if self.base is None:
            raise ValueError("this model was not read from a folder, so no adapter can be told to be of it")
        packed = self.model.packed is not None
        unpack(self.model)
        self._fingerprint = None
        load_adapter(self.model, resolve(folder), self.base, name=name)
        if packed:
            self.pack("fp32")

    def use_adapter(self, name: str | None) -> None:
        """Switch to an adapter; None: to none, which gives exactly the model's own output.

        Raises:
            UserError: no adapter of that name is loaded.
        """
        use_adapter(self.model, name)

    def pack(self, precision: str, compile_rows: int = 0) -> None:
        """Lay the weights out for drawing (`hybridlm.precision`), after which they can't be trained.

        Args:
            precision: "fp32", "bf16", "int8", or "auto" for what a short measurement finds fastest here.
            compile_rows: Also compile a frame's step for so many rows (`hybridlm.compiling`), a guided recording being
                two; 0: do not.

        Raises:
            UserError: another precision, or one that the device can't do; a model whose weights are rounded already.
        """
        check(precision, next(self.model.parameters()).device)
        drop(self.model)
        unpack(self.model)
        self.told = ()
        if precision == AUTO:
            chosen = choose(self.model)
            precision, self.told = chosen.precision, (chosen.reason,)
        self._fingerprint = self._weights() if precision != "fp32" else None
        unfit = pack(self.model, cast(Precision, precision), blocks=not compile_rows)
        self.told += () if unfit is None else (f"precision {precision}: {unfit}",)
        if compile_rows:
            self.told += (compile_step(self.model, compile_rows),)

    def _weights(self) -> str:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in plain_state(self.model).items()}
        return fingerprint(weights)

    @property
    def origin(self) -> Origin:
        """Names and fingerprints, the weights' taken anew unless they are rounded: they may have changed."""
        return Origin(
            name=self.name,
            model=self._fingerprint or self._weights(),
            tokenizer=self.tokenizer.fingerprint(),
            precision=self.model.packed or "fp32",
        )
