"""Hybrid continuous-discrete language models for speech, music and sound."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridlm.config import ModelConfig as ModelConfig
    from hybridlm.model import HybridLM as HybridLM
    from sampling.pipeline import load as load
    from sampling.plan import Plan as Plan
    from sampling.render import render as render
    from tokenizer.frames import AudioFrames as AudioFrames

__version__ = "0.1.0"
__all__ = ["AudioFrames", "HybridLM", "ModelConfig", "Plan", "__version__", "load", "render"]

# Imported on first use, so that `import hybridlm` and `hybridlm --help` don't wait for torch.
_HOMES = {
    "AudioFrames": "tokenizer.frames",
    "HybridLM": "hybridlm.model",
    "ModelConfig": "hybridlm.config",
    "Plan": "sampling.plan",
    "load": "sampling.pipeline",
    "render": "sampling.render",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hybridlm' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
