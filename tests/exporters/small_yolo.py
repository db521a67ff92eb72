"""A detector in the style of YOLO with few channels: CSP blocks, SPPF, a PAN neck, three heads."""

import torch
from torch import nn


class Conv(nn.Sequential):
    """A convolution, its norm and SiLU."""

    def __init__(self, inputs, outputs, kernel=1, stride=1):
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()
        )


class Bottleneck(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first, self.second = Conv(channels, channels, 3), Conv(channels, channels, 3)

    def forward(self, x):
        return x + self.second(self.first(x))


class CspBlock(nn.Module):
    """Splits the channels, takes one half through bottlenecks, and joins all that was made."""

    def __init__(self, inputs, outputs, blocks=1):
        super().__init__()
        self.half = outputs // 2
        self.before = Conv(inputs, outputs)
        self.blocks = nn.ModuleList(Bottleneck(self.half) for _ in range(blocks))
        self.after = Conv((2 + blocks) * self.half, outputs)

    def forward(self, x):
        parts = list(self.before(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.after(torch.cat(parts, 1))


class Sppf(nn.Module):
    """Pools three times in a row, and joins all sizes."""

    def __init__(self, channels):
        super().__init__()
        self.before, self.after = Conv(channels, channels // 2), Conv(2 * channels, channels)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        parts = [self.before(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.after(torch.cat(parts, 1))


class SmallYolo(nn.Module):
    """Returns a tensor of shape (batch, anchors * (5 + classes), height, width) for strides 8, 16 and 32."""

    def __init__(self, width=8, classes=4, anchors=3):
        super().__init__()
        a, b, c, d = width, 2 * width, 4 * width, 8 * width
        self.stem = nn.Sequential(Conv(3, a, 3, 2), Conv(a, b, 3, 2), CspBlock(b, b))
        self.stage3 = nn.Sequential(Conv(b, b, 3, 2), CspBlock(b, b))
        self.stage4 = nn.Sequential(Conv(b, c, 3, 2), CspBlock(c, c))
        self.stage5 = nn.Sequential(Conv(c, d, 3, 2), CspBlock(d, d), Sppf(d))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.top4, self.top3 = CspBlock(d + c, c), CspBlock(c + b, b)
        self.down3, self.down4 = Conv(b, b, 3, 2), Conv(c, c, 3, 2)
        self.bottom4, self.bottom5 = CspBlock(b + c, c), CspBlock(c + d, d)
        self.heads = nn.ModuleList(nn.Conv2d(n, anchors * (5 + classes), 1) for n in (b, c, d))

    def forward(self, x):
        p3 = self.stage3(self.stem(x))
        p4 = self.stage4(p3)
        p5 = self.stage5(p4)
        n4 = self.top4(torch.cat([self.up(p5), p4], 1))
        n3 = self.top3(torch.cat([self.up(n4), p3], 1))
        m4 = self.bottom4(torch.cat([self.down3(n3), n4], 1))
        m5 = self.bottom5(torch.cat([self.down4(m4), p5], 1))
        return [head(m) for head, m in zip(self.heads, (n3, m4, m5), strict=True)]


def small():
    """Returns the network that the tests convert."""
    return SmallYolo()
