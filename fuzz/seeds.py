#!/usr/bin/env python3
"""Writes small sound inputs for each fuzz target, to begin from.

    .venv/bin/python fuzz/seeds.py FOLDER    # FOLDER/model, FOLDER/archive, ...
"""

import io
import json
import math
import pathlib
import struct
import sys
import zipfile
import zlib

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "converters"), str(ROOT / "converters" / "reference")]

import architecture  # noqa: E402
import convert  # noqa: E402
import encoders  # noqa: E402
import model_file  # noqa: E402
import pruning  # noqa: E402
import quantized  # noqa: E402
import seeded_weights  # noqa: E402

# As small as the architecture goes: a file of some 60 kB, loaded in well under a millisecond.
FLAT = dict(
    image_size=16,
    pixel_channels=3,
    stages=[
        dict(kind="conv", dim=2, depth=1, expand=1, stride=1),
        dict(kind="attention", dim=2, depth=1, heads=1, window=2, mlp_ratio=1),
    ],
    embed_dim=8,
    mask_in_chans=4,
    decoder=dict(depth=1, heads=1, mlp_dim=2, attention_downsample=1, multimask_outputs=1, iou_hidden=2, iou_depth=1),
)
CONFIG = architecture.upgraded(FLAT)
# What is read in floating point always.
KEPT = ("prompt_encoder.",)


EFFICIENTVIT = CONFIG | dict(
    input=encoders.KNOWN["efficientvit"].input_policy(None) | dict(frame=32),
    image_encoder=dict(
        kind="efficientvit", image_size=16, head_dim=2, attention_side=3, neck_depth=1, neck_expand=1, embed_dim=8,
        stages=[
            dict(blocks="residual", dim=2, depth=1, expand=1),
            dict(blocks="fused", dim=2, depth=1, expand=1, merge="fused", merge_expand=1),
            dict(blocks="attention", dim=2, depth=1, expand=1, merge="inverted", merge_expand=1),
        ],
    ),
)


def with_header(path, change):
    """Writes a model file again after `change` was made to its header, a dict."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def as_version_1(header):
    header["__metadata__"] |= dict(format_version="1", model="lite_medsam", config=json.dumps(FLAT))


def in_bf16(header):
    header["__metadata__"]["scheme"] = "*:*:*=bf16"
    for name, entry in header.items():
        if entry.get("dtype") == "F16":
            entry["dtype"] = "BF16"


def in_8_bits(tensors, every=1, with_inputs=False):
    """Every so manieth layer in 8 bits, perhaps with its input, which has factors or a range per channel."""
    held = dict(tensors)
    for name, weight in list(pruning.layers(tensors).items())[::every]:
        if name.startswith(KEPT):
            continue
        whole = np.resize(np.arange(-127, 128, dtype=np.int8), weight.shape)
        scale = np.ones(weight.shape[quantized.out_axis(name)], np.float32)
        ranges = quantized.input_ranges(name, weight.shape)
        taken = quantized.Input((0.5,) * ranges, (128,) * ranges) if with_inputs else None
        held |= quantized.Layer(name, whole, scale, taken).tensors()
        if with_inputs and ranges == 1 and weight.shape[0] % 2 == 0:
            held[f"{name}.input_factor"] = np.ones(weight.shape[1 - quantized.out_axis(name)], np.float32)
    return held


def models(folder):
    tensors, config = convert.convert(seeded_weights.seeded_state(EFFICIENTVIT, 1), EFFICIENTVIT)
    model_file.write(folder / "efficientvit", tensors, config)
    tensors, config = convert.convert(seeded_weights.seeded_state(CONFIG, 1), CONFIG)
    model_file.write(folder / "fp32", tensors, config)
    half = {n: v.astype(np.float16) if v.size > 4 else v for n, v in tensors.items()}
    model_file.write(folder / "fp16", half, config)
    model_file.write(folder / "bf16", half, config)
    with_header(folder / "bf16", in_bf16)
    model_file.write(folder / "version1", tensors, config)
    with_header(folder / "version1", as_version_1)
    model_file.write(folder / "int8_weights", in_8_bits(tensors), config, "*:*:*=int8-weights")
    model_file.write(folder / "int8", in_8_bits(tensors, 3, True), config, "*:*:*=int8")


def few_tensors(folder):
    values = np.float32([[1, 0, 2, 0, 0, 3, 0, 4]] * 3)
    bits = values != 0
    held = {
        "": {"a": values, "b": values.astype(np.float16), "c": np.int8([[1, -127]]), "d": np.uint8([7])},
        "compressed": {"w_values": values[bits], "w_mask": np.packbits(bits, bitorder="little"), "w_scale": values[0]},
        "whole": {"w_values": np.int8([1, 2, 3]), "w_mask": np.uint8([7])},
        "past": {"w_values": np.int8([1, 2, 3]), "w_mask": np.uint8([131])},
    }
    for name, tensors in held.items():
        model_file.write(folder / f"tensors{name}", tensors, CONFIG)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def cases():
    rng = np.random.default_rng(1)
    image, boxes = rng.integers(0, 9, (5, 7, 3), np.uint8), np.array([[1, 1, 5, 4], [0, 0, 7, 5]])
    labels = np.array([[0, 1], [2, 0]])
    yield dict(imgs=image, boxes=boxes, gts=labels.astype(np.uint8), spacing=np.ones(3))
    yield dict(imgs=image[..., 0], boxes=np.zeros((0, 4)), gts=labels > 0, spacing=np.array([1, 2]))
    volume = dict(imgs=image.transpose(2, 0, 1).copy(), boxes=np.array([[1, 1, 0, 5, 4, 2]], np.int16))
    yield volume | dict(gts=labels.astype(np.float32)[None], spacing=np.float32([1, 1, 5]))
    yield dict(imgs=np.asfortranarray(image), boxes=boxes.astype(np.uint64), gts=labels, spacing=np.ones(2))
    points = np.array([[1, 2, 1, 1], [3.5, 4, 0, 2], [0, 0, 1, 3]])
    yield dict(imgs=image, boxes=boxes, points=points, low_res_masks=np.ones((3, 2, 2), np.float32))
    yield dict(imgs=image, points=points[:1].astype(np.int32), low_res_masks=np.zeros((1, 1, 3, 3), np.float32))
    yield dict(imgs=image, points=points[:, :3], boxes=boxes[:1], low_res_masks=np.ones((2, 2, 2), np.float32))
    yield dict(imgs=image[None], boxes=boxes, low_res_masks=np.ones((2, 2), np.float32))
    yield dict(imgs=image, boxes=boxes, low_res_masks=np.ones((3, 2, 2), np.float32))
    yield dict(boxes=np.zeros((0, 4)), low_res_masks=np.ones((2, 2, 2), np.float32))


ARRAYS = ("imgs", "boxes", "gts", "spacing", "points", "low_res_masks")


def archives(folder):
    for number, arrays in enumerate(cases()):
        save = np.savez if number % 2 else np.savez_compressed
        with open(folder / str(number), "wb") as file:
            save(file, **arrays)
    with zipfile.ZipFile(folder / "method", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("imgs.npy", npy(np.zeros((2, 2, 3), np.uint8)))
    header = io.BytesIO()
    shape = (1 << 14, 1 << 14, 3)
    np.lib.format.write_array_header_1_0(header, dict(descr="|u1", fortran_order=False, shape=shape))
    with zipfile.ZipFile(folder / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("imgs.npy", header.getvalue())
    whole = bytearray((folder / "bomb").read_bytes())
    for signature, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):  # to what it claims to be unpacked
        struct.pack_into("<I", whole, whole.index(signature) + offset, len(header.getvalue()) + math.prod(shape))
    (folder / "bomb").write_bytes(whole)


def arrays(folder):
    for number, case in enumerate(cases()):
        parts = [npy(case[name]) if name in case else b"" for name in ARRAYS]
        (folder / str(number)).write_bytes(b"".join(struct.pack("<H", len(p)) + p for p in parts))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def images(folder):
    for color, channels in ((0, 1), (2, 3), (3, 1), (4, 2), (6, 4)):
        for depth in (1, 2, 4, 8, 16):
            if (color != 0 and depth < 8 and color != 3) or (color == 3 and depth == 16):
                continue
            for interlaced in (0, 1):
                row = bytes([depth % 5 if not interlaced else 0]) + bytes(range((9 * channels * depth + 7) // 8))
                passes = 7 if interlaced else 1
                data = zlib.compress(row * 6 * passes)
                header = struct.pack(">IIBBBBB", 9, 6, depth, color, 0, 0, interlaced)
                palette = chunk(b"PLTE", bytes(range(3 * min(2**depth, 16)))) if color == 3 else b""
                more = chunk(b"tRNS", b"\1\2") if color == 0 else chunk(b"gAMA", struct.pack(">I", 45455))
                whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + more + chunk(b"IDAT", data)
                (folder / f"{color}_{depth}_{interlaced}").write_bytes(whole + chunk(b"IEND", b""))


def jpegs(folder):
    """One of the smallest: 8 x 8 pixels, grey or of three channels, whose Huffman tables have one code each."""
    def segment(marker, data):
        return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data

    one_code = bytes([1] + 15 * [0]) + b"\0"
    for channels in (1, 3, 4):
        parts = b"".join(bytes([i + 1, 0x11, 0]) for i in range(channels))
        frame = struct.pack(">BHHB", 8, 8, 8, channels) + parts
        scan = bytes([channels]) + b"".join(bytes([i + 1, 0]) for i in range(channels)) + b"\0\x3f\0"
        tables = segment(0xDB, b"\0" + bytes(range(1, 65))) + segment(0xC4, b"\0" + one_code + b"\x10" + one_code)
        whole = b"\xff\xd8" + tables + segment(0xC0, frame) + segment(0xDA, scan) + b"\x00" + b"\xff\xd9"
        (folder / str(channels)).write_bytes(whole)


def texts(folder):
    ranges = dict(format="microtome ranges", model="0" * 16, observer="mse", cases=3,
                  layers={"image_encoder.neck.0": [-1.5, 2], "mask_decoder.x": [[0, 1e3], [-1, 0.5]],
                          "mask_decoder.y": {"ranges": [[-1, 1]], "factor": [1, 0.5]}})
    (folder / "ranges").write_text("1" + json.dumps(ranges))
    for number, scheme in enumerate(("full", "mix-dwsc", "int8, 0:*:*=fp32, *:*:conv2|local_conv=bf16",
                                     "fp32, !neck:*:proj=int8-weights, 1:0|1:*")):
        (folder / f"scheme{number}").write_text("0" + scheme)


    size = [5, 4]
    segmentations = [[[0.5, 0, 3, 0, 3, 4, 0, 4.2], [1, 1, 2, 1, 2, 2]], dict(size=size, counts=[1, 4, 15]),
                     dict(size=size, counts="14?")]
    annotations = [dict(id=i, image_id=1, category_id=2, area=4.5, bbox=[0, 1, 2.5, 3], iscrowd=i % 2, segmentation=s)
                   for i, s in enumerate(segmentations)]
    instances = dict(images=[dict(id=1, file_name="a/b.png", height=5, width=4)],
                     categories=[dict(id=2, name="x")], annotations=annotations)
    results = [dict(image_id=1, category_id=2, score=0.5, bbox=[0, 1, 2, 3], segmentation=segmentations[2])]
    (folder / "coco").write_text("2" + json.dumps(instances) + "\n" + json.dumps(results))


def checkpoints(folder):
    """What torch.save pickles, without torch: (protocol 2, its globals, persistent storages)."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x10tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x01(K\x02K\x03t(K\x03K\x01t\x89NtR"
    state = b"}(X\x01\0\0\0a" + tensor + b"X\x0a\0\0\0module.b.c" + tensor + b"u"
    (folder / "state").write_bytes(b"\x80\x02" + state + b".")
    beside = b"}(X\x15\0\0\0model.image_encoder.a" + tensor + b"X\x06\0\0\0loss.w" + tensor + b"u"
    (folder / "beside").write_bytes(b"\x80\x02" + beside + b".")
    (folder / "nested").write_bytes(b"\x80\x02}(X\x05\0\0\0modelccollections\nOrderedDict\n)R(X\x01\0\0\0a" +
                                    tensor + b"uX\x04\0\0\0lossG?\xf0\0\0\0\0\0\0u.")
    (folder / "scalar").write_bytes(b"\x80\x02}X\x01\0\0\0xcnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n"
                                    b"(X\x02\0\0\0f8\x89\x88tRU\x08\0\0\0\0\0\0\0\0tRs.")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + state + b".")
        archive.writestr("x/data/0", bytes(64))
        archive.writestr("x/byteorder", b"big")
    (folder / "archive").write_bytes(b"\0" + file.getvalue())


if __name__ == "__main__":
    for name, write in dict(model=models, tensors=few_tensors, archive=archives, arrays=arrays, png=images, jpeg=jpegs,
                            text=texts, checkpoint=checkpoints).items():
        path = pathlib.Path(sys.argv[1]) / name
        path.mkdir(parents=True, exist_ok=True)
        write(path)
