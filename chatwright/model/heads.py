"""Models that give a number per position instead of logits: the reward model, and PPO's two critics."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from chatwright.model.config import GPTConfig
from chatwright.model.gpt import GPT


class ScalarModel(nn.Module):
    """A decoder with one number per position instead of logits (Ouyang et al. 2022, section 3.5).

    The number is `scale * (scalar(hidden) - offset)`. The two constants are not trained; they are set once
    after training.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.body = GPT(config)
        self.body.head = nn.Identity()  # type: ignore[assignment]
        self.scalar = nn.Linear(config.width, 1)
        std = 1 / (config.width + 1) ** 0.5  # Stiennon et al. 2020, appendix B
        nn.init.normal_(self.scalar.weight, std=std)
        nn.init.zeros_(self.scalar.bias)
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def start_from(self, model: GPT) -> None:
        """Copy a language model's body, which is everything but its output matrix."""
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
        """One number per position, float32; `mask` and `lengths` as in `GPT.hidden`."""
        return self._read(self.body.hidden(ids, mask=mask, lengths=lengths))

    def at(
        self,
        ids: Int[Tensor, "B T"],
        indices: Int[Tensor, " M"],
        *,
        mask: Bool[Tensor, "B T"] | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, " M"]:
        """The numbers of some tokens, which costs less than all of them; arguments as in `GPT.hidden_at`."""
        return self._read(self.body.hidden_at(ids, indices, mask=mask, lengths=lengths))

    def score(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
        """The score of each row: the number at its last real token.

        Padding on the right costs nothing. Raises ValueError for a row without a real token.
        """
        padded_left, empty = torch.stack(((mask[:, 1:] & ~mask[:, :-1]).any(), ~mask.any(1).all())).tolist()
        if empty:
            raise ValueError("a row without a token has no score")
        padding = {"mask": mask} if padded_left else {"lengths": mask.sum(1)}
        indices = torch.arange(mask.numel(), device=ids.device).view(mask.shape)
        return self.at(ids, torch.where(mask, indices, -1).max(dim=1).values, **padding)

    def _read(self, hidden: Float[Tensor, "*positions D"]) -> Float[Tensor, "*positions"]:
        numbers: Tensor = self.scalar(hidden).squeeze(-1).float()
        return self.scale * (numbers - self.offset)


class ValueHead(nn.Module):
    """One number per position from the policy's own hidden states (Ziegler et al. 2019, section 2.1).

    It starts at zero. The first advantages are then the returns themselves, and the first gradient of the
    value loss leaves the policy's body as it is, because it passes through this weight.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scalar = nn.Linear(width, 1)
        nn.init.zeros_(self.scalar.weight)
        nn.init.zeros_(self.scalar.bias)

    def forward(self, hidden: Float[Tensor, "*positions D"]) -> Float[Tensor, "*positions"]:
        """One number per position, float32."""
        return self.scalar(hidden).squeeze(-1).float()  # type: ignore[no-any-return]
