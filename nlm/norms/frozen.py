"""What is left of a norm that has been removed: an affine map a channel, which the next linear layer can take in.

A norm that divides every token by the same constant σ̄ has no statistics; 1/σ̄ is part of the gain γ. `nlm remove-norms`
makes such models of trained ones.
"""

from dataclasses import replace

from torch import Tensor

from nlm.norms.token import ChannelNorm, NormLayer, NormSite, precise


class FrozenLayerNorm(ChannelNorm):
    """γ (x - mean) + b: LayerNorm with a constant standard deviation, which is part of γ (FakeLN in the code
    of Heimersheim 2024, arXiv:2409.13710)."""

    def centred(self, x: Tensor) -> Tensor:
        """[… D] -> [… D], in float32 or more."""
        x = precise(x)
        total = x.sum(-1, keepdim=True)
        return x - (total if self.width.is_whole else self.tp.sum(total)) / self.width.full

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.centred(x))


class FrozenRMSNorm(FrozenLayerNorm):
    """γ x: RMSNorm with a constant root mean square, which is part of γ."""

    def __init__(self, at: NormSite) -> None:
        super().__init__(replace(at, bias=False))

    def centred(self, x: Tensor) -> Tensor:
        return precise(x)


class NoNorm(NormLayer):
    """x: a norm that the next linear layer has taken in."""

    def forward(self, x: Tensor) -> Tensor:
        return x
