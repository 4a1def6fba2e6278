"""HybridLM: text, then audio frames of codes and latents, predicted one frame at a time.

    p(frame_{t+1} | past) = p(stop | h) * prod_k p(code_k | code_<k, h) * p(latent | codes, h)

A sequence is a left-padded prefix of text ids that ends in `<audio>`, then T right-padded frames. A row's positions
count from its first real prefix id. The state at the last prefix id predicts frame 0, that at frame t frame t + 1; the
states are numbered by what they predict, 0 .. T, and the last may only be asked whether the audio stops.

Shapes: B batch, P prefix, T frames, L = T + 1 states, K codebooks, V codebook size, D latent, C hidden, N positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hybridlm.alignment import alignment_loss
from hybridlm.cache import KeyValueCache
from hybridlm.code_head import CodeHead
from hybridlm.config import ModelConfig
from hybridlm.decoder import INIT_STD, Decoder, TextKeys
from hybridlm.flow_head import FlowHead
from hybridlm.frame_nll import FrameNLL
from hybridlm.fusion import CodeEmbedding, FrameFusion, FrameStatistics, ShortContext, history_noise
from hybridlm.latent_head import GaussianMixture, LatentHead
from hybridlm.model_cache import ModelCache
from hybridlm.packing import Packing
from hybridlm.reader import Guide, Reading, TextReader, place_loss
from hybridlm.walk import Walk, walk
from tokenizer.frames import AudioFrames
from tokenizer.transformer import TransformerState


class HybridLM(nn.Module):
    """The language model; calling it is calling `nll`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.text_embedding = nn.Embedding(config.vocab_size, config.hidden_dim)
        nn.init.normal_(self.text_embedding.weight, std=INIT_STD)
        self.statistics = FrameStatistics(config)
        self.code_embedding = CodeEmbedding(config) if config.uses_codes else None
        self.fusion = FrameFusion(config)
        self.decoder = Decoder(config)
        self.reader = TextReader(config) if config.reader_layer is not None else None
        self.short_context = ShortContext(config) if config.has_short_context else None
        self.code_head = CodeHead(config, self.code_embedding) if self.code_embedding is not None else None
        self.latent_head = LatentHead(config, self.code_embedding, self.statistics) if config.predicts_latents else None
        self.flow_head = FlowHead(config, self.code_embedding, self.statistics) if config.flow_layers else None
        self.stop = nn.Linear(config.hidden_dim, 1)
        nn.init.normal_(self.stop.weight, std=INIT_STD)
        # Audio stops once in some hundred frames.
        nn.init.constant_(self.stop.bias, -4.0)
        self.packed: str | None = None
        """The precision that `hybridlm.precision.pack` gave the matrices; None: they are as they are trained."""
        self.register_state_dict_pre_hook(_refuse_packed)

    # Learning rates

    @property
    def width(self) -> int:
        """C, the width of the decoder's states."""
        return self.config.hidden_dim

    def hidden_matrices(self) -> Iterator[nn.Parameter]:
        """The decoder's matrices, of which inputs and outputs both grow with the width.

        At one learning rate Adam moves each weight by as much whatever the width, so that what a matrix puts out moves
        in proportion to the number of its inputs: its rate should go with 1 / C (muP, Yang et al. 2022, arXiv
        2203.03466). Embeddings, gains and heads have a side that does not grow, and keep theirs.
        """
        return (parameter for parameter in self.decoder.parameters() if parameter.ndim >= 2)

    # Whole sequences

    def states(
        self,
        prefix: Int[Tensor, "B P"],
        prefix_mask: Bool[Tensor, "B P"],
        frames: AudioFrames,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "B L C"]:
        """States 0 .. T, each of which sees the prefix and the frames before it.

        Args:
            prefix: Text ids, left-padded, the last one `<audio>`.
            prefix_mask: False for padding and for a hidden condition .
            frames: The audio; what lies past `lengths` influences no state up to there.
            generator: For the noise on the history, in training mode.
        """
        return self._run(prefix, prefix_mask, frames, generator, None).states

    def alignment(
        self,
        prefix: Int[Tensor, "B P"],
        prefix_mask: Bool[Tensor, "B P"],
        frames: AudioFrames,
        text_mask: Bool[Tensor, "B P"],
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "B heads T P"]:
        """Attention of the designated heads from the state that predicts frame t to the text pieces alone."""
        if self.config.alignment_heads == 0:
            raise ValueError("alignment_heads=0 gives no alignment; set it to 1 or more")
        alignment = self._run(prefix, prefix_mask, frames, generator, text_mask & prefix_mask).alignment
        assert alignment is not None
        return alignment

    def nll(
        self,
        prefix: Int[Tensor, "B P"],
        prefix_mask: Bool[Tensor, "B P"],
        frames: AudioFrames,
        *,
        ended: Bool[Tensor, " B"] | None = None,
        generator: torch.Generator | None = None,
        head_fraction: float = 1.0,
        text_mask: Bool[Tensor, "B P"] | None = None,
        aligned: Bool[Tensor, " B"] | None = None,
        guide: Guide | None = None,
        with_flow: bool = False,
        rows: Int[Tensor, " B"] | None = None,
    ) -> FrameNLL:
        """Score audio, frame by frame.

        Args:
            prefix: See `states`.
            prefix_mask: See `states`.
            frames: Latents as they shall be scored (for published figures noised, with codes of these same latents).
            ended: Rows whose audio is over after its last frame; None: no row (cut out of something longer).
            generator: For the noise on the history and the choice of frames.
            head_fraction: Score codes and latents of a random share of the frames only, to save time in training.
            text_mask: Prefix columns that are pieces of the spoken text; asks for the alignment loss.
            aligned: Rows that are complete utterances of their text; None: all.
            guide: Where the text is spoken, for a model with a reader in training.
            with_flow: Also take the flow head's loss, which is no likelihood, on the frames that are scored.
            rows: The decoder's row of each document, where several share one (`hybridlm.packing`): it changes the work,
                not the result. None: each has its own.
        """
        if text_mask is not None:
            if self.config.alignment_heads == 0 and self.reader is None:
                raise ValueError("alignment_heads=0 gives no alignment; set it to 1 or more")
            text_mask = text_mask & prefix_mask
        run = self._run(prefix, prefix_mask, frames, generator, text_mask, guide, rows)
        h = run.states
        batch, length = frames.codes.shape[0], frames.latents.shape[1]
        time = torch.arange(length + 1, device=h.device)
        valid = time[:length] < frames.lengths[:, None]  # (B, T)
        scored = valid
        if head_fraction < 1.0:
            where = generator.device if generator is not None else h.device
            kept = torch.rand(batch, length, generator=generator, device=where).to(h.device) < head_fraction
            scored = valid & kept
        chosen = scored.flatten().nonzero().squeeze(1)  # (N,): padding costs nothing in the heads
        flat = h[:, :-1].flatten(0, 1)[chosen]

        outputs = self.config.output_codebooks
        code_nll = h.new_zeros(batch * length, outputs, dtype=torch.float32)
        correct = torch.zeros(batch * length, outputs, dtype=torch.bool, device=h.device)
        latent_nll = h.new_zeros(batch * length, dtype=torch.float32)
        codes = None
        if self.code_head is not None:
            codes = frames.codes[:, :outputs].transpose(1, 2).flatten(0, 1)[chosen]  # (N, K)
            scores = self.decoder.call(self.code_head.score, flat, codes)
            code_nll = code_nll.index_copy(0, chosen, -scores.log_prob)
            correct[chosen] = scores.correct
        if self.latent_head is not None:
            latents = frames.latents.flatten(0, 1)[chosen]
            log_density = self.decoder.call(self.latent_head.log_prob, flat, codes, latents)
            latent_nll = latent_nll.index_copy(0, chosen, -log_density)
        flow = None
        if self.flow_head is not None and with_flow:
            loss = self.flow_head.loss(flat, codes, frames.latents.flatten(0, 1)[chosen], generator)
            flow = latent_nll.new_zeros(batch * length).index_copy(0, chosen, loss).view(batch, length)

        over = time == frames.lengths[:, None]  # (B, T + 1)
        stop_mask = time < frames.lengths[:, None]
        if ended is not None:
            stop_mask = stop_mask | (over & ended[:, None])
        stop_nll = F.binary_cross_entropy_with_logits(self.stop_logit(h).float(), over.float(), reduction="none")
        return FrameNLL(
            codes=code_nll.view(batch, length, outputs).transpose(1, 2),
            latents=latent_nll.view(batch, length),
            stop=stop_nll * stop_mask,
            correct=correct.view(batch, length, outputs).transpose(1, 2),
            mask=scored,
            stop_mask=stop_mask,
            alignment=None if text_mask is None else _alignment_loss(run, text_mask, frames.lengths, aligned, guide),
            flow=flow,
        )

    forward = nll

    def stop_logit(self, h: Float[Tensor, "*N C"]) -> Float[Tensor, "*N"]:
        """Logit of: no frame follows."""
        return self.stop(h).squeeze(-1)

    # One frame at a time

    def start(
        self,
        prefix: Int[Tensor, "B P"],
        prefix_mask: Bool[Tensor, "B P"],
        frames: AudioFrames | None = None,
        place: Float[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B C"], ModelCache]:
        """Read the prefix and, for a continuation, the frames to be continued (rows may differ in length).

        Args:
            prefix: See `states`.
            prefix_mask: See `states`.
            frames: What comes before the first frame that is predicted.
            place: Pieces of the text that these frames have spoken, of which alone they know; a reader goes on from
                there. None: the frames know the whole text, and the reader walks through it with them.

        Returns:
            The state that predicts the next frame of each row, and the cache for `step`.
        """
        x, prefix_mask, reading = self._read_prefix(prefix, prefix_mask)
        batch, columns = prefix_mask.shape
        key_mask = prefix_mask
        lengths = torch.zeros(batch, dtype=torch.int64, device=prefix.device)
        latents = slices = None
        if frames is not None:
            embedded, latents, slices = self._embed(
                frames.codes, frames.latents, frames.features, None, lengths=frames.lengths
            )
            x = torch.cat([x, embedded], dim=1)
            lengths = frames.lengths
            valid = torch.arange(embedded.shape[1], device=prefix.device) < lengths[:, None]
            key_mask = torch.cat([prefix_mask, valid], dim=1)
        positions = (key_mask.cumsum(dim=1) - 1).clamp(min=0)
        cache, visible = KeyValueCache.empty(), None if bool(key_mask.all()) else key_mask
        if reading is not None and frames is not None and place is not None:
            reading.guide = TextReader.spoken_guide(place, frames.lengths, frames.latents.shape[1] + 1)
        elif frames is not None and (walked := self._walk(reading, x, positions, visible)) is not None:
            reading.guide = Guide(before=walked.before)
        output = self.decoder(x, positions, key_mask=visible, cache=cache, after_layer=reading)
        rows = torch.arange(batch, device=prefix.device)
        h = output.states[rows, columns - 1 + lengths]
        recent = None
        if self.short_context is not None:
            window = self.short_context.num_frames
            recent = x.new_zeros(batch, window, self.config.latent_dim)
            if latents is not None:
                padded = F.pad(latents, (0, 0, window, 0))
                recent = padded[rows[:, None], lengths[:, None] + torch.arange(window, device=prefix.device)]
            h = h + self.short_context.step(recent)
        page = None
        if reading is not None:
            page = reading.page
            page.place = reading.arrived[rows, lengths]
            page.blank = not bool(page.mask.any())
        positions = key_mask.sum(dim=1, keepdim=True)
        return h, ModelCache(attention=cache, positions=positions, recent=recent, page=page, slices=slices)

    def step(
        self,
        codes: Int[Tensor, "B K 1"] | None,
        latents: Float[Tensor, "B 1 D"] | None,
        features: Float[Tensor, "B 1 F"] | None,
        cache: ModelCache,
    ) -> tuple[Float[Tensor, "B C"], ModelCache]:
        """Take one frame in; the streams that the model does not see may be None.

        Returns:
            The state that predicts the next frame, and the same cache, extended.
        """
        x, clean, cache.slices = self._embed(codes, latents, features, None, cache.slices)
        reading = None
        if self.reader is not None:
            assert cache.page is not None
            reading = Reading(self.reader, cache.page, 0)
        h = self.decoder(x, cache.positions, cache=cache.attention, after_layer=reading).states[:, -1]
        cache.positions = cache.positions + 1
        if reading is not None:
            reading.page.place = reading.arrived[:, -1]
        if self.short_context is not None:
            assert cache.recent is not None and clean is not None, "a short context is a context of latents"
            cache.recent = torch.cat([cache.recent[:, 1:], clean], dim=1)
            h = h + self.short_context.step(cache.recent)
        return h, cache

    def latent_distribution(self, h: Float[Tensor, "N C"], codes: Int[Tensor, "N K"] | None) -> GaussianMixture:
        """The density of the next latent, given the next codes (None for a continuous model)."""
        if self.latent_head is None:
            raise ValueError("representation=discrete predicts no latents; use continuous or hybrid")
        return self.latent_head.distribution(h, codes)

    def num_parameters(self) -> int:
        """Trainable parameters."""
        return sum(p.numel() for p in self.parameters())

    # Inside

    def _run(
        self,
        prefix: Tensor,
        prefix_mask: Tensor,
        frames: AudioFrames,
        generator: torch.Generator | None,
        text_mask: Tensor | None,
        guide: Guide | None = None,
        rows: Tensor | None = None,
    ) -> _Run:
        text, prefix_mask, reading = self._read_prefix(prefix, prefix_mask)
        columns = prefix_mask.shape[1]
        embedded, clean, _ = self._embed(frames.codes, frames.latents, frames.features, generator)
        x = torch.cat([text, embedded.to(text.dtype)], dim=1)
        # Right-padded frames need no mask: causality hides them from all that counts.
        key_mask = F.pad(prefix_mask, (0, embedded.shape[1]), value=True)
        positions = (key_mask.cumsum(dim=1) - 1).clamp(min=0)
        visible = None if bool(prefix_mask.all()) else key_mask
        walked = self._walk(reading, x, positions, visible) if guide is None and not self.training else None
        alignment = places = None
        if walked is not None and text_mask is None and not torch.is_grad_enabled():
            h, places = walked.states, walked.places
        else:
            if reading is not None:
                guide = guide if walked is None else Guide(before=walked.before)
                states = frames.latents.shape[1] + 1
                reading.guide = TextReader.even_guide(reading.page, frames.lengths, states, guide)
            packing = None if rows is None else self._packing(rows, prefix_mask, frames, x)
            text_keys = None if text_mask is None else TextKeys(mask=text_mask, packing=packing)
            output = self.decoder(x, positions, key_mask=visible, text=text_keys, after_layer=reading, packing=packing)
            h, alignment = output.states[:, columns - 1 :], output.alignment
            places = None if reading is None else reading.places
        if self.short_context is not None:
            h = h + self.short_context(clean)
        return _Run(h, alignment, places)

    def _packing(self, rows: Tensor, prefix_mask: Tensor, frames: AudioFrames, x: Tensor) -> Packing:
        """Documents of what is visible of the prefix and of real frames."""
        valid = torch.arange(frames.latents.shape[1], device=rows.device) < frames.lengths[:, None]
        kernel = self.decoder.layers[0].attention.packed_kernel(x.device.type, self.decoder.dtype(x))
        return Packing.of(rows, torch.cat([prefix_mask, valid], dim=1), kernel)

    def _walk(self, reading: Reading | None, x: Tensor, positions: Tensor, key_mask: Tensor | None) -> Walk | None:
        """The way through the text, where there is a reader and any text; without, no place makes a difference."""
        if reading is None or not bool(reading.page.mask.any()):
            return None
        return walk(self.decoder, reading, x, positions, key_mask)

    def _read_prefix(self, prefix: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Reading | None]:
        """Embeddings (B, P', C) of the decoder's prefix and its mask; the reader, if any, with the text opened.

        P' is P, or without the text as many columns as any row has tags, and `<audio>`.
        """
        embeddings = self.text_embedding(prefix)
        if self.reader is None:
            return embeddings, mask, None
        page = self.reader.open(embeddings, prefix, mask)
        if not self.config.text_in_prefix:
            tags = mask & (prefix < self.config.first_text_id)
            columns = int(tags.sum(dim=1).max())
            last = tags.to(torch.int8).argsort(dim=1, stable=True)[:, prefix.shape[1] - columns :]
            embeddings = embeddings.gather(1, last[..., None].expand(-1, -1, embeddings.shape[2]))
            mask = tags.gather(1, last)
        return embeddings, mask, Reading(self.reader, page, mask.shape[1] - 1)

    def _embed(
        self,
        codes: Tensor | None,
        latents: Tensor | None,
        features: Tensor | None,
        generator: torch.Generator | None,
        slices: TransformerState | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, TransformerState | None]:
        """Input vectors (B, T, C) of frames, the normalized clean latents (B, T, D) if they are an input, and what the
        layers over the continuous input remember."""
        config = self.config
        code_sum = continuous = clean = None
        if self.code_embedding is not None:
            assert codes is not None
            code_sum = self.code_embedding(codes[:, : config.input_codebooks].transpose(1, 2)).sum(dim=2)
        if config.continuous == "latents":
            assert latents is not None
            clean = continuous = self.statistics.latents(latents)
            if self.training and config.history_noise > 0:
                continuous = history_noise(clean, config.history_noise, generator)
        elif config.continuous == "features":
            assert features is not None
            continuous = self.statistics.features(features)
        embedded, slices = self.fusion(code_sum, continuous, slices, lengths)
        if self.training and config.history_dropout > 0:
            where = generator.device if generator is not None else embedded.device
            kept = torch.rand(embedded.shape[:2], generator=generator, device=where) >= config.history_dropout
            embedded = embedded * kept.to(embedded.device)[..., None]
        return embedded, clean, slices


def _refuse_packed(model: HybridLM, *_: object) -> None:
    if model.packed is not None:
        raise ValueError(f"a model packed at {model.packed} has no state to save; load it with load_model for that")


class _Run(NamedTuple):
    """A whole sequence's states, and how it read the text."""

    states: Float[Tensor, "B L C"]
    alignment: Float[Tensor, "B heads T P"] | None
    places: list[Float[Tensor, "B L"]] | None


def _alignment_loss(
    run: _Run, text_mask: Tensor, lengths: Tensor, aligned: Tensor | None, guide: Guide | None
) -> Float[Tensor, " B"]:
    loss = run.states.new_zeros(run.states.shape[0], dtype=torch.float32)
    if run.alignment is not None:
        loss = loss + alignment_loss(run.alignment, text_mask, lengths, aligned)
    if run.places is not None and guide is not None and guide.known is not None:
        seen = text_mask.any(dim=1)  # a row whose text is hidden has nowhere to be
        loss = loss + place_loss(run.places, guide, lengths) * seen
    return loss
