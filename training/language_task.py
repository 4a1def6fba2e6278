"""Training of a language model on cached frames: codes, latents, stop and alignment, all from one pass.

Shapes: B batch, P prefix, T frames, K codebooks, D latent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from hybridlm.backbone import Backbone
from hybridlm.checkpoint import Checkpoint, open_tokenizer, save_model
from hybridlm.likelihood import noise_latents
from hybridlm.reader import Guide
from tokenizer.errors import UserError
from tokenizer.frames import AudioFrames
from tokenizer.text import TextTokenizer
from training.align import read_alignments
from training.corpus import CachedClip, TokenCache, Window
from training.distributed import on_any_process
from training.examples import (
    GOES_ON,
    MAX_PIECES,
    Prefix,
    clip_seed,
    device_of,
    drop_conditions,
    make_prefix,
    places_in_text,
    with_latents,
)
from training.language_loss import LanguageLossConfig, combine, sums
from training.listening import Sampler, prompts_of
from training.new_model import new_model, taken_over
from training.state import checkpoints
from training.task import Batch, Sample
from training.token_data import PackedDataConfig, open_frames


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """The text pieces and tags."""

    model: str | None = None
    """A text model, or a folder that holds one. None: learn one from `sentences` and the clips' texts."""
    sentences: str | None = None
    """File of sentences, one a line."""
    vocab_size: int = 512
    tags: tuple[str, ...] = ()
    """Tags besides those of the clips."""
    max_pieces: int = MAX_PIECES
    """A clip whose prefix would be longer is taken without its text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageTaskConfig:
    """Settings of `task: language`, under `language:`."""

    tokenizer: str
    """Name or folder of the tokenizer that made the caches."""
    data: PackedDataConfig
    text: TextConfig = field(default_factory=TextConfig)
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of `hybridlm.config.ModelConfig`, without those that the tokenizer and the text model decide."""
    backbone: str | None = None
    """`hf:` and the hub id or folder of a Llama, Qwen2 or Qwen3 to start from: its layers, text embeddings and text
    pieces are taken over, and its sizes are the model's."""
    losses: LanguageLossConfig = field(default_factory=LanguageLossConfig)
    trained: Literal["all", "flow_head"] = "all"
    """`flow_head`: nothing else learns, so that a trained model's likelihoods stay what they are (with `init_from` and
    `init_partial` of the run)."""

    def __post_init__(self) -> None:
        if self.backbone is not None and (self.text.model is not None or self.text.sentences is not None):
            raise ValueError(f"backbone={self.backbone} has text pieces of its own; leave out text.model and sentences")


class LanguageTask:
    """See `training.task.Task`.

    Args:
        config: Settings.
        output: Folder of the run, where the text model is kept for resuming.
        start: A model to go on from, with its tokenizer and text; then `config.tokenizer`, `config.text` and
            `config.backbone` are not read, and `config.model` may change training-time fields alone.
        sampler: Makes audio for TensorBoard.

    Raises:
        UserError: settings, caches or texts that do not fit together.
    """

    untrained = False
    """Whether the model is a new one, from its settings alone."""

    def __init__(
        self,
        config: LanguageTaskConfig,
        *,
        output: Path,
        start: Checkpoint | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        self.config, self._sampler = config, sampler
        self.untrained = start is None
        if start is not None:
            self.tokenizer = start.tokenizer
        else:
            self.tokenizer = open_tokenizer(config.tokenizer)
        self.train_data = open_frames(config.data, "train", self.tokenizer)
        self.validation_data = None
        if config.data.validation_fraction > 0:
            self.validation_data = open_frames(config.data, "validation", self.tokenizer)
        backbone = Backbone.open(config.backbone) if config.backbone is not None and start is None else None
        self.text = start.text if start is not None else self._text(output, backbone)
        for tag in self.train_data.index.all_tags():
            self.text.tag_id(tag)
        if start is not None:
            self.model = taken_over(start, config.model)
        else:
            self.model = new_model(config.model, self.tokenizer, self.text, self.train_data, backbone)
        if config.trained == "flow_head":
            if self.model.flow_head is None:
                raise UserError("trained=flow_head needs a model with one; set model.flow_layers")
            self.model.requires_grad_(False)
            self.model.flow_head.requires_grad_(True)
        self._alignments: dict[tuple[int, str], npt.NDArray[np.float32]] = {}
        if self.model.reader is not None and config.losses.alignment_weight > 0:
            for number, folder in enumerate(config.data.caches):
                self._alignments.update({(number, key): frames for key, frames in read_alignments(Path(folder))})
        weights = config.losses.code_weights
        if weights and len(weights) != self.model.config.output_codebooks:
            raise UserError(
                f"losses.code_weights has {len(weights)} numbers, but the model predicts "
                f"{self.model.config.output_codebooks} codebooks; give one each, or none"
            )

    # What the loop asks for

    def modules(self) -> Mapping[str, nn.Module]:
        """The model; tokenizer and text stay as they are."""
        return {"model": self.model}

    def turns(self, step: int) -> Sequence[str]:
        """The model, always."""
        return ("model",)

    def batches(self, *, seed: int, rank: int, world_size: int, skip: int) -> Iterator[Batch]:
        """Windows of about equal length or, packed, of any; without noise."""
        self.train_data.check_shared(world_size, self._longest())
        return self._batches(seed, rank, world_size, skip)

    def _longest(self) -> int:
        """Frames of a window."""
        return min(self.config.data.max_frames, self.config.data.batch_frames, self.model.config.max_frames)

    def _batches(self, seed: int, rank: int, world_size: int, skip: int) -> Iterator[Batch]:
        data, cache = self.config.data, self.train_data
        limits = {"batch_frames": data.batch_frames, "max_frames": self._longest()}
        where = {"seed": seed, "rank": rank, "world_size": world_size, "skip": skip}
        if data.pack_frames is None:
            for number, windows in enumerate(cache.batches(**where, **limits), start=skip):
                yield self.batch(cache, windows, self._one_tag_alone(len(windows), [seed, rank, number]))
            return
        for number, rows in enumerate(cache.packed(**where, **limits, row_frames=data.pack_frames), start=skip):
            windows = [window for row in rows for window in row]
            alone = self._one_tag_alone(len(windows), [seed, world_size * number + rank])
            batch = self.batch(cache, windows, alone)
            batch["rows"] = torch.tensor([number for number, row in enumerate(rows) for _ in row])
            yield batch

    def _one_tag_alone(self, count: int, seed: list[int]) -> list[bool]:
        return [bool(draw < self.config.losses.tag_dropout) for draw in np.random.default_rng(seed).random(count)]

    def batch(
        self, cache: TokenCache, windows: Sequence[Window], first_tag_alone: Sequence[bool] | None = None
    ) -> Batch:
        """Read windows; a window that lacks its clip's beginning has no text, a marked one no tag but its first."""
        clips = [cache.read(window) for window in windows]
        texts = [clip.text if window.start == 0 else None for clip, window in zip(clips, windows, strict=True)]
        tags = [clip.tags for clip in clips]
        if first_tag_alone is not None:
            tags = [row[:1] if alone else row for row, alone in zip(tags, first_tag_alone, strict=True)]
        rows = list(zip(texts, tags, strict=True))
        prefix = make_prefix(self.text, rows, self.config.text.max_pieces)
        reaches_end = [w.start + w.frames == cache.num_frames(w.clip) for w in windows]
        ended = torch.tensor([r and GOES_ON not in c.labels for r, c in zip(reaches_end, clips, strict=True)])
        complete = ended & torch.tensor([window.start == 0 for window in windows])
        frames = cache.frames(clips)
        batch: Batch = {
            "prefix": prefix.ids,
            "prefix_mask": prefix.mask,
            "text_mask": prefix.text_mask,
            "codes": frames.codes,
            "latents": frames.latents,
            "lengths": frames.lengths,
            "ended": ended,
            "aligned": complete & prefix.text_mask.any(dim=1),
            "clips": [clip.key for clip in clips],
        }
        if frames.features is not None:
            batch["features"] = frames.features
        if cache.shares is not None:
            batch["shares"] = cache.found_shares(windows)
        if self._alignments:
            readers = [int(cache.index.reader[window.clip]) for window in windows]
            batch["places"], batch["places_known"] = self._places(clips, readers, prefix)
        return batch

    def _places(self, clips: Sequence[CachedClip], readers: Sequence[int], prefix: Prefix) -> tuple[Tensor, Tensor]:
        """Places (B, T + 1) in the text, and which rows have them."""
        longest = max(clip.latents.shape[0] for clip in clips)
        places, known = torch.zeros(len(clips), longest + 1), torch.zeros(len(clips), dtype=torch.bool)
        for row, (clip, reader) in enumerate(zip(clips, readers, strict=True)):
            frames = self._alignments.get((reader, clip.key))
            if frames is None or clip.text is None or not bool(prefix.text_mask[row].any()):
                continue
            found = places_in_text(self.text, clip.text, frames, clip.latents.shape[0])
            places[row, : len(found)] = found
            places[row, len(found) :] = found[-1]
            known[row] = True
        return places, known

    def size(self, batch: Batch) -> int:
        """Frames without padding."""
        return int(batch["lengths"].sum())

    def loss(
        self, turn: str, batch: Batch, *, step: int, generator: torch.Generator
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """The weighted sum of the parts, each a mean a code, dimension, decision or row."""
        losses, config = self.config.losses, self.model.config
        device = batch["latents"].device
        latents = batch["latents"]
        if config.sigma > 0:
            latents = latents + config.sigma * torch.randn(latents.shape, generator=generator, device=device)
        mask = batch["prefix_mask"]
        hidden = torch.rand(mask.shape[0], 1, generator=generator, device=device) < losses.text_dropout
        mask = mask & ~(hidden & batch["text_mask"])
        mask = drop_conditions(mask, config.condition_dropout, generator)
        can_align = config.alignment_heads > 0 or config.reader_layer is not None
        aligned = bool(batch["aligned"].any())
        align = losses.alignment_weight > 0 and can_align and on_any_process(aligned, device)
        nll = self.model(
            batch["prefix"],
            mask,
            self._frames(batch, latents),
            ended=batch["ended"],
            generator=generator,
            head_fraction=losses.head_fraction,
            text_mask=batch["text_mask"] if align else None,
            aligned=batch["aligned"] if align else None,
            guide=self._guide(batch, generator) if align and "places" in batch else None,
            with_flow=losses.flow_weight > 0,
            rows=batch.get("rows"),
        )
        loss, parts = combine(nll, losses, latent_dim=config.latent_dim, aligned=batch["aligned"])
        if align and not aligned:
            del parts["alignment"]  # of another process's rows
        return loss, {**parts, **batch.get("shares", {})}

    def _guide(self, batch: Batch, generator: torch.Generator) -> Guide:
        """The true places, each with the one before it, in error: partly drifting through the row, partly by chance.

        Rows differ in how large their errors are, up to `guide_error`: exact ones teach to read, wrong ones to find
        back.
        """
        places = batch["places"]
        rows, states = places.shape
        ends = torch.randn(rows, 2, generator=generator, device=places.device)
        chance = torch.randn(rows, states, generator=generator, device=places.device)
        drift = torch.linspace(0, 1, states, device=places.device)
        size = self.config.losses.guide_error * torch.rand(rows, 1, generator=generator, device=places.device)
        error = 0.9 * (ends[:, :1] * (1 - drift) + ends[:, 1:] * drift) + 0.45 * chance
        before = torch.cat([torch.zeros_like(places[:, :1]), places[:, :-1]], dim=1)
        before = (before + size * error).clamp(min=0)
        return Guide(before=before, places=places, known=batch["places_known"])

    def validate(self) -> Mapping[str, float]:
        """Likelihood of the held-out clips, in nats a frame; the noise of a clip is always the same. A flow head's loss
        stands beside it, and is `loss` where nothing else learns."""
        cache = self.validation_data or self.train_data
        totals: dict[str, float] = {}
        frames = 0
        generator = torch.Generator(self._device()).manual_seed(0)  # the flow's alone
        for windows in self._validation_windows(cache):
            batch = self.batch(cache, windows)
            batch = send_to_device(batch, self._device())
            seeds = [clip_seed(cache.index.clip(window.clip).key) for window in windows]
            latents = noise_latents(batch["latents"], self.model.config.sigma, seeds)
            nll = self.model(
                batch["prefix"],
                batch["prefix_mask"],
                self._frames(batch, latents),
                ended=batch["ended"],
                generator=generator,
                with_flow=True,
            )
            frames += int(nll.mask.sum())
            for name, value in sums(nll).items():
                totals[name] = totals.get(name, 0.0) + value
        figures = {name: value / frames for name, value in totals.items()}
        parts = ("flow",) if self.config.trained == "flow_head" else ("codes", "latents", "stop")
        figures["loss"] = sum(figures[name] for name in parts)
        return figures

    def export(self, folder: Path) -> None:
        """The model's folder."""
        save_model(folder, self.model, self.tokenizer, self.text)

    def samples(self) -> Sequence[Sample]:
        """What the sampler makes of the model, given what some held-out clips have of text and tags."""
        if self._sampler is None:
            return ()
        prompts = () if self.validation_data is None else prompts_of(self.validation_data)
        return self._sampler(self.model, self.tokenizer, self.text, prompts)

    # Inside

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _frames(self, batch: Batch, latents: Tensor) -> AudioFrames:
        if isinstance(self.tokenizer, nn.Module) and device_of(self.tokenizer) != latents.device:
            self.tokenizer.to(latents.device)
        frames = AudioFrames(
            codes=batch["codes"],
            latents=batch["latents"],
            lengths=batch["lengths"],
            features=batch.get("features"),
        )
        return with_latents(self.tokenizer, frames, latents)

    def _validation_windows(self, cache: TokenCache) -> Iterator[list[Window]]:
        """The beginnings of clips in an order that mixes sources, as far as `validation_frames` go, by length."""
        data = self.config.data
        longest = self._longest()
        order = torch.randperm(len(cache), generator=torch.Generator().manual_seed(0)).tolist()
        chosen: list[Window] = []
        left = data.validation_frames
        for clip in order:
            if left <= 0:
                break
            chosen.append(Window(clip, 0, min(cache.num_frames(clip), longest)))
            left -= chosen[-1].frames
        chosen.sort(key=lambda window: window.frames)
        batch: list[Window] = []
        for window in chosen:
            if batch and (len(batch) + 1) * window.frames > data.batch_frames:
                yield batch
                batch = []
            batch.append(window)
        yield batch

    def _text(self, output: Path, backbone: Backbone | None) -> TextTokenizer:
        """The given text model, that of the run to be resumed, the backbone's, or one learned now."""
        settings, kept = self.config.text, output / "text.model"
        if settings.model is not None:
            return TextTokenizer.load(Path(settings.model))
        if checkpoints(output) and kept.is_file():
            return TextTokenizer.load(kept)
        index = self.train_data.index
        tags = [*settings.tags, *index.all_tags()]
        if backbone is not None:
            text = backbone.text(tags)
            text.save(kept)
            return text
        sentences = read_sentences(Path(settings.sentences)) if settings.sentences else []
        sentences += sorted({str(index.clip(i).text) for i in range(len(index)) if index.has_text[i]})
        # A corpus without any text still needs pieces, since a prefix may be asked for.
        return TextTokenizer.train(sentences or ["a"], kept, vocab_size=settings.vocab_size, tags=tags)


def read_sentences(path: Path) -> list[str]:
    """Lines of a text file, or the `text` entries of a JSON-lines file.

    Raises:
        UserError: no such file, or not UTF-8 text.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text.sentences={path} cannot be read ({error}); name a UTF-8 text file") from error
    if path.suffix != ".jsonl":
        return lines
    try:
        return [text for line in lines if isinstance(text := json.loads(line).get("text"), str)]
    except (ValueError, AttributeError) as error:
        raise UserError(f"text.sentences={path} is not a JSON-lines file ({error})") from error
