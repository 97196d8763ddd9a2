"""What a checkpoint of a promptable model holds: its configuration, read off the shapes, and every key.

The image encoder's part is in encoders/; SAM's prompt encoder and mask decoder are the same behind all of them.
"""

import copy
import re

import encoders
from shapes import ArchitectureError, Shapes, count, some

# Not visible in any shape: SAM's own value.
DECODER_HEADS = 8
# Kept in some checkpoints and needed by nobody: counters, and indices that follow from the window.
_IGNORED = re.compile(r"(\.num_batches_tracked|\.attention_bias_idxs)$")
_EMBEDDING = re.compile(r"(_embed|_embeddings\.\d+|_token|_tokens)$")
# A convolution and the BatchNorm after it, by the last parts of their names.
_NORM_AFTER = {"c": "bn", "conv": "norm"}


def ignored(name):
    """Whether nobody needs the tensor of this name."""
    known = (encoder.IGNORED for encoder in encoders.KNOWN.values() if encoder.IGNORED)
    return bool(_IGNORED.search(name) or any(pattern.search(name) for pattern in known))


def is_layer(name, ndim):
    """Whether NAME, with a weight of so many dimensions, is a convolution or linear: not a norm, and
    not an embedding."""
    return ndim >= 2 and not _EMBEDDING.search(name)


def norm_after(convolution):
    """The name that a BatchNorm has after a convolution of this name; None where none can be."""
    place, _, last = convolution.rpartition(".")
    return f"{place}.{_NORM_AFTER[last]}" if last in _NORM_AFTER else None


def encoder_of(config):
    """The module of encoders/ that a configuration is of."""
    kind = config["image_encoder"]["kind"]
    if kind not in encoders.KNOWN:
        raise ArchitectureError(f"image encoder {kind!r} is not known: expected {', '.join(encoders.KNOWN)}")
    return encoders.KNOWN[kind]


def model_name(config):
    """What people call the model."""
    return encoder_of(config).model_name(config["image_encoder"])


def infer_config(shapes, image_size=None):
    """The configuration of a state dict, given as {name: shape}, as microtome's model files carry
    it. Raises ArchitectureError where a tensor that it follows from is missing. `image_size` is the side of the
    model's input, where it is not the usual one."""
    known = Shapes(shapes)
    found = [encoder for encoder in encoders.KNOWN.values() if encoder.recognises(shapes)]
    if len(found) != 1:
        what = "the keys of several image encoders" if found else "no known image encoder"
        raise ArchitectureError(
            f"not a checkpoint of a promptable model: {what} ({', '.join(encoders.KNOWN)}); found {some(shapes)}"
        )
    image_encoder = found[0].infer_config(shapes, image_size)
    transformer = "mask_decoder.transformer.layers"
    inner, dim = known.of(f"{transformer}.0.cross_attn_token_to_image.q_proj.weight", 2)
    mlp_dim, _ = known.of(f"{transformer}.0.mlp.lin1.weight", 2)
    iou_hidden, _ = known.of("mask_decoder.iou_prediction_head.layers.0.weight", 2)
    masks, _ = known.of("mask_decoder.mask_tokens.weight", 2)
    mask_in_chans, _, _, _ = known.of("prompt_encoder.mask_downscaling.3.weight", 4)
    return dict(
        input=found[0].input_policy(image_encoder),
        image_encoder=image_encoder,
        mask_in_chans=mask_in_chans,
        decoder=dict(
            depth=count(shapes, transformer + "."),
            heads=DECODER_HEADS,
            mlp_dim=mlp_dim,
            attention_downsample=dim // max(inner, 1),
            multimask_outputs=masks - 1,
            iou_hidden=iou_hidden,
            iou_depth=count(shapes, "mask_decoder.iou_prediction_head.layers."),
            norm_epsilon=found[0].DECODER_NORM_EPSILON,
        ),
    )


def upgraded(flat):
    """The configuration that a model file of version 1 has, which knew LiteMedSAM alone, as it is since."""
    config = copy.deepcopy(flat)
    encoder = dict(kind="tiny_vit", stem="pointwise")
    encoder |= {key: config.pop(key) for key in ("image_size", "pixel_channels", "stages", "embed_dim")}
    decoder = config["decoder"] | dict(norm_epsilon=encoders.KNOWN["tiny_vit"].DECODER_NORM_EPSILON)
    return dict(
        input=encoders.KNOWN["tiny_vit"].input_policy(encoder), image_encoder=encoder,
        mask_in_chans=config["mask_in_chans"], decoder=decoder,
    )


def folded_convolutions(names):
    """The convolutions in a state dict that have a bias and no BatchNorm."""
    names = set(names)
    convolutions = {name.removesuffix(".bias") for name in names if name.endswith(".bias")}
    return {
        name for name in convolutions
        if norm_after(name) and f"{name}.weight" in names and f"{norm_after(name)}.running_mean" not in names
    }


def expected_shapes(config, folded=()):
    """{name: shape} of every tensor in the state dict of a model of this configuration, in which
    the convolutions `folded` have a bias and no BatchNorm."""
    shapes = encoder_of(config).expected_shapes(config["image_encoder"], folded)
    dim = config["image_encoder"]["embed_dim"]

    def affine(name, *weight, bias=True):
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    def prompts():
        name, channels = "prompt_encoder", config["mask_in_chans"]
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
            affine(f"{name}.{part}", inner, dim)
        affine(f"{name}.out_proj", dim, inner)

    def decoder():
        name, d = "mask_decoder", config["decoder"]
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
