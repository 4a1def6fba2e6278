"""Shape and type checking of all four packages, switched on before any of them is imported."""

from __future__ import annotations

import torch
from jaxtyping import install_import_hook

import tests.support.typecheck  # the hook finds it as an attribute of `tests`

install_import_hook(["tokenizer", "hybridlm", "sampling", "training"], f"{tests.support.typecheck.__name__}.checked")
torch.set_num_threads(min(2, torch.get_num_threads()))
