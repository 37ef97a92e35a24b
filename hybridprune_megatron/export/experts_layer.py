"""The mixture of experts of an exported E layer.

Shape letters: L packed tokens, D hidden size, X routed experts, k experts that a token visits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridprune_megatron.export.configuration_hybridprune import HybridPruneConfig
from hybridprune_megatron.models.encoder import SquaredReLU


class Router(nn.Module):
    """Sigmoid scores; a correction bias helps to choose experts and has no part in their weights."""

    def __init__(self, config: HybridPruneConfig) -> None:
        super().__init__()
        assert config.experts is not None, "an E layer comes with its experts' sizes"
        sizes = config.experts
        self.count, self.scaling = sizes["experts_per_token"], sizes["routed_scaling"]
        self.groups, self.groups_per_token = sizes["num_groups"], sizes["groups_per_token"]
        self.weight = nn.Parameter(torch.zeros(sizes["num_experts"], config.hidden_size))
        # fp32 whatever the model's dtype: a rounded bias would choose other experts.
        self.e_score_correction_bias = nn.Buffer(torch.zeros(sizes["num_experts"], dtype=torch.float32))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[L, D] to the chosen experts int64 [L, k] and their weights float32 [L, k], which add up to the scaling."""
        scores = nn.functional.linear(hidden.float(), self.weight.float()).sigmoid()
        rank = scores + self.e_score_correction_bias.float()
        if self.groups > 1:
            rank = rank.masked_fill(~self._in_best_groups(rank), float("-inf"))
        chosen = rank.topk(self.count, -1).indices
        weights = scores.gather(-1, chosen)
        return chosen, self.scaling * weights / (weights.sum(-1, keepdim=True) + 1e-20)

    def _in_best_groups(self, rank: Tensor) -> Tensor:
        """bool [L, X]: the experts of the groups whose two best score highest together."""
        grouped = rank.unflatten(-1, (self.groups, -1))
        best = grouped.topk(2, -1).values.sum(-1).topk(self.groups_per_token, -1).indices
        among = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=rank.device).scatter(-1, best, True)
        return among.unsqueeze(-1).expand_as(grouped).flatten(1)


class Expert(nn.Module):
    """Linear, squared ReLU, linear."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.activation = SquaredReLU()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(hidden)))


class ExpertsMixture(nn.Module):
    """Routed experts, some of them for each token, and a shared one for all."""

    def __init__(self, config: HybridPruneConfig) -> None:
        super().__init__()
        assert config.experts is not None, "an E layer comes with its experts' sizes"
        sizes, width = config.experts, config.hidden_size
        latent = sizes["latent_size"]
        self.gate = Router(config)
        self.experts = nn.ModuleList(
            Expert(latent or width, sizes["ffn_hidden_size"]) for _ in range(sizes["num_experts"])
        )
        self.shared_experts = None
        if sizes["shared_ffn_hidden_size"]:
            self.shared_experts = Expert(width, sizes["shared_ffn_hidden_size"])
        self.fc1_latent_proj = nn.Linear(width, latent, bias=False) if latent else nn.Identity()
        self.fc2_latent_proj = nn.Linear(latent, width, bias=False) if latent else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        """[L, D] to [L, D]."""
        chosen, weights = self.gate(hidden)
        inputs = self.fc1_latent_proj(hidden)
        routed = torch.zeros_like(inputs)
        for number in chosen.unique().tolist():
            rows, place = (chosen == number).nonzero(as_tuple=True)
            output = self.experts[number](inputs[rows])
            routed.index_add_(0, rows, (output * weights[rows, place].unsqueeze(-1)).to(routed.dtype))
        output = self.fc2_latent_proj(routed)
        return output if self.shared_experts is None else output + self.shared_experts(hidden)
