"""How recordings and a model go together: latents, the codec's floor, one batch learned, the end foreseen, an adapter.

Shapes: B batch, T frames, D latent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hybridlm.adapter import adapter_names
from hybridlm.checkpoint import Checkpoint
from tokenizer.audio import read_audio
from tokenizer.errors import UserError
from tokenizer.metrics import Undefined, mel_distance, stoi
from training.corpus import CachedClip, TokenCache
from training.examples import GOES_ON, MAX_PIECES, make_prefix
from training.finetune_report import compare, compare_output
from training.listening import Sampler
from training.manifest import Clip
from training.verdict import Verdict, judge

CODEC_CLIPS, CODEC_SECONDS = 12, 5.0
"""What is sent through the codec and back."""
LEARNED_CLIPS, LEARNED_SECONDS, LEARNING_STEPS = 4, 4.0, 15
"""The one batch that is learned."""
LEARNED_NATS = 0.3
"""By which its loss has to fall, in nats a frame."""
ADAPTER_CLIPS = 24
STOP_WINDOW_S = 0.5
"""By how much a model may be early."""


def latents_verdict(found: Checkpoint, cache: TokenCache) -> Verdict:
    """Whether the recordings' latents lie where the model's own training data lay."""
    dim, count = cache.latent_dim, 0
    total, squares = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
    for index in range(len(cache)):
        latents = cache[index].latents.double()
        count += len(latents)
        total += latents.sum(dim=0)
        squares += latents.square().sum(dim=0)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=1e-12).sqrt()
    statistics = found.model.statistics
    own_mean, own_std = statistics.latent_mean.cpu().double(), statistics.latent_std.cpu().double()
    shift = float(((mean - own_mean) / own_std).square().mean().sqrt())
    spread = float((std / own_std).log().square().mean().sqrt())
    finite = math.isfinite(shift) and math.isfinite(spread)
    return judge(
        "latents",
        f"means {shift:.2f} standard deviations from the model's, spreads a factor of {math.exp(spread):.2f} apart, "
        f"on {count} frames",
        look=shift > 0.75 or spread > math.log(1.6),
        broken=not finite,
        remedy="the recordings sound unlike what the model was trained on: expect to need more of them",
        figures={"shift": shift, "spread_factor": math.exp(spread), "frames": count},
    )


@torch.no_grad()
def codec_verdict(found: Checkpoint, clips: Sequence[Clip]) -> Verdict:
    """What the codec alone loses of the recordings: nothing that is trained on it can sound better."""
    rate, device = found.tokenizer.sample_rate_hz, next(found.model.parameters()).device
    distances: list[float] = []
    heard: list[float] = []
    missing = ""
    for clip in clips[:CODEC_CLIPS]:
        seconds = min(clip.read_duration or CODEC_SECONDS, CODEC_SECONDS)
        x = read_audio(clip.audio, rate, clip.start, seconds)
        y = found.tokenizer.decode_latents(found.tokenizer.encode(x[None].to(device)).latents)
        y = y[0, 0, : x.shape[-1]].cpu()
        distances.append(mel_distance(x[0, : len(y)], y, rate))
        if clip.text:
            try:
                heard.append(stoi(x[0, : len(y)], y, rate))
            except Undefined:
                continue
            except UserError as error:
                missing = f"; {error}"
    mel = sum(distances) / max(len(distances), 1)
    speech = sum(heard) / len(heard) if heard else None
    said = "" if speech is None else f", STOI {speech:.3f} on {len(heard)} clips of speech"
    return judge(
        "codec",
        f"mel distance {mel:.2f} nats{said}, on {len(distances)} clips{missing}",
        look=mel > 0.5 or (speech is not None and speech < 0.75),
        broken=not math.isfinite(mel),
        remedy="no language model sounds better than its codec: listen to `hybridlm reconstruct`, and choose or train "
        "another tokenizer",
        figures={"mel_distance": mel, "stoi": speech, "clips": len(distances)},
    )


def learning_verdict(found: Checkpoint, cache: TokenCache, *, steps: int = LEARNING_STEPS) -> Verdict:
    """Whether the loss on one batch falls in a few steps; the model is afterwards as it was, to the bit."""
    model = found.model
    clips = [_cut(cache[i], LEARNED_SECONDS, cache.frame_rate_hz) for i in range(min(len(cache), LEARNED_CLIPS))]
    own = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapted = bool(adapter_names(model))
    learned = [p for name, p in model.named_parameters() if not adapted or ".lora_" in name]
    saved = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    losses: list[float] = []
    try:
        model.requires_grad_(False)
        for parameter in learned:
            parameter.requires_grad_(True)
        model.train()
        optimizer = torch.optim.AdamW(learned, lr=2e-3 if adapted else 3e-4, weight_decay=0.0)
        with torch.enable_grad():
            for _ in range(steps + 1):
                loss = _loss(found, cache, clips, seed=0)
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    break
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(learned, 1.0)
                optimizer.step()
    finally:
        model.load_state_dict(saved)
        model.eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(own[name])
            parameter.grad = None
    fall = losses[0] - losses[-1]
    return judge(
        "one batch",
        f"{losses[0]:.2f} -> {losses[-1]:.2f} nats a frame in {len(losses) - 1} steps on {len(clips)} clips",
        look=not fall > LEARNED_NATS,
        broken=not math.isfinite(fall) or fall <= 0,
        remedy="a model that can't learn one batch learns nothing: check its weights, and these clips, for what is odd",
        figures={"losses": losses},
    )


@torch.no_grad()
def stop_verdict(found: Checkpoint, cache: TokenCache) -> Verdict:
    """Whether the model foresees where recordings end, being told the true past of each moment."""
    expected, ends = 0.0, 0
    at_end: list[float] = []
    elsewhere, states, early = 0.0, 0, 0
    margin = round(STOP_WINDOW_S * cache.frame_rate_hz)
    for index in range(len(cache)):
        clip = cache[index]
        length = len(clip.latents)
        if GOES_ON in clip.labels or not 2 <= length <= found.model.config.max_frames:
            continue
        stop = _nll(found, cache, [clip], None)[2][0].double()  # (T + 1,), nats of what happened
        chance = torch.cat([-torch.expm1(-stop[:length]), (-stop[length : length + 1]).exp()])
        expected += float(chance.sum())  # of a model that is right about its chances, as many as there are ends
        at_end.append(float(chance[-1]))
        elsewhere += float(chance[:-1].sum())
        states += length
        # Had it been asked at every frame, would it have stopped long before?
        early += float((-stop[: max(length - margin, 0)].sum()).exp()) < 0.5
        ends += 1
    if ends == 0:
        return judge("stop", "no clip is short enough for the model and ends by itself", remedy="")
    end, rest = sum(at_end) / ends, elsewhere / max(states, 1)
    ratio = expected / ends
    return judge(
        "stop",
        f"{expected:.1f} ends foreseen in {ends} clips that end once each; {end:.3f} at the true end, {rest:.4f} at "
        f"any other frame; {early} more likely than not stopped {STOP_WINDOW_S:g} s early",
        look=not 0.5 <= ratio <= 2.0 or end < 5 * rest or 4 * early > ends,
        broken=not math.isfinite(ratio),
        remedy="output will be cut off or run on: fine-tune on clips that end where the text ends, and trim silence "
        "(`hybridlm prepare --trim-silence 0.3`)",
        figures={"foreseen": expected, "ends": ends, "at_the_end": end, "elsewhere": rest, "early": early},
    )


def adapter_verdict(base: Checkpoint, adapted: Checkpoint, cache: TokenCache, sampler: Sampler | None) -> Verdict:
    """Whether an adapter does anything, and whether it suits these recordings."""
    change = compare(base, adapted, cache, most=ADAPTER_CLIPS)
    outputs = [] if sampler is None else compare_output(base, adapted, sampler)
    same = change.before == change.after and all(output.identical for output in outputs)
    heard = "; ".join(output.line() for output in outputs) or "no output was made"
    return judge(
        "adapter",
        f"{'it changes nothing: ' if same else ''}{change.line()}; {heard}",
        look=change.difference.low > 0,
        broken=same,
        remedy="train it anew, longer or at a higher rate"
        if same
        else "these recordings are less likely with it than without: it was made for others",
        figures={
            "difference": dataclasses.asdict(change.difference),
            "outputs": [dataclasses.asdict(output) for output in outputs],
        },
    )


def scratch_clips(clips: Sequence[Clip], count: int, seconds: float) -> list[Clip]:
    """The first clips, none longer than this; what is cut goes on, and has no text."""
    cut = []
    for clip in clips[:count]:
        length = clip.read_duration or clip.duration
        if length is not None and length <= seconds:
            cut.append(clip)
            continue
        start = clip.start or 0.0
        cut.append(
            dataclasses.replace(
                clip,
                end=min(start + seconds, clip.end or math.inf),
                text=None,
                labels={**clip.labels, GOES_ON: "yes"},
            )
        )
    return cut


def _cut(clip: CachedClip, seconds: float, rate: float) -> CachedClip:
    frames = round(seconds * rate)
    if len(clip.latents) <= frames:
        return clip
    return dataclasses.replace(clip.cut(0, frames), labels={**clip.labels, GOES_ON: "yes"})


def _loss(found: Checkpoint, cache: TokenCache, clips: Sequence[CachedClip], seed: int) -> Tensor:
    """Nats a frame, with the same noise at every call."""
    device = next(found.model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    codes, latents, stop = _nll(found, cache, clips, generator)
    return (codes.sum() + latents.sum() + stop.sum()) / sum(len(clip.latents) for clip in clips)


def _nll(
    found: Checkpoint, cache: TokenCache, clips: Sequence[CachedClip], generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    device = next(found.model.parameters()).device
    rows = [(clip.text, [tag for tag in clip.tags if tag in found.text.tags]) for clip in clips]
    prefix = make_prefix(found.text, rows, max_pieces=MAX_PIECES)
    frames = cache.frames(clips)
    nll = found.model.nll(
        prefix.ids.to(device),
        prefix.mask.to(device),
        frames.to(device),
        ended=torch.tensor([GOES_ON not in clip.labels for clip in clips], device=device),
        generator=generator,
    )
    return nll.codes, nll.latents, nll.stop
