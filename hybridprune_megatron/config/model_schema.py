"""The typed configuration of the ``model`` group: language model, vision tower, projector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from hybridprune_megatron.bounds import Count, NotNegative, OneOf, Positive, Range, Size, check_bounds
from hybridprune_megatron.checks import divides, fail
from hybridprune_megatron.layers.experts import Experts
from hybridprune_megatron.layers.kinds import KINDS

# Symbols that megatron-core knows and this project does not.
UNSUPPORTED_SYMBOLS = {
    "G": "gated delta net",
    "D": "sparse attention",
    "+": "latent attention",
    "/": "multi-token prediction",
}


def check_pattern(pattern: str, has_experts: bool = False) -> None:
    """Every symbol of the hybrid pattern is known, no pipeline stage is empty, and E layers have sizes.

    Args:
        pattern: layers with stage cuts.
        has_experts: whether model.experts is given.
    """
    meanings = {symbol: kind.label for symbol, kind in KINDS.items()} | {"|": "pipeline boundary"}
    known = ", ".join(f"{symbol} ({meaning})" for symbol, meaning in meanings.items())
    for symbol in pattern:
        if symbol in UNSUPPORTED_SYMBOLS and symbol not in KINDS:
            what = f"has {symbol!r} ({UNSUPPORTED_SYMBOLS[symbol]}), which is not supported yet"
            raise fail("model.hybrid_pattern", pattern, what, f"use only {known}")
        if symbol not in meanings:
            raise fail("model.hybrid_pattern", pattern, f"has the unknown symbol {symbol!r}", f"use only {known}")
    if not all(pattern.split("|")):
        reason = "every pipeline stage needs a layer"
        raise fail("model.hybrid_pattern", pattern, reason, "put a | only between two layers, e.g. M-M*|-M-")
    if (Experts.symbol in pattern) != has_experts:
        has = f"has {Experts.symbol} layers, and model.experts is null"
        what = has if not has_experts else f"has no {Experts.symbol} layer, and model.experts is set"
        raise fail("model.hybrid_pattern", pattern, what, "give both or neither")


#: Sides of frames and patches.
Pixels = Annotated[int, Range(1, 2**16)]


@dataclass
class VisionConfig:
    """The vision tower (a RADIO ViT) and the projector into the language model.

    Attributes:
        hidden_size: width of the tower.
        num_layers: transformer blocks of the tower.
        num_attention_heads: attention heads of the tower.
        intermediate_size: width of the tower's MLP.
        patch_size: side of a patch, pixels.
        frame_size: side that every frame is resized to (square), pixels.
        position_grid_px: largest image side that the learned position grid covers, pixels.
        num_cls_tokens: class tokens before the patches (cut off after the tower).
        num_register_tokens: register tokens before the patches (cut off after the tower).
        projector_hidden_size: width inside the projector's MLP.
        pixel_shuffle: factor on each side of the patch grid; 0.5 makes one visual token out of 2x2 patches.
        image_mean: mean per colour channel (RGB), subtracted from pixels / 255.
        image_std: standard deviation per colour channel (RGB) that divides afterwards.
    """

    hidden_size: Size
    num_layers: Size
    num_attention_heads: Size
    intermediate_size: Size
    patch_size: Pixels
    frame_size: Pixels
    position_grid_px: Pixels
    num_cls_tokens: Annotated[int, Range(0, 2**16)]
    num_register_tokens: Annotated[int, Range(0, 2**16)]
    projector_hidden_size: Size
    pixel_shuffle: float = 0.5
    # CLIP's statistics, which RADIO towers were trained with.
    image_mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    image_std: list[Positive] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])

    def __post_init__(self) -> None:
        prefix = "model.vision"
        check_bounds(prefix, self)
        divides(f"{prefix}.hidden_size", self.hidden_size, f"{prefix}.num_attention_heads", self.num_attention_heads)
        divides(f"{prefix}.frame_size", self.frame_size, f"{prefix}.patch_size", self.patch_size)
        divides(f"{prefix}.position_grid_px", self.position_grid_px, f"{prefix}.patch_size", self.patch_size)
        if self.position_grid_px < self.frame_size:
            reason = f"must not exceed {prefix}.position_grid_px={self.position_grid_px}"
            raise fail(f"{prefix}.frame_size", self.frame_size, reason, "use smaller frames")
        if self.pixel_shuffle not in (1.0, 0.5, 0.25):
            raise fail(
                f"{prefix}.pixel_shuffle", self.pixel_shuffle, "allowed are 1.0, 0.5, 0.25", "use the model's own (0.5)"
            )
        divides(
            f"{prefix}.frame_size",
            self.frame_size,
            f"{prefix}.patch_size/pixel_shuffle",
            round(self.patch_size / self.pixel_shuffle),
        )
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != 3:
                raise fail(f"{prefix}.{name}", values, "must be three numbers (RGB)", "give [r,g,b]")

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens that one frame becomes."""
        return round(self.frame_size // self.patch_size * self.pixel_shuffle) ** 2

    @property
    def projector_input_size(self) -> int:
        """Width of a visual token after the pixel shuffle."""
        return round(self.hidden_size / self.pixel_shuffle**2)


@dataclass
class ExpertsConfig:
    """The mixture of experts of E layers: a sigmoid router, routed experts and one that every token visits.

    Attributes:
        num_experts: routed experts.
        experts_per_token: routed experts that a token visits; 2 or more, their weights add up to routed_scaling.
        ffn_hidden_size: width inside a routed expert (squared ReLU).
        shared_ffn_hidden_size: width inside the expert that every token visits; 0 = none.
        latent_size: width that routed experts read and write, after one linear and before another; null = the
            residual stream's.
        routed_scaling: factor on the routed experts' sum.
        num_groups: groups of experts, of which a token visits few.
        groups_per_token: groups that a token visits, those whose two best experts score highest together.
        bias_update_rate: step of the router's correction bias towards even loads; 0 = it stays as loaded.
    """

    num_experts: Annotated[int, Range(2, 2**16)]
    experts_per_token: Annotated[int, Range(2, 2**16)]
    ffn_hidden_size: Size
    shared_ffn_hidden_size: Annotated[int, Range(0, 2**20)] = 0
    latent_size: Size | None = None
    routed_scaling: Positive = 1.0
    num_groups: Size = 1
    groups_per_token: Size = 1
    bias_update_rate: NotNegative = 0.0

    def __post_init__(self) -> None:
        prefix = "model.experts"
        check_bounds(prefix, self)
        divides(f"{prefix}.num_experts", self.num_experts, f"{prefix}.num_groups", self.num_groups)
        reachable = self.num_experts // self.num_groups * min(self.groups_per_token, self.num_groups)
        if self.experts_per_token > reachable:
            reason = f"must not exceed the {reachable} experts of the groups that a token visits"
            fix = "lower it or raise groups_per_token"
            raise fail(f"{prefix}.experts_per_token", self.experts_per_token, reason, fix)
        if self.num_groups > 1 and self.experts_per_token // self.groups_per_token != 2:
            reason = (
                f"must be half of experts_per_token={self.experts_per_token}: megatron ranks groups by as many experts "
                "as a token visits in each, the published models by two"
            )
            fix = "set num_groups=1, or groups_per_token to that"
            raise fail(f"{prefix}.groups_per_token", self.groups_per_token, reason, fix)


@dataclass
class TrainableConfig:
    """Which parts of the model are trained; the others stay frozen.

    Attributes:
        vision: train the vision tower.
        projector: train the projector.
        language: train the language model.
    """

    vision: bool = False
    projector: bool = True
    language: bool = True

    def __post_init__(self) -> None:
        check_bounds("model.trainable", self)
        if not (self.vision or self.projector or self.language):
            raise fail("model.trainable", "all false", "something must be trained", "set model.trainable.language=true")


@dataclass
class ModelConfig:
    """Shape of the model and the weights it starts from.

    Attributes:
        name: name of the model in reports.
        hybrid_pattern: one symbol a layer, M (Mamba-2), * (attention), - (MLP), E (experts); | cuts pipeline stages.
        hidden_size: width of the residual stream.
        ffn_hidden_size: width inside an MLP layer (squared ReLU).
        num_attention_heads: query heads of an attention layer.
        num_query_groups: key/value heads of an attention layer.
        kv_channels: width of one attention head.
        mamba_num_heads: heads of a Mamba layer.
        mamba_head_dim: width of one Mamba head.
        mamba_state_dim: state size per channel of a Mamba head.
        mamba_num_groups: groups of heads that share B and C.
        time_step_min: lowest step size dt of a Mamba head; 0 as in megatron and the original code, 1e-3 for weights
            that transformers trained.
        vocab_size: rows of the embedding and of the output layer.
        max_sequence_length: longest context, tokens.
        mamba_chunk_size: tokens in one chunk of the scan (speed only).
        tie_embeddings: output layer shares the embedding's weights.
        norm_epsilon: epsilon of every RMSNorm.
        init_std: standard deviation of freshly initialized weights.
        spec: layer set; te (Transformer Engine + mamba_ssm), torch, or auto (te where a GPU and its packages are).
        init_checkpoint: weights to start from; .safetensors, a Hugging Face or a checkpoint folder; null = random.
        experts: sizes of the E layers; null where the pattern has none.
        vision: the vision tower; null makes a text-only model.
        trainable: which parts are trained.
    """

    name: str
    hybrid_pattern: str
    hidden_size: Size
    ffn_hidden_size: Size
    num_attention_heads: Size
    num_query_groups: Size
    kv_channels: Size
    mamba_num_heads: Size
    mamba_head_dim: Size
    mamba_state_dim: Size
    mamba_num_groups: Size
    vocab_size: Annotated[int, Range(1, 2**24)]
    max_sequence_length: Count
    mamba_chunk_size: Size = 128
    time_step_min: NotNegative = 0.0
    tie_embeddings: bool = False
    norm_epsilon: Positive = 1e-5
    init_std: Positive = 0.02
    spec: Annotated[str, OneOf("auto", "torch", "te")] = "auto"
    init_checkpoint: str | None = None
    experts: ExpertsConfig | None = None
    vision: VisionConfig | None = None
    trainable: TrainableConfig = field(default_factory=TrainableConfig)

    def __post_init__(self) -> None:
        check_bounds("model", self)
        check_pattern(self.hybrid_pattern, self.experts is not None)
        for heads, groups in (("num_attention_heads", "num_query_groups"), ("mamba_num_heads", "mamba_num_groups")):
            divides(f"model.{heads}", getattr(self, heads), f"model.{groups}", getattr(self, groups))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ModelConfig:
        """From plain values, groups within them too.

        Raises:
            ConfigError: as the constructors.
        """
        groups = {"vision": VisionConfig, "experts": ExpertsConfig, "trainable": TrainableConfig}
        built = {name: kind(**values[name]) for name, kind in groups.items() if values.get(name)}
        return cls(**{**values, **built})

    @property
    def stages(self) -> list[str]:
        """Layer symbols of each pipeline stage."""
        return self.hybrid_pattern.split("|")

    def has_layers(self, kind: str) -> bool:
        """Whether the pattern has layers of a kind, by its name ("mamba", "attention", ...)."""
        return any(KINDS[symbol].name == kind for stage in self.stages for symbol in stage)

    @property
    def num_layers(self) -> int:
        """Layers of the language model over all stages."""
        return sum(len(stage) for stage in self.stages)
