#!/usr/bin/env python3
"""Makes the files in tests/data: small models with seeded weights, what the PyTorch reference
answers for it, and what OpenCV and Pillow make of some images. Needs PyTorch, OpenCV and Pillow 12; run by hand when the
data has to change.

The model is small, but no size in it is round: its maps of 52 x 52, 26 x 26 and 13 x 13 tokens leave
every kind of partial window.
"""

import pathlib
import sys
import zipfile

import cv2
import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
sys.path[:0] = [str(ROOT / "converters" / part) for part in ("", "reference")]

import architecture  # noqa: E402
import convert  # noqa: E402
import encoders  # noqa: E402
import model_file  # noqa: E402
import sam  # noqa: E402
import seeded_weights  # noqa: E402

CONFIG = architecture.upgraded(dict(
    image_size=52,
    pixel_channels=3,
    stages=[
        dict(kind="conv", dim=12, depth=2, expand=3, stride=2),
        dict(kind="attention", dim=20, depth=2, heads=5, window=7, mlp_ratio=2, stride=2),
        dict(kind="attention", dim=28, depth=3, heads=4, window=5, mlp_ratio=3, stride=1),
        dict(kind="attention", dim=36, depth=1, heads=3, window=14, mlp_ratio=4),
    ],
    embed_dim=32,
    mask_in_chans=12,
    decoder=dict(depth=2, heads=8, mlp_dim=70, attention_downsample=2, multimask_outputs=3,
                 iou_hidden=40, iou_depth=3),
))
# Frame and input differ, as in EfficientViT-SAM; one stage of each kind.
EFFICIENTVIT = CONFIG | dict(
    input=encoders.KNOWN["efficientvit"].input_policy(None) | dict(frame=104),
    image_encoder=dict(
        kind="efficientvit",
        image_size=48,
        stages=[
            dict(blocks="residual", dim=18, depth=1, expand=1),
            dict(blocks="fused", dim=20, depth=1, expand=3, merge="fused", merge_expand=5),
            dict(blocks="inverted", dim=24, depth=1, expand=2, merge="inverted", merge_expand=4),
            dict(blocks="attention", dim=28, depth=2, expand=3, merge="inverted", merge_expand=6),
        ],
        head_dim=7,
        attention_side=5,
        neck_depth=2,
        neck_expand=1,
        embed_dim=32,
    ),
    decoder=CONFIG["decoder"] | dict(norm_epsilon=1e-6),
)
MODELS = {"tiny": (CONFIG, 3), "tiny_efficientvit": (EFFICIENTVIT, 4)}  # and the seeds of their weights
RESIZES = [  # height, width, channels: fractions, whole factors, growing, and the thinnest
    (97, 131, 3), (261, 173, 1), (104, 104, 3), (208, 156, 1), (156, 104, 3), (52, 52, 3),
    (31, 45, 3), (51, 52, 1), (7, 5, 3), (1, 300, 1), (300, 1, 3), (1, 1, 3),
]


def traced_modules(model):
    """Every block, merging and neck layer, and the parts of one of each kind."""
    parts = ["layers.1.downsample", "layers.2.blocks.1"]
    names = [f"{p}.{q}" for p in parts for q in ("conv1", "conv2", "conv3", "local_conv", "mlp")]
    names += ["patch_embed"] + [f"neck.{i}" for i in range(4)]
    for i, stage in enumerate(CONFIG["image_encoder"]["stages"]):
        names += [f"layers.{i}.blocks.{j}" for j in range(stage["depth"])] + [f"layers.{i}.downsample"]
    present = {name for name, _ in model.image_encoder.named_modules()}
    return [f"image_encoder.{name}" for name in names if name in present]


def make_golden(model, names, boxes):
    rng = np.random.default_rng(7)
    config = model.config
    side, mask_side = config["image_encoder"]["image_size"], 4 * model.image_encoder.resolution
    golden = {"image": rng.uniform(0, 1, (1, 3, side, side)).astype(np.float32)}
    for name in names:
        def keep(_, __, output, name=name):
            golden[f"module.{name}"] = output.numpy()
        model.get_submodule(name).register_forward_hook(keep)

    boxes = np.array(boxes)
    points = np.array([[[13.0, 20.0], [40.0, 7.0], [22.0, 50.0]]], np.float32)
    labels = np.array([[1, 0, 1]])
    mask = rng.normal(0, 4, (1, 1, mask_side, mask_side)).astype(np.float32)
    with torch.no_grad():
        embedding = model.image_encoder(torch.tensor(golden["image"]))
        golden["image_embedding"] = embedding.numpy()
        golden["dense_position"] = model.prompt_encoder.dense_position().numpy()

        def answer(name, multimask, **prompts):
            masks, iou = model.decode(embedding, multimask, **prompts)
            golden[f"{name}.low_res_masks"] = masks.numpy()
            golden[f"{name}.iou_predictions"] = iou.numpy()

        box, point, label = torch.tensor(boxes).float(), torch.tensor(points), torch.tensor(labels)
        answer("boxes", False, boxes=box)
        answer("multimask", True, boxes=box[:1])
        answer("points", True, points=point, labels=label)
        answer("points_mask", False, points=point, labels=label, masks=torch.tensor(mask))
        answer("points_box_mask", True, points=point, labels=label, boxes=box[1:2],
               masks=torch.tensor(mask))
    golden |= {"box_prompts": boxes.astype(np.float32), "point_prompts": points[0],
               "point_labels": labels[0].astype(np.float32), "mask_prompt": mask}
    return golden


def make_resizes():
    rng = np.random.default_rng(11)
    side = CONFIG["image_encoder"]["image_size"]
    arrays = {}
    for height, width, channels in RESIZES:
        image = rng.integers(0, 256, (height, width, channels), np.uint8)
        scale = side / max(height, width)
        size = max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        name = f"{height}x{width}x{channels}"
        arrays[f"{name}.image"] = image
        arrays[f"{name}.resized"] = small.reshape(size[1], size[0], channels)
    return arrays


def make_bomb(path):
    """An archive of 20 kB whose array unpacks to 20 MB of zeros, and says that it is 8 GB."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (2000, 2000, 2000), }"
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    npy = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    np.savez(path, boxes=np.array([[1, 1, 1, 9, 9, 3]]))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("imgs.npy", npy + bytes(20_000_000))


def make_antialiased():
    """What Pillow makes of images: shrunk, enlarged, one axis alone."""
    # Imported here: tests take this module's configurations, and have no Pillow.
    import PIL.Image

    rng = np.random.default_rng(12)
    arrays = {}
    for i, (before, after) in enumerate(((( 97, 131), (38, 52)), ((31, 45), (36, 52)), ((20, 33), (20, 52)),
                                         ((1, 60), (1, 52)), ((300, 7), (52, 1)))):
        for channels in (1, 3):
            image = rng.integers(0, 256, (*before, channels), np.uint8)
            resized = PIL.Image.fromarray(image.squeeze(2) if channels == 1 else image)
            resized = np.asarray(resized.resize(after[::-1], PIL.Image.Resampling.BILINEAR))
            arrays[f"{i}x{channels}.image"] = image
            arrays[f"{i}x{channels}.resized"] = resized.reshape(*after, channels)
    return arrays


def make_model(name, boxes, names, write):
    """NAME.safetensors, a model with seeded weights, and NAME_golden.npz, what PyTorch answers for it."""
    config, seed = MODELS[name]
    state = seeded_weights.seeded_state(config, seed)
    tensors, config = convert.convert(state, config)
    if write:
        model_file.write(DATA / f"{name}.safetensors", tensors, config)
    model = sam.Sam(config).eval()
    missing, unexpected = model.load_state_dict(
        {k: torch.tensor(v) for k, v in state.items()}, strict=False)
    assert not unexpected and all(k.endswith("num_batches_tracked") for k in missing)
    np.savez_compressed(DATA / f"{name}_golden.npz", **make_golden(model, names(model), boxes))


def main():
    DATA.mkdir(exist_ok=True)
    # tiny.safetensors stays as it is: a file of version 1, which this converter no longer writes.
    make_model("tiny", [[3, 5, 30, 41], [10, 0, 51, 22], [0, 0, 52, 52], [20, 20, 24, 23], [7, 9, 8, 10]],
               traced_modules, write=False)
    stages = "image_encoder.backbone.stages"
    make_model("tiny_efficientvit", [[6, 10, 60, 82], [20.5, 0, 102, 44.25]],
               lambda model: [f"{stages}.{i}" for i in range(4)] + [
                   f"{stages}.3.op_list.1.context_module", f"{stages}.3.op_list.1", "image_encoder.neck"], write=True)
    np.savez_compressed(DATA / "resize.npz", **make_resizes())
    np.savez_compressed(DATA / "resize_antialiased.npz", **make_antialiased())
    numbers = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    np.savez(DATA / "column_major.npz", a=np.asfortranarray(numbers))
    make_bomb(DATA / "bomb.npz")
    for file in sorted(DATA.iterdir()):
        print(f"{file.name}: {file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
