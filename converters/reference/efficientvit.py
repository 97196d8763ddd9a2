"""EfficientViT and the neck of EfficientViT-SAM in PyTorch.

Follows the papers (EfficientViT, Cai et al. 2023; EfficientViT-SAM, Zhang et al. 2024) and names its modules as the
original checkpoints do, so that `load_state_dict` takes them with strict=True.
"""

import torch
import torch.nn.functional as F
from torch import nn

from layer_norm_2d import LayerNorm2d

EPSILON = 1e-6  # of every norm


class Block(nn.Module):
    """Something under a name of the original's containers."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class ConvNorm(nn.Module):
    """Convolution, then BatchNorm, or a bias in its place; then GELU by tanh where wanted."""

    def __init__(self, channels, out, kernel, stride=1, groups=1, norm=True, activated=False):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=not norm)
        self.norm = nn.BatchNorm2d(out, EPSILON) if norm else nn.Identity()
        self.activated = activated

    def forward(self, x):
        x = self.norm(self.conv(x))
        return F.gelu(x, approximate="tanh") if self.activated else x

    def fold(self):
        """Gives the convolution a bias in place of the BatchNorm, as in model files. Values are not kept."""
        c = self.conv
        self.conv = nn.Conv2d(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding, groups=c.groups)
        self.norm = nn.Identity()


class ResBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1 = ConvNorm(dim, dim, 3, activated=True)
        self.conv2 = ConvNorm(dim, dim, 3)

    def forward(self, x):
        return self.conv2(self.conv1(x))


class FusedMBConv(nn.Module):
    def __init__(self, channels, hidden, out, stride=1):
        super().__init__()
        self.spatial_conv = ConvNorm(channels, hidden, 3, stride, activated=True)
        self.point_conv = ConvNorm(hidden, out, 1)

    def forward(self, x):
        return self.point_conv(self.spatial_conv(x))


class MBConv(nn.Module):
    def __init__(self, channels, hidden, out, stride=1):
        super().__init__()
        self.inverted_conv = ConvNorm(channels, hidden, 1, norm=False, activated=True)
        self.depth_conv = ConvNorm(hidden, hidden, 3, stride, hidden, norm=False, activated=True)
        self.point_conv = ConvNorm(hidden, out, 1)

    def forward(self, x):
        return self.point_conv(self.depth_conv(self.inverted_conv(x)))


class LiteMLA(nn.Module):
    """Multi-scale linear attention; each head's q, k and v lie side by side."""

    def __init__(self, dim, head, side):
        super().__init__()
        self.head = head
        self.qkv = Block(conv=nn.Conv2d(dim, 3 * dim, 1, bias=False))
        self.aggreg = nn.ModuleList([nn.Sequential(
            nn.Conv2d(3 * dim, 3 * dim, side, padding=side // 2, groups=3 * dim, bias=False),
            nn.Conv2d(3 * dim, 3 * dim, 1, groups=3 * dim // head, bias=False),
        )])
        self.proj = ConvNorm(2 * dim, dim, 1)

    def attend(self, x):
        """(B, 6 dim, H, W) to (B, 2 dim, H, W)"""
        batch, _, height, width = x.shape
        q, k, v = x.view(batch, -1, 3 * self.head, height * width).split(self.head, 2)
        q, k = F.relu(q), F.relu(k)
        v = F.pad(v, (0, 0, 0, 1), value=1.0)
        out = (v @ k.transpose(-1, -2)) @ q
        out = out[:, :, :-1] / (out[:, :, -1:] + 1e-15)
        return out.reshape(batch, -1, height, width)

    def forward(self, x):
        qkv = self.qkv.conv(x)
        return self.proj(self.attend(torch.cat([qkv, self.aggreg[0](qkv)], 1)))


class Residual(nn.Module):
    def __init__(self, main):
        super().__init__()
        self.main = main

    def forward(self, x):
        return x + self.main(x)


class Straight(Residual):
    def forward(self, x):
        return self.main(x)


class AttentionBlock(nn.Module):
    def __init__(self, attention, local):
        super().__init__()
        self.context_module = Residual(attention)
        self.local_module = Residual(local)

    def forward(self, x):
        return self.local_module(self.context_module(x))


class Operations(nn.Module):
    """A sequence under the name `op_list`."""

    def __init__(self, *operations):
        super().__init__()
        self.op_list = nn.ModuleList(operations)

    def forward(self, x):
        for operation in self.op_list:
            x = operation(x)
        return x


def make_stage(config, before, stage):
    dim, hidden = stage["dim"], stage["dim"] * stage["expand"]
    if before is None:
        blocks = [ConvNorm(3, dim, 3, 2, activated=True)]
    else:
        merge = FusedMBConv if stage["merge"] == "fused" else MBConv
        blocks = [Straight(merge(before, before * stage["merge_expand"], dim, 2))]
    for _ in range(stage["depth"]):
        if stage["blocks"] == "residual":
            blocks.append(Residual(ResBlock(dim)))
        elif stage["blocks"] == "fused":
            blocks.append(Residual(FusedMBConv(dim, hidden, dim)))
        elif stage["blocks"] == "inverted":
            blocks.append(Residual(MBConv(dim, hidden, dim)))
        else:
            attention = LiteMLA(dim, config["head_dim"], config["attention_side"])
            blocks.append(AttentionBlock(attention, MBConv(dim, hidden, dim)))
    return Operations(*blocks)


class Neck(nn.Module):
    def __init__(self, config, side):
        super().__init__()
        dim = config["embed_dim"]
        self.side = side
        self.input_ops = nn.ModuleList(
            Operations(ConvNorm(stage["dim"], dim, 1)) for stage in config["stages"][:-4:-1]
        )
        self.middle = Operations(*(
            Residual(FusedMBConv(dim, dim * config["neck_expand"], dim)) for _ in range(config["neck_depth"])
        ))
        self.output_ops = nn.ModuleList([Operations(ConvNorm(dim, dim, 1, norm=False))])

    def forward(self, maps):
        """The last three stages' maps, deepest first."""
        parts = []
        for project, x in zip(self.input_ops, maps):
            x = project(x)
            if x.shape[-1] != self.side:
                x = F.interpolate(x, (self.side, self.side), mode="bicubic", align_corners=False)
            parts.append(x)
        x = parts[0] + (parts[1] + parts[2])
        return self.output_ops[0](self.middle(x))


class ImageEncoder(nn.Module):
    """(B, 3, side, side) to (B, embed_dim, resolution, resolution)."""

    def __init__(self, config):
        super().__init__()
        dims = [None] + [stage["dim"] for stage in config["stages"]]
        self.backbone = Block(stages=nn.ModuleList(
            make_stage(config, before, stage) for before, stage in zip(dims, config["stages"])
        ))
        self.resolution = config["image_size"] >> (len(config["stages"]) - 2)
        self.neck = Neck(config, self.resolution)
        self.norm = LayerNorm2d(config["embed_dim"])

    def forward(self, x):
        maps = []
        for stage in self.backbone.stages:
            x = stage(x)
            maps.append(x)
        return self.norm(self.neck(maps[:-4:-1]))
