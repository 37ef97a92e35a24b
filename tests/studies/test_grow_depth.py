"""Layers that a grown model copies, and what makes them add nothing."""

from __future__ import annotations

import pytest
import torch

from studies.base.grow_depth import grow, layer_sources

LAYER = "language_model.decoder.layers."


def test_new_layers_copy_the_nearest_of_their_kind_and_add_nothing() -> None:
    sources = layer_sources("M*-", "MM**--", [0, 2, 5])
    assert sources == [0, 0, 1, 1, 2, 2]
    weights = {
        LAYER + "0.mixer.out_proj.weight": torch.ones(2, 2),
        LAYER + "0.mixer.in_proj.weight": torch.full((2, 2), 3.0),
        LAYER + "1.self_attention.linear_proj.weight": torch.ones(2),
        LAYER + "2.mlp.linear_fc2.weight": torch.ones(2),
        "embedding.weight": torch.ones(3),
    }
    grown = grow(weights, "MM**--", sources, {0, 2, 5})
    assert set(grown) == {
        LAYER + "0.mixer.out_proj.weight", LAYER + "1.mixer.out_proj.weight",
        LAYER + "0.mixer.in_proj.weight", LAYER + "1.mixer.in_proj.weight",
        LAYER + "2.self_attention.linear_proj.weight", LAYER + "3.self_attention.linear_proj.weight",
        LAYER + "4.mlp.linear_fc2.weight", LAYER + "5.mlp.linear_fc2.weight",
        "embedding.weight",
    }  # fmt: skip
    zero = [name for name, tensor in grown.items() if not tensor.any()]
    assert zero == [
        LAYER + "1.mixer.out_proj.weight",
        LAYER + "3.self_attention.linear_proj.weight",
        LAYER + "4.mlp.linear_fc2.weight",
    ]
    assert torch.equal(
        grown[LAYER + "1.mixer.in_proj.weight"],
        weights[LAYER + "0.mixer.in_proj.weight"],
    )


@pytest.mark.parametrize("positions", [[0, 1], [2, 3, 5], [0, 3, 2], [0, 2, 6]])
def test_positions_that_do_not_embed_are_refused(positions: list[int]) -> None:
    with pytest.raises(ValueError, match=r"give 3 rising places at which --deeper MM\*\*-- reads M\*-"):
        layer_sources("M*-", "MM**--", positions)


def test_a_new_kind_of_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer 1 is a '-', and --pattern M has none to copy"):
        layer_sources("M", "M-", [0])
