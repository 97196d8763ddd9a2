"""TinyViT and SAM's neck in PyTorch, as LiteMedSAM and MobileSAM have them.

Follows the papers (TinyViT, Wu et al. 2022; MobileSAM, Zhang et al. 2023; MedSAM, Ma et al. 2024) and names its
modules as the original checkpoints do, so that `load_state_dict` takes them with strict=True.
"""

import torch
import torch.nn.functional as F
from torch import nn

from layer_norm_2d import LayerNorm2d


class Conv2dBN(nn.Module):
    """Convolution without bias, then BatchNorm."""

    def __init__(self, channels, out, kernel=1, stride=1, groups=1):
        super().__init__()
        self.c = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x):
        return self.bn(self.c(x))

    def fold(self):
        """Gives the convolution a bias in place of the BatchNorm, as in model files. Values are not kept."""
        c = self.c
        self.c = nn.Conv2d(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding, groups=c.groups)
        self.bn = nn.Identity()


class PatchEmbed(nn.Module):
    """Two convolutions: LiteMedSAM embeds single pixels, MobileSAM patches of 4 x 4."""

    def __init__(self, channels, dim, strided):
        super().__init__()
        how = dict(kernel=3, stride=2) if strided else {}
        self.seq = nn.Sequential(Conv2dBN(channels, dim // 2, **how), nn.GELU(), Conv2dBN(dim // 2, dim, **how))

    def forward(self, x):
        return self.seq(x)


class MBConv(nn.Module):
    def __init__(self, dim, expand):
        super().__init__()
        hidden = dim * expand
        self.conv1 = Conv2dBN(dim, hidden)
        self.conv2 = Conv2dBN(hidden, hidden, 3, groups=hidden)
        self.conv3 = Conv2dBN(hidden, dim)

    def forward(self, x):
        y = F.gelu(self.conv1(x))
        y = F.gelu(self.conv2(y))
        return F.gelu(x + self.conv3(y))


class PatchMerging(nn.Module):
    """(B, C, H, W) or (B, H * W, C) to (B, tokens, out)."""

    def __init__(self, resolution, dim, out, stride):
        super().__init__()
        self.resolution = resolution
        self.conv1 = Conv2dBN(dim, out)
        self.conv2 = Conv2dBN(out, out, 3, stride, groups=out)
        self.conv3 = Conv2dBN(out, out)

    def forward(self, x):
        if x.ndim == 3:
            x = x.transpose(1, 2).unflatten(2, (self.resolution, self.resolution))
        x = F.gelu(self.conv1(x))
        x = F.gelu(self.conv2(x))
        return self.conv3(x).flatten(2).transpose(1, 2)


class ConvLayer(nn.Module):
    def __init__(self, dim, depth, expand, downsample):
        super().__init__()
        self.blocks = nn.ModuleList(MBConv(dim, expand) for _ in range(depth))
        self.downsample = downsample

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.downsample(x) if self.downsample else x


class WindowAttention(nn.Module):
    """Multi-head attention among the tokens of a window, with a learned bias for each distance
    |dy|, |dx|."""

    def __init__(self, dim, heads, window):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        y, x = y.flatten(), x.flatten()
        distance = (y[:, None] - y).abs() * window + (x[:, None] - x).abs()
        self.register_buffer("distance", distance, persistent=False)

    def forward(self, x):
        windows, tokens, dim = x.shape
        # Each head's q, k and v lie side by side.
        qkv = self.qkv(self.norm(x)).view(windows, tokens, self.heads, 3, dim // self.heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        bias = self.attention_biases[:, self.distance]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(y.transpose(1, 2).reshape(windows, tokens, dim))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class TinyViTBlock(nn.Module):
    def __init__(self, resolution, dim, heads, window, mlp_ratio):
        super().__init__()
        self.resolution = resolution
        self.window = window
        self.attn = WindowAttention(dim, heads, window)
        self.local_conv = Conv2dBN(dim, dim, 3, groups=dim)
        self.mlp = Mlp(dim, dim * mlp_ratio)

    def attend(self, x):
        """Attention within windows of the map, padded with zeros to whole windows."""
        batch, _, dim = x.shape
        side, window = self.resolution, self.window
        pad = -side % window
        count = (side + pad) // window
        x = F.pad(x.view(batch, side, side, dim), (0, 0, 0, pad, 0, pad))
        x = x.view(batch, count, window, count, window, dim).transpose(2, 3)
        x = self.attn(x.reshape(-1, window * window, dim))
        x = x.view(batch, count, count, window, window, dim).transpose(2, 3)
        x = x.reshape(batch, side + pad, side + pad, dim)[:, :side, :side]
        return x.reshape(batch, side * side, dim)

    def forward(self, x):
        x = x + self.attend(x)
        pixels = x.transpose(1, 2).unflatten(2, (self.resolution, self.resolution))
        x = self.local_conv(pixels).flatten(2).transpose(1, 2)
        return x + self.mlp(x)


class BasicLayer(nn.Module):
    def __init__(self, resolution, stage, downsample):
        super().__init__()
        self.blocks = nn.ModuleList(
            TinyViTBlock(resolution, stage["dim"], stage["heads"], stage["window"], stage["mlp_ratio"])
            for _ in range(stage["depth"])
        )
        self.downsample = downsample

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.downsample(x) if self.downsample else x


class ImageEncoder(nn.Module):
    """(B, 3, side, side) to (B, embed_dim, resolution, resolution)."""

    def __init__(self, config):
        super().__init__()
        stages = config["stages"]
        strided = config["stem"] == "strided"
        self.patch_embed = PatchEmbed(config["pixel_channels"], stages[0]["dim"], strided)
        self.layers = nn.ModuleList()
        resolution = config["image_size"] // (4 if strided else 1)
        for i, stage in enumerate(stages):
            downsample = None
            if i + 1 < len(stages):
                downsample = PatchMerging(resolution, stage["dim"], stages[i + 1]["dim"], stage["stride"])
            if stage["kind"] == "conv":
                layer = ConvLayer(stage["dim"], stage["depth"], stage["expand"], downsample)
            else:
                layer = BasicLayer(resolution, stage, downsample)
            self.layers.append(layer)
            resolution = (resolution - 1) // stage.get("stride", 1) + 1
        self.resolution = resolution
        dim = config["embed_dim"]
        self.neck = nn.Sequential(
            nn.Conv2d(stages[-1]["dim"], dim, 1, bias=False),
            LayerNorm2d(dim),
            nn.Conv2d(dim, dim, 3, padding=1, bias=False),
            LayerNorm2d(dim),
        )

    def forward(self, x):
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.neck(x.transpose(1, 2).unflatten(2, (self.resolution, self.resolution)))
