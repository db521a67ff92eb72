"""The small network whose files are mutated."""

from torch import nn

SHAPE = (3, 8, 8)


class Network(nn.Sequential):
    """Convolutions with norms, one of them depthwise, and a linear layer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, groups=16),
            nn.Conv2d(16, 40, 1),
            nn.Flatten(),
            nn.Linear(1440, 4),
        )
