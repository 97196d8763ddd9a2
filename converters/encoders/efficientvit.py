"""EfficientViT, as EfficientViT-SAM L0 to XL1 have it."""

from shapes import Shapes, count

KIND = "efficientvit"
# The model zoo sets the epsilon of every BatchNorm and LayerNorm to this, the decoder's included.
BATCH_NORM_EPSILON = 1e-6
DECODER_NORM_EPSILON = 1e-6
IGNORED = None
HEAD_DIM = 32
NAME = "image_encoder"
STAGES = f"{NAME}.backbone.stages."
NECK = f"{NAME}.neck"
# What people call them, by blocks after the first of every stage and of the neck.
NAMES = {
    (1, 1, 1, 4, 4, 4): "l0", (1, 1, 1, 6, 6, 8): "l1", (1, 2, 2, 8, 8, 12): "l2",
    (0, 1, 1, 2, 3, 3, 6): "xl0", (1, 2, 2, 4, 6, 6, 12): "xl1",
}


def recognises(shapes):
    return f"{STAGES}0.op_list.0.conv.weight" in shapes and f"{NECK}.input_ops.0.op_list.0.conv.weight" in shapes


def _stage(known, shapes, i):
    """One stage: its first block tells how it merges, its second what the others are."""
    first, second = (f"{STAGES}{i}.op_list.{j}" for j in (0, 1))
    depth = count(shapes, f"{STAGES}{i}.op_list.") - 1
    if i == 0:
        dim = known.of(f"{first}.conv.weight", 4)[0]
        return dict(blocks="residual", dim=dim, depth=depth, expand=1)
    if f"{first}.main.spatial_conv.conv.weight" in shapes:
        merge = "fused"
        hidden, before, _, _ = known.of(f"{first}.main.spatial_conv.conv.weight", 4)
    else:
        merge = "inverted"
        hidden, before, _, _ = known.of(f"{first}.main.inverted_conv.conv.weight", 4)
    dim = known.of(f"{first}.main.point_conv.conv.weight", 4)[0]
    stage = dict(blocks=merge, dim=dim, depth=depth, expand=1, merge=merge, merge_expand=hidden // before)
    if depth:
        if f"{second}.context_module.main.qkv.conv.weight" in shapes:
            stage["blocks"] = "attention"
            inner = f"{second}.local_module.main.inverted_conv.conv.weight"
        else:
            part = "spatial_conv" if f"{second}.main.spatial_conv.conv.weight" in shapes else "inverted_conv"
            stage["blocks"] = "fused" if part == "spatial_conv" else "inverted"
            inner = f"{second}.main.{part}.conv.weight"
        stage["expand"] = known.of(inner, 4)[0] // dim
    return stage


def infer_config(shapes, side=None):
    known = Shapes(shapes)
    total = count(shapes, STAGES)
    stages = [_stage(known, shapes, i) for i in range(total)]
    attends = next((i for i, s in enumerate(stages) if s["blocks"] == "attention"), None)
    gather = 3
    if attends is not None:
        gather = known.of(f"{STAGES}{attends}.op_list.1.context_module.main.aggreg.0.0.weight", 4)[2]
    hidden, dim, _, _ = known.of(f"{NECK}.middle.op_list.0.main.spatial_conv.conv.weight", 4)
    return dict(
        kind=KIND,
        image_size=side or (512 if total == 5 else 1024),
        stages=stages,
        head_dim=HEAD_DIM,
        attention_side=gather,
        neck_depth=count(shapes, f"{NECK}.middle.op_list."),
        neck_expand=hidden // dim,
        embed_dim=dim,
    )


def input_policy(config):
    return dict(
        frame=1024, resize="antialiased", normalize="statistics",
        mean=[123.675, 116.28, 103.53], deviation=[58.395, 57.12, 57.375], coordinates="exact",
    )


def model_name(config):
    depths = (*(stage["depth"] for stage in config["stages"]), config["neck_depth"])
    return "efficientvit_sam" + (f"_{NAMES[depths]}" if depths in NAMES else "")


def expected_shapes(config, folded=()):
    shapes = {}

    def conv_norm(name, out, channels, kernel):
        shapes[f"{name}.conv.weight"] = (out, channels, kernel, kernel)
        if f"{name}.conv" in folded:
            shapes[f"{name}.conv.bias"] = (out,)
            return
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.norm.{part}"] = (out,)

    def conv_bias(name, out, channels, kernel):
        shapes[f"{name}.conv.weight"] = (out, channels, kernel, kernel)
        shapes[f"{name}.conv.bias"] = (out,)

    def fused(name, channels, hidden, out):
        conv_norm(f"{name}.spatial_conv", hidden, channels, 3)
        conv_norm(f"{name}.point_conv", out, hidden, 1)

    def inverted(name, channels, hidden, out):
        conv_bias(f"{name}.inverted_conv", hidden, channels, 1)
        conv_bias(f"{name}.depth_conv", hidden, 1, 3)
        conv_norm(f"{name}.point_conv", out, hidden, 1)

    def attention(name, dim):
        side, head = config["attention_side"], config["head_dim"]
        shapes[f"{name}.qkv.conv.weight"] = (3 * dim, dim, 1, 1)
        shapes[f"{name}.aggreg.0.0.weight"] = (3 * dim, 1, side, side)
        shapes[f"{name}.aggreg.0.1.weight"] = (3 * dim, head, 1, 1)
        conv_norm(f"{name}.proj", dim, 2 * dim, 1)

    before = None
    for i, stage in enumerate(config["stages"]):
        dim, hidden = stage["dim"], stage["dim"] * stage["expand"]
        if before is None:
            conv_norm(f"{STAGES}{i}.op_list.0", dim, 3, 3)
        else:
            merge = fused if stage["merge"] == "fused" else inverted
            merge(f"{STAGES}{i}.op_list.0.main", before, before * stage["merge_expand"], dim)
        for j in range(1, stage["depth"] + 1):
            block = f"{STAGES}{i}.op_list.{j}"
            if stage["blocks"] == "residual":
                conv_norm(f"{block}.main.conv1", dim, dim, 3)
                conv_norm(f"{block}.main.conv2", dim, dim, 3)
            elif stage["blocks"] == "fused":
                fused(f"{block}.main", dim, hidden, dim)
            elif stage["blocks"] == "inverted":
                inverted(f"{block}.main", dim, hidden, dim)
            else:
                attention(f"{block}.context_module.main", dim)
                inverted(f"{block}.local_module.main", dim, hidden, dim)
        before = dim
    embed = config["embed_dim"]
    for i, stage in enumerate(config["stages"][:-4:-1]):
        conv_norm(f"{NECK}.input_ops.{i}.op_list.0", embed, stage["dim"], 1)
    for i in range(config["neck_depth"]):
        fused(f"{NECK}.middle.op_list.{i}.main", embed, embed * config["neck_expand"], embed)
    conv_bias(f"{NECK}.output_ops.0.op_list.0", embed, embed, 1)
    shapes[f"{NAME}.norm.weight"] = shapes[f"{NAME}.norm.bias"] = (embed,)
    return shapes
