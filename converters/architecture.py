"""What a LiteMedSAM checkpoint holds: its configuration, read off the shapes, and every key."""

import math
import re


class ArchitectureError(Exception):
    """The tensors are not those of a LiteMedSAM. The message names them."""


# Not visible in any shape: LiteMedSAM's own values.
DECODER_HEADS = 8
# TinyViT's patch merging keeps the resolution where it merges into one of these widths.
DIMS_WITHOUT_STRIDE = (320, 448, 576)
# Kept in some checkpoints and needed by nobody: counters, and indices that follow from the window.
IGNORED = re.compile(r"(\.num_batches_tracked|\.attention_bias_idxs)$")
_EMBEDDING = re.compile(r"(_embed|_embeddings\.\d+|_token|_tokens)$")


def is_layer(name, ndim):
    """Whether NAME, with a weight of so many dimensions, is a convolution or linear: not a norm, and
    not an embedding."""
    return ndim >= 2 and not _EMBEDDING.search(name)


def _depth(names, prefix):
    """How many of `prefix`0, `prefix`1, ... there are."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    found = {int(m.group(1)) for m in map(pattern.match, names) if m}
    return len(found)


def _some(names, most=4):
    """A few of many names, for a message."""
    shown = ", ".join(map(repr, list(names)[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "no tensors"


def infer_config(shapes, image_size=256):
    """The configuration of a state dict, given as {name: shape}, as microtome's model files carry
    it. Raises ArchitectureError where a tensor that it follows from is missing."""

    def shape(name, rank):
        found = shapes.get(name)
        if found is None:
            raise ArchitectureError(f"not a LiteMedSAM checkpoint: {name!r} is missing; found {_some(shapes)}")
        if len(found) != rank:
            raise ArchitectureError(f"{name!r} has shape {tuple(found)}, expected {rank} dimensions")
        return found

    stages = []
    count = _depth(shapes, "image_encoder.layers.")
    if count == 0:
        raise ArchitectureError(f"not a LiteMedSAM checkpoint: no image_encoder.layers.*; found {_some(shapes)}")
    for i in range(count):
        layer = f"image_encoder.layers.{i}"
        block = f"{layer}.blocks.0"
        depth = _depth(shapes, f"{layer}.blocks.")
        if f"{block}.conv1.c.weight" in shapes:
            hidden, dim, _, _ = shape(f"{block}.conv1.c.weight", 4)
            stage = dict(kind="conv", dim=dim, depth=depth, expand=hidden // dim)
        else:
            heads, biases = shape(f"{block}.attn.attention_biases", 2)
            _, dim = shape(f"{block}.attn.qkv.weight", 2)
            hidden, _ = shape(f"{block}.mlp.fc1.weight", 2)
            stage = dict(kind="attention", dim=dim, depth=depth, heads=heads,
                         window=math.isqrt(biases), mlp_ratio=hidden // dim)
        if i + 1 < count:
            out, _, _, _ = shape(f"{layer}.downsample.conv1.c.weight", 4)
            stage["stride"] = 1 if out in DIMS_WITHOUT_STRIDE else 2
        stages.append(stage)

    dim, _, _, _ = shape("image_encoder.neck.0.weight", 4)
    transformer = "mask_decoder.transformer.layers"
    inner, _ = shape(f"{transformer}.0.cross_attn_token_to_image.q_proj.weight", 2)
    mlp_dim, _ = shape(f"{transformer}.0.mlp.lin1.weight", 2)
    iou_hidden, _ = shape("mask_decoder.iou_prediction_head.layers.0.weight", 2)
    masks, _ = shape("mask_decoder.mask_tokens.weight", 2)
    mask_in_chans, _, _, _ = shape("prompt_encoder.mask_downscaling.3.weight", 4)
    return dict(
        image_size=image_size,
        pixel_channels=shape("image_encoder.patch_embed.seq.0.c.weight", 4)[1],
        stages=stages,
        embed_dim=dim,
        mask_in_chans=mask_in_chans,
        decoder=dict(
            depth=_depth(shapes, transformer + "."),
            heads=DECODER_HEADS,
            mlp_dim=mlp_dim,
            attention_downsample=dim // max(inner, 1),
            multimask_outputs=masks - 1,
            iou_hidden=iou_hidden,
            iou_depth=_depth(shapes, "mask_decoder.iou_prediction_head.layers."),
        ),
    )


def folded_convolutions(names):
    """The convolutions in a state dict whose BatchNorm has been folded into their weight and bias."""
    names = set(names)
    return {
        name.removesuffix(".c.bias")
        for name in names
        if name.endswith(".c.bias") and name.removesuffix("c.bias") + "bn.weight" not in names
    }


def expected_shapes(config, folded=()):
    """{name: shape} of every tensor in the state dict of a LiteMedSAM of this configuration, in which
    the convolutions `folded` have a bias and no BatchNorm."""
    shapes = {}

    def conv_bn(name, out, channels, kernel):
        shapes[f"{name}.c.weight"] = (out, channels, kernel, kernel)
        if name in folded:
            shapes[f"{name}.c.bias"] = (out,)
            return
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.bn.{part}"] = (out,)

    def affine(name, *weight, bias=True):
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    def encoder():
        name = "image_encoder"
        stages = config["stages"]
        first = stages[0]["dim"]
        conv_bn(f"{name}.patch_embed.seq.0", first // 2, config["pixel_channels"], 1)
        conv_bn(f"{name}.patch_embed.seq.2", first, first // 2, 1)
        for i, stage in enumerate(stages):
            dim = stage["dim"]
            for j in range(stage["depth"]):
                block = f"{name}.layers.{i}.blocks.{j}"
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
                merge, out = f"{name}.layers.{i}.downsample", stages[i + 1]["dim"]
                conv_bn(f"{merge}.conv1", out, dim, 1)
                conv_bn(f"{merge}.conv2", out, 1, 3)
                conv_bn(f"{merge}.conv3", out, out, 1)
        embed = config["embed_dim"]
        affine(f"{name}.neck.0", embed, stages[-1]["dim"], 1, 1, bias=False)
        affine(f"{name}.neck.1", embed)
        affine(f"{name}.neck.2", embed, embed, 3, 3, bias=False)
        affine(f"{name}.neck.3", embed)

    def prompts():
        name, dim, channels = "prompt_encoder", config["embed_dim"], config["mask_in_chans"]
        shapes[f"{name}.pe_layer.positional_encoding_gaussian_matrix"] = (2, dim // 2)
        for i in range(4):
            affine(f"{name}.point_embeddings.{i}", 1, dim, bias=False)
        affine(f"{name}.not_a_point_embed", 1, dim, bias=False)
        affine(f"{name}.no_mask_embed", 1, dim, bias=False)
        affine(f"{name}.mask_downscaling.0", channels // 4, 1, 2, 2)
        affine(f"{name}.mask_downscaling.1", channels // 4)
        affine(f"{name}.mask_downscaling.3", channels, channels // 4, 2, 2)
        affine(f"{name}.mask_downscaling.4", channels)
        affine(f"{name}.mask_downscaling.6", dim, channels, 1, 1)

    def attention(name, inner):
        for part in ("q_proj", "k_proj", "v_proj"):
            affine(f"{name}.{part}", inner, config["embed_dim"])
        affine(f"{name}.out_proj", config["embed_dim"], inner)

    def decoder():
        name, dim, d = "mask_decoder", config["embed_dim"], config["decoder"]
        inner = dim // d["attention_downsample"]
        for i in range(d["depth"]):
            layer = f"{name}.transformer.layers.{i}"
            attention(f"{layer}.self_attn", dim)
            attention(f"{layer}.cross_attn_token_to_image", inner)
            attention(f"{layer}.cross_attn_image_to_token", inner)
            for norm in ("norm1", "norm2", "norm3", "norm4"):
                affine(f"{layer}.{norm}", dim)
            affine(f"{layer}.mlp.lin1", d["mlp_dim"], dim)
            affine(f"{layer}.mlp.lin2", dim, d["mlp_dim"])
        attention(f"{name}.transformer.final_attn_token_to_image", inner)
        affine(f"{name}.transformer.norm_final_attn", dim)
        affine(f"{name}.iou_token", 1, dim, bias=False)
        affine(f"{name}.mask_tokens", d["multimask_outputs"] + 1, dim, bias=False)
        for i, (before, after) in {0: (dim, dim // 4), 3: (dim // 4, dim // 8)}.items():
            shapes[f"{name}.output_upscaling.{i}.weight"] = (before, after, 2, 2)
            shapes[f"{name}.output_upscaling.{i}.bias"] = (after,)
        affine(f"{name}.output_upscaling.1", dim // 4)
        for i in range(d["multimask_outputs"] + 1):
            for j, out in enumerate((dim, dim, dim // 8)):
                affine(f"{name}.output_hypernetworks_mlps.{i}.layers.{j}", out, dim)
        for j in range(d["iou_depth"]):
            out = d["multimask_outputs"] + 1 if j + 1 == d["iou_depth"] else d["iou_hidden"]
            affine(f"{name}.iou_prediction_head.layers.{j}", out, dim if j == 0 else d["iou_hidden"])

    encoder()
    prompts()
    decoder()
    return shapes


def check(shapes, config):
    """Raises ArchitectureError naming every missing, unexpected and mis-shaped tensor."""
    expected = expected_shapes(config, folded_convolutions(shapes))
    problems = [f"missing: {n} {s}" for n, s in expected.items() if n not in shapes]
    problems += [f"unexpected: {n} {tuple(s)}" for n, s in shapes.items() if n not in expected]
    problems += [
        f"mis-shaped: {n} is {tuple(shapes[n])}, expected {s}"
        for n, s in expected.items()
        if n in shapes and tuple(shapes[n]) != s
    ]
    if problems:
        shown = problems[:40] + ([f"and {len(problems) - 40} more"] if len(problems) > 40 else [])
        raise ArchitectureError("the checkpoint's tensors do not fit:\n  " + "\n  ".join(shown))
