"""TinyViT, as LiteMedSAM and MobileSAM have it."""

import math
import re

from shapes import Shapes, count

KIND = "tiny_vit"
BATCH_NORM_EPSILON = 1e-5
DECODER_NORM_EPSILON = 1e-5
# The head of the classifier that MobileSAM's encoder once was.
IGNORED = re.compile(r"^image_encoder\.(norm_head|head)\.")
# Patch merging keeps the resolution where it merges into one of these widths.
DIMS_WITHOUT_STRIDE = (320, 448, 576)
NAME = "image_encoder"


def recognises(shapes):
    return f"{NAME}.patch_embed.seq.0.c.weight" in shapes and count(shapes, f"{NAME}.layers.") > 0


def infer_config(shapes, side=None):
    known = Shapes(shapes)
    stages = []
    total = count(shapes, f"{NAME}.layers.")
    for i in range(total):
        layer = f"{NAME}.layers.{i}"
        block = f"{layer}.blocks.0"
        depth = count(shapes, f"{layer}.blocks.")
        if f"{block}.conv1.c.weight" in shapes:
            hidden, dim, _, _ = known.of(f"{block}.conv1.c.weight", 4)
            stage = dict(kind="conv", dim=dim, depth=depth, expand=hidden // dim)
        else:
            heads, biases = known.of(f"{block}.attn.attention_biases", 2)
            _, dim = known.of(f"{block}.attn.qkv.weight", 2)
            hidden, _ = known.of(f"{block}.mlp.fc1.weight", 2)
            stage = dict(kind="attention", dim=dim, depth=depth, heads=heads,
                         window=math.isqrt(biases), mlp_ratio=hidden // dim)
        if i + 1 < total:
            out, _, _, _ = known.of(f"{layer}.downsample.conv1.c.weight", 4)
            stage["stride"] = 1 if out in DIMS_WITHOUT_STRIDE else 2
        stages.append(stage)
    _, channels, kernel, _ = known.of(f"{NAME}.patch_embed.seq.0.c.weight", 4)
    dim, _, _, _ = known.of(f"{NAME}.neck.0.weight", 4)
    strided = kernel == 3
    return dict(
        kind=KIND,
        image_size=side or (1024 if strided else 256),
        pixel_channels=channels,
        stem="strided" if strided else "pointwise",
        stages=stages,
        embed_dim=dim,
    )


def input_policy(config):
    if config["stem"] == "pointwise":
        return dict(frame=config["image_size"], resize="area", normalize="range", coordinates="truncated")
    return dict(
        frame=config["image_size"], resize="antialiased", normalize="statistics",
        mean=[123.675, 116.28, 103.53], deviation=[58.395, 57.12, 57.375], coordinates="exact",
    )


def model_name(config):
    return "lite_medsam" if config["stem"] == "pointwise" else "mobile_sam"


def expected_shapes(config, folded=()):
    shapes = {}

    def conv_bn(name, out, channels, kernel):
        shapes[f"{name}.c.weight"] = (out, channels, kernel, kernel)
        if f"{name}.c" in folded:
            shapes[f"{name}.c.bias"] = (out,)
            return
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = (out,)

    def affine(name, *weight, bias=True):
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    stages = config["stages"]
    first = stages[0]["dim"]
    kernel = 3 if config["stem"] == "strided" else 1
    conv_bn(f"{NAME}.patch_embed.seq.0", first // 2, config["pixel_channels"], kernel)
    conv_bn(f"{NAME}.patch_embed.seq.2", first, first // 2, kernel)
    for i, stage in enumerate(stages):
        dim = stage["dim"]
        for j in range(stage["depth"]):
            block = f"{NAME}.layers.{i}.blocks.{j}"
            if stage["kind"] == "conv":
                hidden = dim * stage["expand"]
                conv_bn(f"{block}.conv1", hidden, dim, 1)
                conv_bn(f"{block}.conv2", hidden, 1, 3)
                conv_bn(f"{block}.conv3", dim, hidden, 1)
            else:
                hidden = dim * stage["mlp_ratio"]
                shapes[f"{block}.attn.attention_biases"] = (stage["heads"], stage["window"] ** 2)
                affine(f"{block}.attn.norm", dim)
                affine(f"{block}.attn.qkv", 3 * dim, dim)
                affine(f"{block}.attn.proj", dim, dim)
                affine(f"{block}.mlp.norm", dim)
                affine(f"{block}.mlp.fc1", hidden, dim)
                affine(f"{block}.mlp.fc2", dim, hidden)
                conv_bn(f"{block}.local_conv", dim, 1, 3)
        if i + 1 < len(stages):
            merge, out = f"{NAME}.layers.{i}.downsample", stages[i + 1]["dim"]
            conv_bn(f"{merge}.conv1", out, dim, 1)
            conv_bn(f"{merge}.conv2", out, 1, 3)
            conv_bn(f"{merge}.conv3", out, out, 1)
    embed = config["embed_dim"]
    affine(f"{NAME}.neck.0", embed, stages[-1]["dim"], 1, 1, bias=False)
    affine(f"{NAME}.neck.1", embed)
    affine(f"{NAME}.neck.2", embed, embed, 3, 3, bias=False)
    affine(f"{NAME}.neck.3", embed)
    return shapes
