"""The one settings record of the language model; every other module of this package reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenizer.transformer import check_heads

Representation = Literal["discrete", "continuous", "hybrid"]
ContinuousInput = Literal["latents", "features", "none"]
Fusion = Literal["sum", "concat"]
AttentionBias = Literal["none", "qkv", "qkvo"]

POSITIVE = (
    *("vocab_size", "num_codebooks", "codebook_size", "latent_dim", "frame_rate_hz", "hidden_dim", "num_layers"),
    *("num_heads", "num_kv_heads", "ffn_dim", "rope_theta", "code_embedding_dim", "depth_dim", "depth_ffn_dim"),
    *("num_mixtures", "latent_head_dim", "latent_head_ffn_dim", "scale_floor", "short_context_dim", "max_frames"),
    *("reader_heads", "reader_head_dim", "reader_pace", "slice_dim", "slice_heads", "slice_ffn_dim"),
    *("slice_window_frames", "flow_dim", "flow_draws"),
)
NOT_NEGATIVE = (
    *("feature_dim", "depth_layers", "latent_head_layers", "sigma", "short_context_frames", "alignment_heads"),
    *("alignment_layer", "first_text_id", "slice_layers", "flow_layers", "flow_distill"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3RopeScaling:
    """Rotary frequencies stretched to a longer context, as Llama 3.1 has them: slow ones by `factor`, fast ones not."""

    factor: float
    low_freq_factor: float
    """Waves that fit less often than this into the original context are slow."""
    high_freq_factor: float
    """Waves that fit more often than this are fast; in between lies a ramp."""
    original_max_position_embeddings: int
    """The original context, in positions."""

    def __post_init__(self) -> None:
        if not (self.factor > 0 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(
                f"rope_scaling: factor={self.factor} must be positive, and low_freq_factor={self.low_freq_factor} "
                f"below high_freq_factor={self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes and switches of a `HybridLM`.

    The first group describes the frames and must agree with the tokenizer; `None` means "derived", and the derived
    value is found under the property that the field's docstring names.
    """

    vocab_size: int
    """Text pieces and tags together."""
    num_codebooks: int = 8
    """Codebooks of a frame, as the tokenizer makes them."""
    codebook_size: int = 1024
    latent_dim: int = 64
    feature_dim: int = 0
    """Width of the tokenizer's features; 0 when it has none."""
    frame_rate_hz: float = 25.0

    representation: Representation = "hybrid"
    """What is predicted, and which history is seen: codes, latents or both."""
    continuous_input: ContinuousInput | None = None
    """The continuous part of the history. None: latents if latents are predicted, otherwise nothing (`continuous`)."""
    fusion: Fusion = "sum"
    """How codes and the continuous part become one input (WHISPER-GPT concatenates)."""
    slice_layers: int = 0
    """Light causal transformer layers that the continuous part passes before it is fused: WHISPER-GPT's blocks over
    mel slices, in place of Whisper's encoder. 0: one linear map."""
    slice_dim: int = 128
    """Width of these layers."""
    slice_heads: int = 4
    slice_ffn_dim: int = 192
    slice_window_frames: int = 64
    """Slices that a slice sees in each of these layers, itself among them."""
    num_input_codebooks: int | None = None
    """Codebooks that the history shows. None: all (`input_codebooks`)."""
    num_output_codebooks: int | None = None
    """Codebooks that are predicted. None: all (`output_codebooks`)."""

    hidden_dim: int = 384
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int = 2
    ffn_dim: int = 1024
    attention_head_dim: int | None = None
    """Width of one attention head. None: hidden_dim / num_heads (`head_dim`)."""
    attention_bias: AttentionBias = "none"
    """Which of attention's matrices have biases: none, those of queries, keys and values (Qwen2), or all four."""
    qk_norm: bool = False
    """RMSNorm over each head's queries and keys, before they are turned (Qwen3)."""
    rope_theta: float = 10000.0
    rope_scaling: Llama3RopeScaling | None = None
    norm_epsilon: float = 1e-5
    dropout: float = 0.0
    """On the two residual branches of every layer, in training."""

    code_embedding_dim: int = 128
    """Width of the one table of code embeddings that the input and both heads share."""
    depth_dim: int = 256
    depth_layers: int = 2
    depth_ffn_dim: int = 512

    num_mixtures: int = 8
    latent_head_dim: int = 256
    latent_head_layers: int = 2
    latent_head_ffn_dim: int = 512
    scale_floor: float = 0.02
    """Smallest standard deviation of a mixture component, in the latent's own unit; published with every likelihood."""
    flow_layers: int = 0
    """Layers of the second latent head, a flow, which draws but knows no likelihood (`hybridlm.flow_head`). 0: none."""
    flow_dim: int = 256
    flow_draws: int = 4
    """Draws of noise and time a frame, in training."""
    flow_distill: float = 0.0
    """Weight of self-distillation beside flow matching, in training; above 0, one step goes from noise to latent."""
    sigma: float = 0.1
    """Standard deviation of the noise on scored latents; published with every likelihood."""

    history_noise: float = 0.5
    """Largest share k of noise in the training history, sqrt(k) * eps + sqrt(1 - k) * x (CALM); 0 turns it off."""
    short_context_frames: int = 10
    """Latest latents that reach the heads by a clean, short path; 0 removes the path."""
    short_context_dim: int = 256
    history_dropout: float = 0.0
    """Share of the frames that are hidden from the training history; the short path still shows them."""
    condition_dropout: float = 0.1
    """Share of training rows whose text and tags are hidden, for classifier-free guidance."""

    alignment_layer: int = 2
    """Layer whose attention to the text the guided attention loss shapes."""
    alignment_heads: int = 1
    """How many of that layer's heads, counted from the first."""

    reader_layer: int | None = None
    """Layer after which a monotonic reader finds its place in the text, and from which on it reads there
    (`hybridlm.reader`). None: text is read by the decoder's own attention alone."""
    reader_heads: int = 8
    reader_head_dim: int = 32
    reader_pace: float = 0.5
    """Pieces of text a frame that an untrained reader moves on by; below 4."""
    text_in_prefix: bool = True
    """False: only the reader gets the text; the decoder's prefix is tags and `<audio>`, which saves a third of the
    work where the pieces are single characters."""
    first_text_id: int = 0
    """Ids from here on are pieces of text; below are padding, `<audio>` and tags."""

    max_frames: int = 1500
    """Longest sequence of frames that the model is meant for (60 s at 25 Hz)."""

    def __post_init__(self) -> None:
        for name in POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in NOT_NEGATIVE:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("dropout", "history_noise", "history_dropout", "condition_dropout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        self._check_heads()
        self._check_streams()

    def _check_heads(self) -> None:
        if self.attention_head_dim is None and self.hidden_dim % self.num_heads:
            divisors = [n for n in range(1, self.num_heads * 2 + 1) if self.hidden_dim % (2 * n) == 0]
            near = sorted(divisors, key=lambda n: abs(n - self.num_heads))[:2]
            remedy = f"; use {' or '.join(map(str, sorted(near)))}" if near else ""
            raise ValueError(f"num_heads={self.num_heads} must divide hidden_dim={self.hidden_dim}{remedy}")
        if self.head_dim < 2 or self.head_dim % 2:
            given = f"hidden_dim / num_heads = {self.hidden_dim} / {self.num_heads}"
            given = given if self.attention_head_dim is None else "attention_head_dim"
            raise ValueError(
                f"{given} = {self.head_dim} must be even (rotary positions turn pairs); change "
                f"{'num_heads' if self.attention_head_dim is None else 'it'}"
            )
        if self.num_heads % self.num_kv_heads:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; "
                f"use one of {', '.join(map(str, divisors))}"
            )
        if self.alignment_heads and not 0 <= self.alignment_layer < self.num_layers:
            raise ValueError(
                f"alignment_layer={self.alignment_layer} must be below num_layers={self.num_layers}; "
                "or set alignment_heads=0"
            )
        if self.alignment_heads > self.num_heads:
            raise ValueError(f"alignment_heads={self.alignment_heads} must not exceed num_heads={self.num_heads}")
        if self.reader_layer is not None and not 0 <= self.reader_layer < self.num_layers - 1:
            raise ValueError(
                f"reader_layer={self.reader_layer} must be below num_layers - 1 = {self.num_layers - 1} (the first "
                "reading layer looks, the others move); or leave it out"
            )
        if not 0 < self.reader_pace < 4:
            raise ValueError(f"reader_pace={self.reader_pace} must lie between 0 and 4 pieces a frame")
        if not self.text_in_prefix and (self.reader_layer is None or self.alignment_heads):
            raise ValueError("text_in_prefix=false needs a reader (set reader_layer) and alignment_heads=0")

    def _check_streams(self) -> None:
        for name in ("num_input_codebooks", "num_output_codebooks"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= self.num_codebooks:
                raise ValueError(f"{name}={value} must lie in 1..num_codebooks={self.num_codebooks}")
        if self.slice_layers:
            check_heads(self.slice_dim, self.slice_heads, "slice_dim", "slice_heads")
            if self.continuous == "none":
                raise ValueError(f"slice_layers={self.slice_layers} needs a continuous input; set continuous_input")
        if self.flow_layers and not self.predicts_latents:
            raise ValueError(
                f"flow_layers={self.flow_layers}: representation={self.representation} predicts no latents for a flow; "
                "use hybrid or continuous"
            )
        if self.continuous == "features" and not self.feature_dim:
            raise ValueError("continuous_input=features needs feature_dim > 0; choose a tokenizer with features")
        if self.representation == "continuous" and self.continuous == "none":
            raise ValueError("representation=continuous with continuous_input=none sees no history; use latents")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.attention_head_dim or self.hidden_dim // self.num_heads

    @property
    def continuous(self) -> ContinuousInput:
        """The continuous part of the history, with the default resolved."""
        if self.continuous_input is not None:
            return self.continuous_input
        return "none" if self.representation == "discrete" else "latents"

    @property
    def uses_codes(self) -> bool:
        """Whether codes are predicted and part of the history."""
        return self.representation != "continuous"

    @property
    def predicts_latents(self) -> bool:
        """Whether latents are predicted."""
        return self.representation != "discrete"

    @property
    def input_codebooks(self) -> int:
        """Codebooks that the history shows; 0 for a continuous model."""
        return (self.num_input_codebooks or self.num_codebooks) if self.uses_codes else 0

    @property
    def output_codebooks(self) -> int:
        """Codebooks that are predicted; 0 for a continuous model."""
        return (self.num_output_codebooks or self.num_codebooks) if self.uses_codes else 0

    @property
    def has_short_context(self) -> bool:
        """Whether the clean short path exists: only where latents are the continuous input."""
        return self.continuous == "latents" and self.short_context_frames > 0
