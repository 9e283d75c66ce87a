"""A prox as a user writes one, in a module that can be imported again."""

import torch

from flowlib import Blur


class Scale(torch.nn.Module):
    """Just a forward, and what saving needs: config and from_config."""

    def __init__(self, start, size=1):
        super().__init__()
        self.config = {"start": start, "size": size}
        self.factor = torch.nn.Parameter(torch.full((size,), float(start)))

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def forward(self, x, shrinkage):
        return self.factor.mean() * x


class Blurred(Scale):
    """One with a buffer in float64."""

    def __init__(self, start, size=1):
        super().__init__(start, size)
        self.blur = Blur()


class Mute(torch.nn.Module):
    """One that cannot be described."""

    def forward(self, x, shrinkage):
        return x


class NoModule:
    """What a file might name although it is no network."""

    @classmethod
    def from_config(cls, config):
        raise AssertionError("never called")


class Counted(Scale):
    """One with a part that folds may share."""

    def __init__(self, start, size=1):
        super().__init__(start, size)
        self.net = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3))

    def forward(self, x, shrinkage):
        return self.factor.mean() * self.net(x)


class Strict(Scale):
    """One that looks at numbers while it is built, which not every device allows."""

    def __init__(self, start, size=1):
        super().__init__(start, size)
        assert float(self.factor[0]) == start
