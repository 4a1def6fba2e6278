"""Options that several commands of the front door share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Source(str, Enum):
    """Which stream of a tokenizer the audio is decoded from."""

    codes = "codes"
    latents = "latents"


class View(str, Enum):
    """Which view of a tokenizer's frames is probed."""

    features = "features"
    latents = "latents"
    codes = "codes"


class ProbeMethod(str, Enum):
    """How a probe tells classes apart."""

    linear = "linear"
    knn = "knn"
    logistic = "logistic"


class CacheFormat(str, Enum):
    """How tokens lie on disk."""

    rows = "rows"
    tar = "tar"


class TrainingBackend(str, Enum):
    """How the processes of a run share a model."""

    ddp = "ddp"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"
    fsdp2 = "fsdp2"


ModelOption = Annotated[
    str, typer.Option("--model", metavar="NAME_OR_DIR", help="'box', a model's folder or a hub id.")
]
TokenizerOption = Annotated[
    str,
    typer.Option(
        "--tokenizer",
        metavar="NAME_OR_DIR",
        help=(
            "'box', 'encodec', 'hf:' and a codec's hub id or folder, or a tokenizer's or model's folder; "
            "'log-mel:' before any adds mel slices as features."
        ),
    ),
]
DataOption = Annotated[
    Path, typer.Option("--data", metavar="FOLDER_OR_MANIFEST", help="A folder of audio or tar files, a JSONL manifest.")
]
AdapterOption = Annotated[
    str | None,
    typer.Option("--adapter", metavar="DIR", help="An adapter that `finetune --lora` made of this model."),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option("--precision", metavar="auto|fp32|bf16|int8", help="Of the weights; auto: what is fastest here."),
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here too.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="Settings to change, such as optimizer.learning_rate=1e-4."),
]
