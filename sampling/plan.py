"""A plan: codes that were drawn, and all that it takes to draw their latents and to make their audio again.

The file is safetensors: the codes, and the frames of a prompt; everything else is JSON in its metadata.

Shapes: B rows, K codebooks, T frames, D latent, F feature.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sampling.controls import Controls
from sampling.generate import Drawn, Limits, Request
from tokenizer.errors import UserError
from tokenizer.files import replacing
from tokenizer.frames import AudioFrames
from tokenizer.settings import from_mapping

FORMAT = "hybridlm-plan"
FORMAT_VERSION = 1
SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Which model drew the codes."""

    name: str
    """As it was loaded: "box", a folder or a hub id."""
    model: str
    """Fingerprint of its weights."""
    tokenizer: str
    """Fingerprint of its tokenizer."""
    precision: str = "fp32"
    """Of its weights (`hybridlm.precision`); another makes other latents of the same codes."""

    def __str__(self) -> str:
        return f"model {self.name!r} ({self.model}, tokenizer {self.tokenizer})"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Facts:
    """The JSON of a file; the fields are those of `Plan` and its request."""

    origin: Origin
    frame_rate_hz: float
    text: str | None
    tags: list[str]
    prefix: list[int]
    unconditional: list[int]
    prompt_frames: int
    reference: bool
    place: int | None
    context_frames: int
    seed: int
    controls: Controls
    sink_frames: int | None = None
    window_frames: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Codes of one or several recordings that were made together."""

    codes: Int[Tensor, "B K T"]
    """As drawn, without a prompt's; 0 past a row's end."""
    lengths: Int[Tensor, " B"]
    """Frames that were drawn in each row."""
    request: Request
    """What they were drawn for."""
    origin: Origin
    frame_rate_hz: float
    text: str | None = None
    tags: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        request: Request,
        drawn: Sequence[Drawn],
        origin: Origin,
        frame_rate_hz: float,
        text: str | None,
        tags: tuple[str, ...],
    ) -> Plan:
        """The plan of frames that were drawn one after the other, with codes."""
        active = torch.stack([step.active for step in drawn], dim=1)  # (B, T)
        codes = torch.cat([step.codes for step in drawn if step.codes is not None], dim=2)
        return cls(
            codes=(codes * active[:, None]).cpu(),
            lengths=active.sum(dim=1).cpu(),
            request=request,
            origin=origin,
            frame_rate_hz=frame_rate_hz,
            text=text,
            tags=tags,
        )

    @property
    def prompt_frames(self) -> int:
        """Frames of a prompt that the recordings begin with."""
        return 0 if self.request.prompt is None or self.request.reference else self.request.prompt.latents.shape[1]

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            UserError: for another suffix than .safetensors, or a place that can't be written.
        """
        path = check_name(Path(path))
        request = self.request
        facts = _Facts(
            origin=self.origin,
            frame_rate_hz=self.frame_rate_hz,
            text=self.text,
            tags=list(self.tags),
            prefix=list(request.prefix),
            unconditional=list(request.unconditional),
            prompt_frames=0 if request.prompt is None else request.prompt.latents.shape[1],
            reference=request.reference,
            place=request.place,
            context_frames=request.context_frames,
            seed=request.seeds[0],
            controls=request.controls,
            sink_frames=request.sink_frames,
            window_frames=request.window_frames,
        )
        tensors = {"codes": self.codes.to(torch.int32), "lengths": self.lengths}
        if request.prompt is not None:
            tensors["prompt.codes"] = request.prompt.codes.to(torch.int32)
            tensors["prompt.latents"] = request.prompt.latents
            if request.prompt.features is not None:
                tensors["prompt.features"] = request.prompt.features
        metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "plan": json.dumps(asdict(facts))}
        with replacing(path) as temporary:
            try:
                save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, temporary, metadata=metadata)
            except SafetensorError as error:
                raise UserError(
                    f"{path} can't be written ({error}); choose another place or make room there"
                ) from error
            temporary.chmod(0o644)  # safetensors lets no one but the owner read

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            UserError: for no file, one that is damaged or no plan, or a plan of another version.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such plan; `hybridlm generate --save-plan {path}` writes one")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no dict)
        except SafetensorError as error:
            raise UserError(f"{path} is no plan, or damaged ({error}); make it again with --save-plan") from error
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path} is no plan; `hybridlm generate --save-plan FILE` writes one")
        if metadata.get("format_version") != str(FORMAT_VERSION):
            raise UserError(
                f"{path}: format_version={metadata.get('format_version')}, but this hybridlm reads {FORMAT_VERSION}; "
                "use the hybridlm that wrote it, or make the plan again"
            )
        try:
            return _plan(tensors, json.loads(metadata.get("plan", "")), path)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); make the plan again") from error


def check_name(path: Path) -> Path:
    """The same path.

    Raises:
        UserError: for another suffix than .safetensors.
    """
    if path.suffix != SUFFIX:
        raise UserError(f"plan {str(path)!r} must end in {SUFFIX}")
    return path


def _plan(tensors: Mapping[str, Tensor], facts_json: Any, path: Path) -> Plan:
    """Raises ValueError or the like for what doesn't fit together."""
    if not isinstance(facts_json, dict):
        raise ValueError("its JSON is no object")
    facts = from_mapping(_Facts, facts_json, where=f"{path}: plan")
    codes, lengths = tensors["codes"].long(), tensors["lengths"].long()
    rows, _, frames = codes.shape
    if lengths.shape != (rows,) or not 0 < int(lengths.min()) <= int(lengths.max()) == frames:
        raise ValueError(f"lengths {lengths.tolist()} do not fit {frames} frames of {rows} rows")
    if int(codes.min()) < 0:
        raise ValueError("a code is negative")
    prompt = None
    if "prompt.codes" in tensors:
        prompt = AudioFrames(
            codes=tensors["prompt.codes"].long(),
            latents=tensors["prompt.latents"],
            features=tensors.get("prompt.features"),
            lengths=torch.tensor([facts.prompt_frames]),
        )
        if not prompt.codes.shape[2] == prompt.latents.shape[1] == facts.prompt_frames:
            raise ValueError(f"the prompt has {prompt.latents.shape[1]} frames, not {facts.prompt_frames}")
    request = Request(
        prefix=facts.prefix,
        unconditional=facts.unconditional,
        prompt=prompt,
        context_frames=facts.context_frames,
        limits=Limits(minimum=frames, maximum=frames),
        seeds=tuple(facts.seed + row for row in range(rows)),
        controls=facts.controls,
        reference=facts.reference,
        place=facts.place,
        sink_frames=facts.sink_frames,
        window_frames=facts.window_frames,
    )
    return Plan(
        codes=codes,
        lengths=lengths,
        request=request,
        origin=facts.origin,
        frame_rate_hz=facts.frame_rate_hz,
        text=facts.text,
        tags=tuple(facts.tags),
    )


def moved(request: Request, device: torch.device) -> Request:
    """The same request with its prompt on another device."""
    return request if request.prompt is None else replace(request, prompt=request.prompt.to(device))
