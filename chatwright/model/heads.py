"""Numbers instead of tokens: the reward model, and the two kinds of critic of PPO."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT


class ScalarModel(nn.Module):
    """A decoder with one output per position (Ouyang et al. 2022, section 3.5: the unembedding replaced by a scalar).

    Outputs are `scale * (head(hidden) - offset)`; the two constants are set once after training and not trained.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.body = GPT(config)
        self.body.head = nn.Identity()  # type: ignore[assignment]
        self.scalar = nn.Linear(config.width, 1)
        nn.init.normal_(
            self.scalar.weight, std=1 / (config.width + 1) ** 0.5
        )  # Stiennon et al. 2020, appendix B
        nn.init.zeros_(self.scalar.bias)
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def start_from(self, model: GPT) -> None:
        """Copy a language model's body; its output matrix is left behind."""
        own = dict(self.body.named_parameters())
        for name, parameter in model.named_parameters():
            if not name.startswith("head."):
                own[name].copy_(parameter)

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        *,
        mask: Bool[Tensor, "B T"] | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B T"]:
        """One number per position, float32; `mask` and `lengths` as in GPT.hidden."""
        return self._read(self.body.hidden(ids, mask=mask, lengths=lengths))

    def at(
        self,
        ids: Int[Tensor, "B T"],
        places: Int[Tensor, " M"],
        *,
        mask: Bool[Tensor, "B T"] | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, " M"]:
        """The numbers at some places, sooner than all of them; arguments as in GPT.hidden_at."""
        return self._read(self.body.hidden_at(ids, places, mask=mask, lengths=lengths))

    def score(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
        """The number at each row's last real token: what the model thinks of the whole row. Padding on the right costs nothing.
        Raises ValueError for a row without a token."""
        on_the_left, empty = torch.stack(((mask[:, 1:] & ~mask[:, :-1]).any(), ~mask.any(1).all())).tolist()
        if empty:
            raise ValueError("a row without a token has no score")
        padded = {"mask": mask} if on_the_left else {"lengths": mask.sum(1)}
        every = torch.arange(mask.numel(), device=ids.device).view(mask.shape)
        return self.at(ids, torch.where(mask, every, -1).max(dim=1).values, **padded)

    def _read(self, hidden: Float[Tensor, "*places D"]) -> Float[Tensor, "*places"]:
        return self.scale * (self.scalar(hidden).squeeze(-1).float() - self.offset)  # type: ignore[no-any-return]


class ValueHead(nn.Module):
    """One number per position from hidden states that a policy has anyway (Ziegler et al. 2019, section 2.1).

    It starts at zero: the first advantages are then the returns themselves, and the first gradients of the value loss
    leave the trunk as it is (they pass through this weight).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scalar = nn.Linear(width, 1)
        nn.init.zeros_(self.scalar.weight)
        nn.init.zeros_(self.scalar.bias)

    def forward(self, hidden: Float[Tensor, "*places D"]) -> Float[Tensor, "*places"]:
        """One number per position, float32."""
        return self.scalar(hidden).squeeze(-1).float()  # type: ignore[no-any-return]
