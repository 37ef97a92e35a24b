"""Configuration of an exported model: the language model's shape, the vision tower's, and the reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import transformers

from hybridprune_megatron.checks import fail
from hybridprune_megatron.config.legacy import nested
from hybridprune_megatron.config.reduction_schema import ReductionConfig
from hybridprune_megatron.export.transformers_range import TRANSFORMERS_RANGE, check_transformers
from hybridprune_megatron.method.schedule import Listed, layer_symbols
from hybridprune_megatron.plugins import from_a_file

# Before anything is asked of transformers that older ones lack: this is the first file of an export that is read.
check_transformers(TRANSFORMERS_RANGE)

# Alignment of packed training batches: here it would make a sample's result depend on what it is batched with.
TRAINING_ONLY = {"multiple_of", "local_choice"}


@from_a_file()
def resolve_reduction(pattern: str, reduction: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A complete reduction, its retention per layer solved from the budget if it is not given.

    Args:
        reduction: any keys of the training configuration's reduction group but ``TRAINING_ONLY``, and the shares of
            the layers under "retention"; None: no reduction.

    Raises:
        ValueError: an unknown key, a value that the key does not allow, a budget that cannot be met, or a retention of
            another length. One line.
    """
    if reduction is None:
        return None
    given = {"budget": 1.0, **nested(_group(reduction))}
    _refuse_alignment(given)
    stored = given.pop("retention", None)
    settings = ReductionConfig.of(given)
    plain = exported_settings(settings)
    if stored is not None:
        as_list = {"name": Listed.name, "retention": stored}
        return plain | {"retention": list(ReductionConfig.of(given | {"schedule": as_list}).retention(pattern))}
    return plain | {"retention": list(settings.retention(pattern))}


def exported_settings(settings: ReductionConfig) -> dict[str, Any]:
    """What an export keeps of the training configuration's reduction group: all but ``TRAINING_ONLY``."""
    plain = settings.plain()
    select = {name: value for name, value in plain["select"].items() if name not in TRAINING_ONLY}
    return plain | {"select": select}


@from_a_file()
def merge_reduction(saved: Mapping[str, Any] | None, given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The saved reduction with some settings replaced; None turns it off.

    A part (score, schedule, front) that is given by another name replaces the saved one, keys alone change it. The
    saved retention goes if anything is replaced that it was solved from.

    Raises:
        ValueError: what is given is not a mapping.
    """
    if given is None:
        return None
    merged, changes = nested(_group(saved or {})), nested(_group(given))
    for name, value in changes.items():
        before = merged.get(name)
        if (
            isinstance(value, Mapping)
            and isinstance(before, Mapping)
            and value.get("name") in (None, before.get("name"))
        ):
            value = {**before, **value}
        merged[name] = value
    if "retention" not in changes and set(changes) & {"budget", "layers", "front", "schedule"}:
        merged["retention"] = None
    return merged


class HybridPruneConfig(transformers.PreTrainedConfig):
    """Configuration of ``HybridPruneForCausalLM``.

    ``from_pretrained(folder, reduction=None)`` turns the reduction off; ``reduction={"budget": 0.5}`` keeps the other
    settings and solves the schedule again.

    Attributes:
        hybrid_override_pattern: one symbol a layer: M Mamba-2, * attention, - MLP, E mixture of experts.
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width inside an MLP layer (squared ReLU).
        num_attention_heads: query heads.
        num_key_value_heads: key-value heads.
        head_dim: width of an attention head.
        mamba_num_heads: heads of a Mamba layer.
        mamba_head_dim: width of a Mamba head.
        ssm_state_size: state size of a Mamba head.
        n_groups: groups of Mamba heads that share B and C.
        conv_kernel: taps of the causal convolution.
        chunk_size: tokens a chunk of the scan (speed only).
        layer_norm_epsilon: of every norm except Mamba's gated one (1e-5, as in megatron).
        max_position_embeddings: longest context; there are no positions, so nothing breaks past it.
        time_step_limit: lowest and highest step size dt after softplus that the weights expect. [0, "inf"]: no clamp,
            as in megatron and the original code. [0.001, "inf"]: what transformers' own ``nemotron_h`` computes
            with its default ``time_step_min``, whatever the ``time_step_limit`` of its configuration says.
        experts: fields of the training configuration's ``model.experts``; None: there is no E layer.
        vision: fields of the training configuration's ``model.vision``; None: text only.
        reduction: see ``resolve_reduction``; None: no reduction.
        image_token_id, image_start_token_id, image_end_token_id, turn_token_id: special tokens of the prompt format.
        special_token_ids: all ids that are not plain text.
        use_cache: whether generation keeps caches.
        initializer_range: deviation of new weights.
        tie_word_embeddings: whether the output layer is the embedding.
        eos_token_id, pad_token_id: end of an answer, and padding.
        num_hidden_layers: length of the pattern; what is given is not read.
        transformers_range: versions of transformers that the code runs under, as pip writes them.
    """

    model_type = "hybridprune_vl"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    hybrid_override_pattern: str = "M-M*-"
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 512
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    mamba_num_heads: int = 8
    mamba_head_dim: int = 32
    ssm_state_size: int = 32
    n_groups: int = 2
    conv_kernel: int = 4
    chunk_size: int = 128
    layer_norm_epsilon: float = 1e-5
    max_position_embeddings: int = 4096
    time_step_limit: Sequence[float | str] = (0.0, "inf")
    experts: dict[str, Any] | None = None
    vision: dict[str, Any] | None = None
    reduction: dict[str, Any] | None = None
    image_token_id: int | None = None
    image_start_token_id: int | None = None
    image_end_token_id: int | None = None
    turn_token_id: int | None = None
    special_token_ids: Sequence[int] = ()
    use_cache: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    num_hidden_layers: int = 0
    transformers_range: str = TRANSFORMERS_RANGE

    def __post_init__(self, **kwargs: Any) -> None:
        """Checks and completes what depends on other fields.

        Raises:
            ValueError: an older transformers, or a pattern, a reduction or a limit of dt that is not allowed.
        """
        check_transformers(self.transformers_range)
        self.num_hidden_layers = len(layer_symbols(self.hybrid_override_pattern))
        self.time_step_limit = _checked_limit(self.time_step_limit)
        self.special_token_ids = list(self.special_token_ids)
        self.reduction = resolve_reduction(self.hybrid_override_pattern, self.reduction)
        super().__post_init__(**kwargs)

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens of a frame."""
        assert self.vision is not None, "the model has no vision tower"
        return round(self.vision["frame_size"] // self.vision["patch_size"] * self.vision["pixel_shuffle"]) ** 2

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in ``PreTrainedConfig``; ``reduction`` is merged instead of replaced."""
        if "reduction" in kwargs:
            merged = merge_reduction(config_dict.get("reduction"), kwargs.pop("reduction"))
            config_dict = {**config_dict, "reduction": merged}
        return super().from_dict(config_dict, **kwargs)


def _group(reduction: Any) -> Mapping[str, Any]:
    if not isinstance(reduction, Mapping):
        raise fail("reduction", reduction, "must be a dictionary, or None for no reduction", 'set e.g. {"budget": 0.5}')
    return reduction


def _refuse_alignment(reduction: Mapping[str, Any]) -> None:
    select = reduction.get("select")
    if not isinstance(select, Mapping):
        return
    for name in sorted(TRAINING_ONLY & set(select)):
        key, allowed = f"reduction.select.{name}", "aligns the batches of training, and there are none here"
        raise fail(key, select[name], allowed, f"leave {name} out")


def _checked_limit(limit: Sequence[float | str]) -> list[float | str]:
    """Two bounds in JSON's numbers, which have no infinity."""
    try:
        low, high = (float(bound) for bound in limit)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not 0 <= low < high:
        raise fail(
            "time_step_limit", limit, "must be two bounds of dt, 0 or more, rising", 'set e.g. [0.0, "inf"], no clamp'
        )
    return [low, "inf" if high == float("inf") else high]
