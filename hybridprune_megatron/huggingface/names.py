"""Names of weights here and in Hugging Face folders, both ways from one table.

Ours are the names of a distributed checkpoint: those of the unsplit model, the norms beside their linears. Four
families are known: a Nemotron-H language model (``nemotron_h``), Nemotron Nano V2 VL (``nemotron_vl``), a RADIO tower
(``radio``) and this project's own export (``hybridprune``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hybridprune_megatron.method.schedule import layer_symbols


@dataclass(frozen=True)
class Heads:
    """What turns a layer's queries, keys and values into one matrix.

    Attributes:
        groups: key-value heads.
        width: of a head.
    """

    groups: int
    width: int


Convert = Callable[[Sequence[Tensor], Heads], list[Tensor]]


def _same(tensors: Sequence[Tensor], heads: Heads) -> list[Tensor]:
    return list(tensors)


def _fuse_qkv(tensors: Sequence[Tensor], heads: Heads) -> list[Tensor]:
    """Per key-value head the rows of its query heads, then its key, then its value."""
    per_group = [tensor.unflatten(0, (heads.groups, -1, heads.width)) for tensor in tensors]
    return [torch.cat(per_group, 1).flatten(0, 2)]


def _split_qkv(tensors: Sequence[Tensor], heads: Heads) -> list[Tensor]:
    per_group = tensors[0].unflatten(0, (heads.groups, -1, heads.width))
    queries = per_group.shape[1] - 2
    return [part.flatten(0, 2) for part in per_group.split([queries, 1, 1], 1)]


def _cut_in_three(tensors: Sequence[Tensor], heads: Heads) -> list[Tensor]:
    return list(tensors[0].chunk(3))


def _stack(tensors: Sequence[Tensor], heads: Heads) -> list[Tensor]:
    return [torch.cat(list(tensors))]


def _with_scale(tensors: Sequence[Tensor], heads: Heads) -> list[Tensor]:
    """A linear without a layer scale is one whose scale is 1."""
    weight, bias = tensors
    return [weight, bias, torch.ones_like(bias)]


def _fold_scale(tensors: Sequence[Tensor], heads: Heads) -> list[Tensor]:
    weight, bias, scale = tensors
    return [weight * scale.to(weight.dtype).unsqueeze(1), bias * scale.to(bias.dtype)]


@dataclass(frozen=True)
class Rule:
    """Some of our tensors and the ones of theirs that hold the same values.

    Attributes:
        ours: names, {} for the number of a layer, a second {} for that of an expert.
        theirs: names in the order in which they are converted.
        over: once for every layer of this symbol, for every "expert" of every E layer, for every "block" of the tower,
            or (empty) once.
        to_ours: their tensors to ours.
        to_theirs: ours to theirs.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    over: str = ""
    to_ours: Convert = _same
    to_theirs: Convert = _same

    def numbered(self, *numbers: int) -> Rule:
        """The rule of one layer, or of one of its experts."""
        ours, theirs = (tuple(name.format(*numbers) for name in names) for names in (self.ours, self.theirs))
        return Rule(ours, theirs, "", self.to_ours, self.to_theirs)

    def below(self, ours: str, theirs: str) -> Rule:
        """The rule with a prefix on both sides."""
        return Rule(
            tuple(ours + name for name in self.ours),
            tuple(theirs + name for name in self.theirs),
            self.over,
            self.to_ours,
            self.to_theirs,
        )


def _renamed(names: dict[str, str], over: str, ours: str, theirs: str) -> list[Rule]:
    return [Rule((ours + own,), (theirs + other,), over) for own, other in names.items()]


_OUTPUT_LAYER = "output_layer.weight"
_LANGUAGE = [
    *_renamed(
        {
            "embedding.word_embeddings.weight": "backbone.embeddings.weight",
            "decoder.final_norm.weight": "backbone.norm_f.weight",
            _OUTPUT_LAYER: "lm_head.weight",
        },
        over="",
        ours="",
        theirs="",
    ),
    *_renamed(
        {
            "in_proj.layer_norm_weight": "norm.weight",
            "in_proj.weight": "mixer.in_proj.weight",
            "conv1d.weight": "mixer.conv1d.weight",
            "conv1d.bias": "mixer.conv1d.bias",
            "A_log": "mixer.A_log",
            "D": "mixer.D",
            "dt_bias": "mixer.dt_bias",
            "norm.weight": "mixer.norm.weight",
            "out_proj.weight": "mixer.out_proj.weight",
        },
        over="M",
        ours="decoder.layers.{}.mixer.",
        theirs="backbone.layers.{}.",
    ),
    *_renamed(
        {"linear_qkv.layer_norm_weight": "norm.weight", "linear_proj.weight": "mixer.o_proj.weight"},
        over="*",
        ours="decoder.layers.{}.self_attention.",
        theirs="backbone.layers.{}.",
    ),
    Rule(
        ("decoder.layers.{}.self_attention.linear_qkv.weight",),
        tuple(f"backbone.layers.{{}}.mixer.{part}_proj.weight" for part in "qkv"),
        "*",
        _fuse_qkv,
        _split_qkv,
    ),
    *_renamed(
        {
            "linear_fc1.layer_norm_weight": "norm.weight",
            "linear_fc1.weight": "mixer.up_proj.weight",
            "linear_fc2.weight": "mixer.down_proj.weight",
        },
        over="-",
        ours="decoder.layers.{}.mlp.",
        theirs="backbone.layers.{}.",
    ),
    *_renamed(
        {
            "pre_mlp_layernorm.weight": "norm.weight",
            "mlp.router.weight": "mixer.gate.weight",
            "mlp.router.expert_bias": "mixer.gate.e_score_correction_bias",
            "mlp.shared_experts.linear_fc1.weight": "mixer.shared_experts.up_proj.weight",
            "mlp.shared_experts.linear_fc2.weight": "mixer.shared_experts.down_proj.weight",
            "mlp.fc1_latent_proj.weight": "mixer.fc1_latent_proj.weight",
            "mlp.fc2_latent_proj.weight": "mixer.fc2_latent_proj.weight",
        },
        over="E",
        ours="decoder.layers.{}.",
        theirs="backbone.layers.{}.",
    ),
    *_renamed(
        {"linear_fc1.weight": "up_proj.weight", "linear_fc2.weight": "down_proj.weight"},
        over="expert",
        ours="decoder.layers.{}.mlp.experts.experts.{}.",
        theirs="backbone.layers.{}.mixer.experts.{}.",
    ),
]
_PROJECTOR = [Rule((f"mlp1.{part}.weight",), (f"mlp1.{part}.weight",)) for part in (0, 1, 3)]

_EMBEDDINGS = {
    "embeddings.patch_projection.weight": "patch_generator.embedder.weight",
    "embeddings.position_embedding": "patch_generator.pos_embed",
    "embeddings.cls_register_token": "patch_generator.cls_token.token",
}
_BLOCK_SAME = [f"{part}.{kind}" for part in ("norm1", "norm2", "mlp.fc1") for kind in ("weight", "bias")]
# Where the tower ends in a linear with a layer scale after it.
_SCALED = {"attention.o_proj": ("attn.proj", "layer_scale1"), "mlp.fc2": ("mlp.fc2", "layer_scale2")}
#: timm's block, as files have it: one matrix for queries, keys and values.
_TIMM_TOWER = [
    *_renamed(_EMBEDDINGS, over="", ours="", theirs=""),
    *(Rule((f"encoder.layer.{{}}.{name}",), (f"blocks.{{}}.{name}",), "block") for name in _BLOCK_SAME),
    *(
        Rule(
            tuple(f"encoder.layer.{{}}.attention.{part}_proj.{kind}" for part in "qkv"),
            (f"blocks.{{}}.attn.qkv.{kind}",),
            "block",
            _cut_in_three,
            _stack,
        )
        for kind in ("weight", "bias")
    ),
]


def _ends_of_block(layer_scale: bool) -> list[Rule]:
    """The linears before the residuals, whose scales the published video model's files lack."""
    rules = []
    for own, (other, scale) in _SCALED.items():
        ours = [f"encoder.layer.{{}}.{own}.weight", f"encoder.layer.{{}}.{own}.bias"]
        theirs = [f"blocks.{{}}.{other}.weight", f"blocks.{{}}.{other}.bias"]
        ours.append(f"encoder.layer.{{}}.{scale}.lambda1")
        if layer_scale:
            theirs.append(f"blocks.{{}}.{scale}.lambda1")
            rules.append(Rule(tuple(ours), tuple(theirs), "block"))
        else:
            rules.append(Rule(tuple(ours), tuple(theirs), "block", _with_scale, _fold_scale))
    return rules


#: Our own names are those of transformers' model in memory.
_BLOCK_NAMES = [
    *_BLOCK_SAME,
    *(f"attention.{part}_proj.{kind}" for part in "qkvo" for kind in ("weight", "bias")),
    *(f"mlp.fc2.{kind}" for kind in ("weight", "bias")),
    *(f"{scale}.lambda1" for _, scale in _SCALED.values()),
]
_OWN_TOWER = [
    *(Rule((name,), (name,)) for name in _EMBEDDINGS),
    *(Rule((f"encoder.layer.{{}}.{name}",), (f"encoder.layer.{{}}.{name}",), "block") for name in _BLOCK_NAMES),
]
#: Constants of the tower, which the configuration holds: never read, and left to their builder.
CONSTANTS = ("summary_idxs", "input_conditioner.norm_mean", "input_conditioner.norm_std")
#: Before the names of a tower's tensors, by family.
TOWER_PREFIX = {
    "radio": "radio_model.model.",
    "nemotron_vl": "vision_model.radio_model.model.",
    "hybridprune": "vision_model.",
}
_CONSTANT_RULES = [Rule((name,), (name,)) for name in CONSTANTS]
# Weights of theirs that no model here has: constants, what reads other things than frames and text, and the layers that
# predict several tokens at once, which transformers leaves out too.
_LEFT_ALONE = re.compile(
    r"(vision_model\.)?(radio_model\.)?(summary_idxs|input_conditioner\.norm_(mean|std))"
    r"|(language_model\.)?mtp\..*"
    r"|vision_model\.radio_model\.model\.patch_generator\.video_embedder\.weight"
)


@dataclass(frozen=True)
class ExpertParts:
    """What an E layer is made of.

    Attributes:
        count: routed experts.
        shared: there is one that every token visits.
        latent: routed experts read a narrower stream.
    """

    count: int
    shared: bool
    latent: bool

    @staticmethod
    def of(experts: Mapping[str, Any]) -> ExpertParts:
        """From the fields of ``model.experts``."""
        return ExpertParts(
            experts["num_experts"], bool(experts["shared_ffn_hidden_size"]), experts["latent_size"] is not None
        )

    def has(self, rule: Rule) -> bool:
        """Whether a rule of an E layer applies."""
        name = rule.ours[0]
        return (self.shared or "shared_experts" not in name) and (self.latent or "latent_proj" not in name)


@dataclass(frozen=True)
class WeightNames:
    """The table of one model.

    Attributes:
        family: one of the four above.
        pattern: hybrid layer pattern of the language model; empty for a tower alone.
        heads: of its attention layers.
        tied: the output layer is the embedding and has no weights of its own.
        blocks: of the vision tower; 0: none.
        experts: of the E layers; None: there are none.
        layer_scale: the files hold the scales of the tower's residuals; else these are 1.
    """

    family: str
    pattern: str
    heads: Heads
    tied: bool = False
    blocks: int = 0
    experts: ExpertParts | None = None
    layer_scale: bool = False

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """One rule for each group of tensors, in order of depth."""
        vision, language, projector = [], [], []
        if self.blocks:
            timm, prefix = [*_TIMM_TOWER, *_ends_of_block(self.layer_scale)], TOWER_PREFIX[self.family]
            tower = [*_OWN_TOWER, *_CONSTANT_RULES] if self.family == "hybridprune" else timm
            vision = [rule.below("vision_model.", prefix) for rule in tower]
        if self.pattern:
            prefix = "" if self.family == "nemotron_h" else "language_model."
            rules = [rule for rule in _LANGUAGE if self._has(rule)]
            language = [rule.below("language_model.", prefix) for rule in rules]
        if self.blocks and self.pattern:
            projector = _PROJECTOR
        blocks = [((number,), "block") for number in range(self.blocks)]
        return tuple(
            rule.numbered(*numbers) if rule.over else rule
            for numbers, over in (*blocks, *self._parts_of_layers(), ((), ""))
            for rule in (*vision, *projector, *language)
            if rule.over == over
        )

    def _has(self, rule: Rule) -> bool:
        """Whether this model has the weights of a rule of the language model."""
        if rule.ours == (_OUTPUT_LAYER,):
            return not self.tied
        return rule.over != "E" or (self.experts is not None and self.experts.has(rule))

    def _parts_of_layers(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """Numbers and kind of every layer, and of every expert after its layer."""
        for number, symbol in enumerate(layer_symbols(self.pattern)):
            yield (number,), symbol
            if symbol == "E" and self.experts is not None:
                yield from (((number, expert), "expert") for expert in range(self.experts.count))

    @cached_property
    def by_ours(self) -> dict[str, Rule]:
        """The rule that gives one of our tensors."""
        return {name: rule for rule in self.rules for name in rule.ours}

    @cached_property
    def by_theirs(self) -> dict[str, Rule]:
        """The rule that gives one of their tensors."""
        return {name: rule for rule in self.rules for name in rule.theirs}

    def to_theirs(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All weights of ours under their names.

        Raises:
            ValueError: listing names that are unknown or missing.
        """
        self.check_ours(ours, "the training model")
        return {
            name: value
            for rule in self.rules
            for name, value in zip(rule.theirs, rule.to_theirs([ours[own] for own in rule.ours], self.heads))
        }

    def left_alone(self, theirs: Iterable[str]) -> set[str]:
        """Names of theirs that no model here has, and that an export copies from the original."""
        return {name for name in theirs if name not in self.by_theirs and _LEFT_ALONE.fullmatch(name)}

    def check_theirs(self, names: Iterable[str], where: str) -> None:
        """Every name is in the table, and the table's every name is there.

        Raises:
            ValueError: listing those that are not.
        """
        names = set(names)
        _check(names - self.left_alone(names), set(self.by_theirs), where)

    def check_ours(self, names: Iterable[str], where: str) -> None:
        """The same for names of ours."""
        constants = {f"vision_model.{name}" for name in CONSTANTS} if self.blocks else set()
        _check(set(names) - (constants - set(self.by_ours)), set(self.by_ours), where)


def _check(found: set[str], expected: set[str], where: str) -> None:
    unknown, missing = sorted(found - expected), sorted(expected - found)
    if unknown or missing:
        raise ValueError(
            f"weights of {where} do not fit its configuration: unknown {_listed(unknown)}, missing {_listed(missing)}; "
            "nothing was converted"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown or "none"
