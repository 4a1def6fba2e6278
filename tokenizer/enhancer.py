"""Speech enhancement as DashengTokenizer (arXiv 2602.23765) does it: in the tokenizer's own space, then decoded.

    z = embeddings of the noisy recording               frozen tokenizer
    y = z + s * W transformer((z - m) / s)              m, s: mean and deviation of clean speech, channel by channel
    y = normalize(y)                                    where the tokenizer's latents are normalized
    x = what the tokenizer's frozen decoder makes of y

The embeddings are those that a decoder reads (`EmbeddingSpace`). For DashengTokenizer, as in the paper, these are the
features, the sum of semantics and acoustics: its latents are a compact projection of them for language models, which
costs some of the sound. Every other tokenizer decodes latents. The network's shape is this project's: the paper says no
more than that it is small.

The network sees present and past frames alone, so it adds no look-ahead to the tokenizer's, and a stream of any pieces
equals the whole recording. An untrained one changes nothing, since W starts at zero.

Shapes: B batch, T frames, D embedding, S samples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenizer.bottleneck import normalize_channels
from tokenizer.dasheng import DashengTokenizer
from tokenizer.errors import UserError
from tokenizer.f3 import F3Tokenizer
from tokenizer.frames import AudioFrames, StreamingDecoder, Tokenizer
from tokenizer.loading import (
    CONFIG_FILE,
    ENHANCER,
    FORMAT_VERSION,
    WEIGHTS_FILE,
    load_tokenizer,
    read_json,
    read_weights,
    resolve_device,
    write_folder,
)
from tokenizer.settings import from_mapping
from tokenizer.transformer import CausalTransformer, TransformerState, check_heads

View = Literal["latents", "features"]
LAYOUT = f"{CONFIG_FILE}, {WEIGHTS_FILE} and tokenizer/"


@dataclass(frozen=True, kw_only=True, slots=True)
class EnhancerConfig:
    """Shape of the network."""

    hidden_dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    ffn_dim: int = 704
    window_frames: int = 50
    """Frames that a frame sees, itself among them, in each layer: 2 s at 25 Hz."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        check_heads(self.hidden_dim, self.num_heads, "hidden_dim")


class EmbeddingSpace:
    """The embeddings of a tokenizer that its decoder reads.

    Args:
        tokenizer: Any; its weights are used as they are.
        view: `latents`, `features`, or None for the richest that the tokenizer decodes.

    Raises:
        UserError: a view that the tokenizer doesn't decode.
    """

    def __init__(self, tokenizer: Tokenizer, view: View | None = None) -> None:
        decodes_features = isinstance(tokenizer, DashengTokenizer)
        self.view: View = view or ("features" if decodes_features else "latents")
        if self.view == "features" and not decodes_features:
            raise UserError(f"view='features': {tokenizer.name} decodes no features; use latents, or leave view out")
        self.tokenizer = tokenizer
        self.dim = tokenizer.feature_dim if self.view == "features" else tokenizer.latent_dim

    def of(self, frames: AudioFrames) -> Float[Tensor, "B T D"]:
        """The embeddings among the frames."""
        if self.view == "latents":
            return frames.latents
        assert frames.features is not None
        return frames.features

    def encode(self, waveform: Float[Tensor, "B 1 S"]) -> Float[Tensor, "B T D"]:
        """Embeddings of recordings, without gradient."""
        # Cloned, since a tensor of inference mode could not take part in training.
        return self.of(self.tokenizer.encode(waveform)).clone()

    def decode(self, embeddings: Float[Tensor, "B T D"]) -> Float[Tensor, "B 1 S"]:
        """Audio of embeddings, in [-1, 1], without gradient."""
        if isinstance(self.tokenizer, DashengTokenizer) and self.view == "features":
            return self.tokenizer.decode_features(embeddings)
        return self.tokenizer.decode_latents(embeddings)

    def synthesize(self, embeddings: Float[Tensor, "B T D"]) -> Float[Tensor, "B 1 S"]:
        """Audio of embeddings, unclipped, through which gradients pass.

        Raises:
            UserError: a tokenizer that has no such decoder.
        """
        if isinstance(self.tokenizer, F3Tokenizer):
            return self.tokenizer.decoder(embeddings)[0].unsqueeze(1)
        if isinstance(self.tokenizer, DashengTokenizer):
            features = embeddings if self.view == "features" else self.tokenizer.expand(embeddings)
            return self.tokenizer.synthesize(features)[0].unsqueeze(1)
        raise UserError(f"the decoder of {self.tokenizer.name} passes no gradients on; use f3 or dasheng for this")

    def streaming_decoder(self, batch_size: int) -> StreamingDecoder:
        """A decoder whose embeddings arrive in pieces."""
        if isinstance(self.tokenizer, DashengTokenizer):
            return self.tokenizer.streaming_decoder(batch_size, self.view)
        return self.tokenizer.streaming_decoder(batch_size)


class Enhancer(nn.Module):
    """Embeddings of noisy speech to embeddings of clean speech, frame by frame, from the present and the past.

    Args:
        dim: Channels D of an embedding.
        config: Shape of the network.
        normalized: Whether each frame of the tokenizer's is normalized over its channels, as the output then is too.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, config: EnhancerConfig, *, normalized: bool) -> None:
        super().__init__()
        self.dim, self.config, self.normalized = dim, config, normalized
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.embed = nn.Linear(dim, config.hidden_dim)
        self.transformer = CausalTransformer(
            config.hidden_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            ffn_dim=config.ffn_dim,
            window=config.window_frames,
        )
        self.head = nn.Linear(config.hidden_dim, dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @torch.no_grad()
    def measure(self, clean: Float[Tensor, "B T D"]) -> None:
        """Take the channels' means and deviations from embeddings of clean speech."""
        flat = clean.float().flatten(0, 1)
        std = flat.std(dim=0, unbiased=False)
        self.mean.copy_(flat.mean(dim=0))
        self.std.copy_(std.clamp(min=max(0.01 * float(std.mean()), 1e-5)))  # a channel that hardly moves stays harmless

    def forward(
        self, embeddings: Float[Tensor, "B T D"], state: TransformerState | None = None
    ) -> tuple[Float[Tensor, "B T D"], TransformerState]:
        """Enhanced embeddings of the frames after `state`, and the state after them."""
        x, state = self.transformer(self.embed((embeddings - self.mean) / self.std), state)
        enhanced = embeddings.float() + self.std * self.head(x).float()
        return normalize_channels(enhanced) if self.normalized else enhanced, state

    @torch.inference_mode()
    def whole(self, embeddings: Float[Tensor, "B T D"], block: int = 1500) -> Float[Tensor, "B T D"]:
        """Of whole recordings, block by block, so that memory does not grow with their square."""
        state, parts = None, [embeddings[:, :0].float()]
        for start in range(0, embeddings.shape[1], block):
            part, state = self(embeddings[:, start : start + block], state)
            parts.append(part)
        return torch.cat(parts, dim=1)


class SpeechEnhancer:
    """A tokenizer and the network that enhances in its space: waveforms in, waveforms out."""

    def __init__(self, space: EmbeddingSpace, network: Enhancer) -> None:
        assert network.dim == space.dim
        self.space, self.network = space, network
        self.tokenizer, self.sample_rate_hz = space.tokenizer, space.tokenizer.sample_rate_hz

    @torch.inference_mode()
    def enhance(self, waveform: Float[Tensor, "B 1 S"]) -> Float[Tensor, "B 1 S"]:
        """Recordings of one length at the tokenizer's rate, enhanced; as many samples."""
        enhanced = self.space.decode(self.network.whole(self.space.encode(waveform)))
        return enhanced[..., : waveform.shape[-1]]

    @torch.inference_mode()
    def decoded(self, waveform: Float[Tensor, "B 1 S"]) -> Float[Tensor, "B 1 S"]:
        """Recordings through the tokenizer and back, as they are; as many samples."""
        return self.space.decode(self.space.encode(waveform))[..., : waveform.shape[-1]]

    def stream(self, batch_size: int = 1, *, decoded: bool = False) -> EnhancerStream:
        """For `batch_size` recordings that arrive in pieces; `decoded` also asks for them as they are."""
        return EnhancerStream(self, batch_size, decoded)

    def save(self, folder: Path) -> None:
        """Write `config.json`, `model.safetensors` and a copy of the tokenizer.

        Raises:
            UserError: the folder can't be written.
        """
        folder = Path(folder)
        self.tokenizer.save(folder / "tokenizer")
        config = {
            "type": ENHANCER,
            "view": self.space.view,
            "normalized": self.network.normalized,
            "network": asdict(self.network.config),
            "tokenizer": {"name": self.tokenizer.name, "fingerprint": self.tokenizer.fingerprint()},
        }
        write_folder(folder, config, self.network.state_dict())


class Sounds(NamedTuple):
    """What a recording became."""

    enhanced: Float[Tensor, "B 1 S"]
    decoded: Float[Tensor, "B 1 S"] | None
    """The recording as it is, through the tokenizer and back; None where it was not asked for."""


class EnhancerStream:
    """Takes audio in pieces of any size; its outputs, joined and cut to the input's length, equal `enhance` and
    `decoded`."""

    def __init__(self, enhancer: SpeechEnhancer, batch_size: int, decoded: bool) -> None:
        self.enhancer = enhancer
        self._plain = enhancer.space.streaming_decoder(batch_size) if decoded else None
        self._encoder = enhancer.tokenizer.streaming_encoder(batch_size)
        self._decoder = enhancer.space.streaming_decoder(batch_size)
        self._state: TransformerState | None = None

    def push(self, waveform: Float[Tensor, "B 1 S"]) -> Sounds:
        """The samples that became final."""
        return self._decode(self._encoder.push(waveform))

    def flush(self) -> Sounds:
        """What remains, up to the end of the last frame."""
        enhanced, decoded = self._decode(self._encoder.flush())
        if self._plain is not None and decoded is not None:
            decoded = torch.cat([decoded, self._plain.flush()], dim=-1)
        return Sounds(torch.cat([enhanced, self._decoder.flush()], dim=-1), decoded)

    @torch.inference_mode()
    def _decode(self, frames: AudioFrames) -> Sounds:
        embeddings = self.enhancer.space.of(frames)
        decoded = None if self._plain is None else self._plain.push(embeddings)
        if embeddings.shape[1]:
            embeddings, self._state = self.enhancer.network(embeddings, self._state)
        return Sounds(self._decoder.push(embeddings), decoded)


def load_enhancer(folder: str | Path, device: str | torch.device | None = "cpu") -> SpeechEnhancer:
    """Read what `SpeechEnhancer.save` wrote.

    Args:
        folder: Such as the `model` folder of a run of configs/enhancement-small.yaml.
        device: Where weights go; None for CUDA where there is one.

    Raises:
        UserError: no such folder, not an enhancer's, another format version, missing or damaged weights, or another
            tokenizer than the one it was trained with.
    """
    device, folder = resolve_device(device), Path(folder)
    config = _read_enhancer_config(folder)
    tokenizer = load_tokenizer(folder / "tokenizer", device=device)
    expected, found = config["tokenizer"]["fingerprint"], tokenizer.fingerprint()
    if found != expected:
        raise UserError(
            f"{folder / 'tokenizer'} has fingerprint {found}, but the enhancer was trained with {expected}; "
            "copy the tokenizer that came with it"
        )
    space = EmbeddingSpace(tokenizer, config["view"])
    shape = from_mapping(EnhancerConfig, config["network"], where=f"{folder / CONFIG_FILE}: network")
    network = Enhancer(space.dim, shape, normalized=config["normalized"])
    try:
        network.load_state_dict(read_weights(folder / WEIGHTS_FILE))
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{folder}: {WEIGHTS_FILE} does not fit {CONFIG_FILE}: {reason}") from error
    return SpeechEnhancer(space, network.eval().to(device))


def _read_enhancer_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"no such enhancer folder: {str(folder)!r}; give a folder with {LAYOUT}")
    path = folder / CONFIG_FILE
    config = read_json(path) if path.is_file() else {}
    if config.get("type") != ENHANCER:
        raise UserError(
            f"{str(folder)!r} is not an enhancer's folder; give one with {LAYOUT}, "
            "as training with configs/enhancement-small.yaml makes it"
        )
    if config.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version={config.get('format_version')!r}, but this version reads {FORMAT_VERSION}; "
            "use the hybridlm that wrote it, or train the enhancer again"
        )
    known = config.get("tokenizer")
    if (
        config.get("view") not in ("latents", "features")
        or not isinstance(config.get("normalized"), bool)
        or not isinstance(known, dict)
        or not isinstance(known.get("fingerprint"), str)
        or not isinstance(config.get("network"), dict)
    ):
        raise UserError(f"{path} lacks a valid view, normalized, network or tokenizer; it is damaged, copy it again")
    return config
