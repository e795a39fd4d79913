"""AMT-S: the frame half-way between two, by bidirectional flow from all-pairs correlation and three fields of it (Li et al. 2023).

Features of both frames at an eighth of their size correlate all with all. Four decoders, from a sixteenth up to full size, predict the
flow from the frame between to either side; the first three look the correlation up where that flow points and correct it.
Names are those of the published checkpoint. Legend: B batch, C channels, h and w an eighth of the frame's sides.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from sla2_eval.networks.loading import fill, read

CHANNELS, SKIP, FLOWS = (20, 32, 44, 56), 20, 3
RADIUS, LEVELS = 3, 4  # of the look-up in the correlation
DIVISOR = 16  # of the frame's sides


def scaled(x: Tensor, factor: float) -> Tensor:
    """Bilinear, half pixels."""
    return functional.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def pixel_grid(x: Tensor) -> Tensor:
    """Places (1, 2, H, W), x first, of the pixels of (B, C, H, W)."""
    rows, columns = torch.meshgrid(*(torch.arange(n, device=x.device) for n in x.shape[2:]), indexing="ij")
    return torch.stack([columns, rows]).to(x.dtype)[None]


def sample(x: Tensor, places: Tensor, padding: str) -> Tensor:
    """Values of (B, C, H, W) at places (B, 2, H', W') in pixels."""
    size = torch.tensor([x.shape[3] - 1, x.shape[2] - 1], device=x.device, dtype=x.dtype).clamp_min(1)
    grid = 2 * places.permute(0, 2, 3, 1) / size - 1
    return functional.grid_sample(x, grid, padding_mode=padding, align_corners=True)


def warped(x: Tensor, flow: Tensor) -> Tensor:
    """(B, C, H, W) fetched from where the flow (B, 2, H, W) points; beyond the border its last pixel."""
    return sample(x, pixel_grid(x) + flow, "border")


def activated(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3 x 3 convolution and PReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.PReLU(outputs))


class Bottleneck(nn.Module):
    """RAFT's small residual block with instance norms, which have no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs // 4, 1)
        self.conv2 = nn.Conv2d(outputs // 4, outputs // 4, 3, stride, 1)
        self.conv3 = nn.Conv2d(outputs // 4, outputs, 1)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        norm = functional.instance_norm
        y = x
        for conv in (self.conv1, self.conv2, self.conv3):
            y = norm(conv(y)).relu()
        return ((norm(self.downsample(x)) if self.downsample is not None else x) + y).relu()


class Features(nn.Module):
    """RAFT's small encoder: (B, 3, H, W) to (B, 84, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 7, 2, 3)
        self.layer1 = nn.Sequential(Bottleneck(32, 32, 1), Bottleneck(32, 32, 1))
        self.layer2 = nn.Sequential(Bottleneck(32, 64, 2), Bottleneck(64, 64, 1))
        self.layer3 = nn.Sequential(Bottleneck(64, 96, 2), Bottleneck(96, 96, 1))
        self.conv2 = nn.Conv2d(96, 84, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Features of frames."""
        x = functional.instance_norm(self.conv1(x)).relu()
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


class Pyramid(nn.Module):
    """Features of a frame at a half, a quarter, an eighth and a sixteenth of its size."""

    def __init__(self) -> None:
        super().__init__()
        for level, (inputs, outputs) in enumerate(zip((3, *CHANNELS), CHANNELS, strict=False), start=1):
            block = nn.Sequential(activated(inputs, outputs, 2), activated(outputs, outputs))
            self.add_module(f"pyramid{level}", block)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features, the largest first."""
        found = []
        for block in self.children():
            x = block(x)
            found.append(x)
        return found


class SideBlock(nn.Module):
    """Residual block in which the last channels are worked on alone in between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv3 = activated(channels, channels), activated(channels, channels)
        self.conv2, self.conv4 = activated(SKIP, SKIP), activated(SKIP, SKIP)
        self.conv5, self.prelu = nn.Conv2d(channels, channels, 3, 1, 1), nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        y = self.conv1(x)
        y = self.conv3(torch.cat([y[:, :-SKIP], self.conv2(y[:, -SKIP:])], 1))
        y = self.conv5(torch.cat([y[:, :-SKIP], self.conv4(y[:, -SKIP:])], 1))
        return self.prelu(x + y)


class Decoder(nn.Module):
    """Three layers that double the size: (B, inputs, H, W) to (B, outputs, 2 H, 2 W)."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.convblock = nn.Sequential(
            activated(inputs, width), SideBlock(width), nn.ConvTranspose2d(width, outputs, 4, 2, 1)
        )

    def forward(self, *parts: Tensor) -> Tensor:
        """Decode the concatenation of its parts."""
        return self.convblock(torch.cat(parts, 1))


class Update(nn.Module):
    """Correction of features (B, C, H, W) and flow from the correlation, at an eighth of the frame whatever their size.

    Args:
        channels: C; scale: H over h.
    """

    def __init__(self, channels: int, scale: int) -> None:
        super().__init__()
        hidden, self.scale = 76, scale
        self.convc1 = nn.Conv2d(2 * LEVELS * (2 * RADIUS + 1) ** 2, 64, 1)
        self.convf1, self.convf2 = nn.Conv2d(4, 40, 7, padding=3), nn.Conv2d(40, 20, 3, padding=1)
        self.conv = nn.Conv2d(64 + 20, 68, 3, padding=1)
        self.gru = self._two(68 + 4 + channels, hidden, hidden)
        self.feat_head, self.flow_head = self._two(hidden, hidden, channels), self._two(hidden, hidden, 4)

    @staticmethod
    def _two(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
        first, second = nn.Conv2d(inputs, hidden, 3, padding=1), nn.Conv2d(hidden, outputs, 3, padding=1)
        return nn.Sequential(first, nn.LeakyReLU(0.1), second)

    def forward(self, features: Tensor, flow: Tensor, correlation: Tensor) -> tuple[Tensor, Tensor]:
        """Changes of features and of both flows (B, 4, H, W); flow (B, 4, h, w) at the small size."""

        def act(x: Tensor) -> Tensor:
            return functional.leaky_relu(x, 0.1)

        small = features if self.scale == 1 else scaled(features, 1 / self.scale)
        moved = act(self.convf2(act(self.convf1(flow))))
        joined = act(self.conv(torch.cat([act(self.convc1(correlation)), moved], 1)))
        hidden = self.gru(torch.cat([joined, flow, small], 1))
        change, turn = self.feat_head(hidden), self.flow_head(hidden)
        if self.scale > 1:
            change, turn = scaled(change, self.scale), self.scale * scaled(turn, self.scale)
        return change, turn


class Correlation:
    """All pairs of features (B, 84, h, w) of two frames, both ways, at four sizes of the other frame."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.size = first.shape
        batch, width, rows, columns = first.shape
        volume = first.flatten(2).transpose(1, 2) @ second.flatten(2) / width**0.5  # (B, h w, h w)
        self.pyramids = []
        for one in (volume, volume.transpose(1, 2)):
            level = one.reshape(batch * rows * columns, 1, rows, columns)
            levels = [level]
            for _ in range(LEVELS - 1):
                level = functional.avg_pool2d(level, 2)
                levels.append(level)
            self.pyramids.append(levels)

    def look_up(self, flow0: Tensor, flow1: Tensor) -> Tensor:
        """Correlations (B, 2 * 4 * 49, h, w) around where the flows (B, 2, h, w) from the frame between lead, doubled to span it."""
        batch, _, rows, columns = self.size
        reach = torch.arange(-RADIUS, RADIUS + 1, device=flow0.device, dtype=flow0.dtype)
        # As published, the row of the offsets runs along x.
        offsets = torch.stack(torch.meshgrid(reach, reach, indexing="ij"))[None]
        found = []
        for levels, flow in zip(self.pyramids, (flow1, flow0), strict=True):
            centres = (pixel_grid(flow) + 2 * flow).permute(0, 2, 3, 1).reshape(-1, 2, 1, 1)
            for level, values in enumerate(levels):
                near = sample(values, centres / 2**level + offsets, "zeros")
                found.append(near.reshape(batch, rows, columns, -1).permute(0, 3, 1, 2))
        return torch.cat(found, 1)


class AmtS(nn.Module):
    """The interpolator, at the middle of two frames."""

    def __init__(self) -> None:
        super().__init__()
        one, two, three, four = CHANNELS
        self.feat_encoder, self.encoder = Features(), Pyramid()
        self.decoder4 = Decoder(2 * four + 1, 2 * four, three + 4)
        self.decoder3 = Decoder(3 * three + 4, 3 * three, two + 4)
        self.decoder2 = Decoder(3 * two + 4, 3 * two, one + 4)
        self.decoder1 = Decoder(3 * one + 4, 3 * one, 8 * FLOWS)
        self.update4, self.update3, self.update2 = Update(three, 1), Update(two, 2), Update(one, 4)
        self.comb_block = nn.Sequential(
            nn.Conv2d(3 * FLOWS, 6 * FLOWS, 3, 1, 1), nn.PReLU(6 * FLOWS), nn.Conv2d(6 * FLOWS, 3, 3, 1, 1)
        )

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """The frame between two (B, 3, H, W) in [0, 1] of any size."""
        height, width = before.shape[2:]
        rows, columns = -height % DIVISOR, -width % DIVISOR
        pads = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        before, after = (functional.pad(x, pads, mode="replicate") for x in (before, after))
        found = self._between(before, after).clamp(0, 1)
        return found[..., pads[2] : pads[2] + height, pads[0] : pads[0] + width]

    def _between(self, before: Tensor, after: Tensor) -> Tensor:
        mean = torch.cat([before, after], 2).mean((1, 2, 3), keepdim=True)
        before, after = before - mean, after - mean
        correlation = Correlation(self.feat_encoder(before), self.feat_encoder(after))
        first, second = self.encoder(before), self.encoder(after)  # by level, the largest first
        time = torch.full_like(first[3][:, :1], 0.5)
        flow0, flow1, features = self._split(self.decoder4(first[3], second[3], time))
        flow0, flow1, features = self._corrected(self.update4, correlation, flow0, flow1, features)
        for decoder, update, level in ((self.decoder3, self.update3, 2), (self.decoder2, self.update2, 1)):
            sides = warped(first[level], flow0), warped(second[level], flow1)
            turn0, turn1, features = self._split(decoder(features, *sides, flow0, flow1))
            flow0, flow1 = turn0 + 2 * scaled(flow0, 2), turn1 + 2 * scaled(flow1, 2)
            flow0, flow1, features = self._corrected(update, correlation, flow0, flow1, features)
        sides = warped(first[0], flow0), warped(second[0], flow1)
        turn0, turn1, mask, rest = self.decoder1(features, *sides, flow0, flow1).split(
            [2 * FLOWS, 2 * FLOWS, FLOWS, 3 * FLOWS], 1
        )
        flow0, flow1 = (
            turn + 2 * scaled(flow, 2).repeat(1, FLOWS, 1, 1) for turn, flow in ((turn0, flow0), (turn1, flow1))
        )
        return self._combined(before, after, flow0, flow1, mask.sigmoid(), rest, mean)

    @staticmethod
    def _split(decoded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both flows and the features of a decoder's answer."""
        return decoded[:, :2], decoded[:, 2:4], decoded[:, 4:]

    @staticmethod
    def _corrected(
        update: Update, correlation: Correlation, flow0: Tensor, flow1: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        small = [
            flow if update.scale == 1 else scaled(flow, 1 / update.scale) / update.scale for flow in (flow0, flow1)
        ]
        change, turn = update(features, torch.cat(small, 1), correlation.look_up(*small))
        return flow0 + turn[:, :2], flow1 + turn[:, 2:], features + change

    def _combined(
        self, before: Tensor, after: Tensor, flow0: Tensor, flow1: Tensor, mask: Tensor, rest: Tensor, mean: Tensor
    ) -> Tensor:
        """The mean of one frame a field, and what the last block adds to it."""
        fields = []
        for index in range(FLOWS):
            pair = slice(2 * index, 2 * index + 2)
            share = mask[:, index : index + 1]
            mixed = share * warped(before, flow0[:, pair]) + (1 - share) * warped(after, flow1[:, pair])
            fields.append(mixed + mean + rest[:, 3 * index : 3 * index + 3])
        return torch.stack(fields).mean(0) + self.comb_block(torch.cat(fields, 1))


def load_amt(path: Path) -> AmtS:
    """AMT-S from converted `amt-s.pth`."""
    return fill(AmtS(), read(path), path)
