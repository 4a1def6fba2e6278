"""The clips of a manifest as frames, encoded when they are asked for and forgotten at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tokenizer.audio import audio_info
from tokenizer.errors import UserError
from tokenizer.frames import Tokenizer
from training.corpus import CachedClip
from training.manifest import Manifest, TagRule, apply_rules
from training.prepare import encode_clip, token_streams


class AudioClips:
    """A `training.scoring.ClipSource` of recordings.

    Args:
        manifest: Which.
        tokenizer: Encodes them; audio of any rate is resampled to its own.
        rules: Tags and use of text by label; see `TagRule`.

    Raises:
        UserError: when the rules leave no clip.
    """

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, rules: Sequence[TagRule] = ()) -> None:
        self.clips = list(apply_rules(manifest.clips, rules))
        self.name, self.tokenizer = str(manifest.source), tokenizer
        self._streams = token_streams(tokenizer, "float32")
        if not self.clips:
            raise UserError(f"{manifest.source}: no clip is left under {len(rules)} tag rules; widen their 'where'")

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, clip: int) -> CachedClip:
        about = self.clips[clip]
        arrays = encode_clip(about, self.tokenizer, self._streams)
        return CachedClip(
            key=about.key,
            split=about.split,
            text=about.text or None,
            tags=about.tags,
            labels=about.labels,
            codes=torch.from_numpy(arrays["codes"]).long().T.contiguous(),
            latents=torch.from_numpy(arrays["latents"]),
            features=torch.from_numpy(arrays["features"]) if "features" in arrays else None,
        )

    def num_frames(self, clip: int) -> int:
        """What manifest or header promise; 1 of what can't be opened."""
        about = self.clips[clip]
        seconds = about.duration if about.end is None else about.read_duration
        if seconds is None:
            try:
                seconds = audio_info(about.audio).duration_s - (about.start or 0.0)
            except UserError:
                seconds = 0.0
        return max(1, math.ceil(seconds * self.tokenizer.frame_rate_hz))

    def has_text(self, clip: int) -> bool:
        """Whether the clip has a text."""
        return bool(self.clips[clip].text)

    def all_tags(self) -> list[str]:
        """Every tag in use, sorted."""
        return sorted({tag for clip in self.clips for tag in clip.tags})
