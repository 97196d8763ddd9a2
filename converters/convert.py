#!/usr/bin/env python3
"""Converts a LiteMedSAM checkpoint (.pth) into a model file for microtome (.safetensors).

Needs NumPy, not PyTorch. Nothing in the checkpoint is executed: see checkpoint.py.
"""

import argparse
import sys

import numpy as np

import architecture
import checkpoint
import model_file

BATCH_NORM_EPSILON = 1e-5


def fold_batch_norm(tensors):
    """Replaces every convolution and BatchNorm pair (`NAME.c`, `NAME.bn`) by the one convolution
    with bias that computes the same, folded in double precision:

        w' = w * gamma / sqrt(var + eps),    b' = beta - mean * gamma / sqrt(var + eps)
    """
    folded = {}
    for name, value in tensors.items():
        if ".bn." in name:
            continue
        norm = name.removesuffix("c.weight") + "bn."
        if not name.endswith(".c.weight") or norm + "weight" not in tensors:
            folded[name] = value
            continue
        gamma, beta, mean, variance = (
            tensors[norm + part].astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        if (variance < 0).any():
            raise architecture.ArchitectureError(f"{norm}running_var has negative values")
        scale = gamma / np.sqrt(variance + BATCH_NORM_EPSILON)
        folded[name] = (value * scale[:, None, None, None]).astype(np.float32)
        folded[name.removesuffix("weight") + "bias"] = (beta - mean * scale).astype(np.float32)
    return folded


def halve(tensors, least=4096):
    """Stores tensors of at least `least` elements, which are nearly all there is, as 16-bit floats.
    Biases and norms stay fp32."""
    halved = {}
    for name, value in tensors.items():
        if value.size >= least:
            largest = np.abs(value).max()
            if largest > np.finfo(np.float16).max:
                raise architecture.ArchitectureError(f"{name} has values of {largest:.3g}, too large for fp16")
            value = value.astype(np.float16)
        halved[name] = value
    return halved


def convert(state, config=None, image_size=256):
    """Turns a state dict {name: array} into the tensors and the configuration of a model file. The
    configuration is read off the shapes unless it is given."""
    state = {n: v for n, v in state.items() if not architecture.IGNORED.search(n)}
    shapes = {name: value.shape for name, value in state.items()}
    config = config or architecture.infer_config(shapes, image_size)
    architecture.check(shapes, config)
    for name, value in state.items():
        if value.dtype.kind != "f":
            raise architecture.ArchitectureError(f"{name} has dtype {value.dtype}, expected floats")
        if not np.isfinite(value).all():
            raise architecture.ArchitectureError(f"{name} holds NaN or infinite values")
    tensors = fold_batch_norm({n: v.astype(np.float32) for n, v in state.items()})
    return tensors, config


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help=".pth file, as torch.save writes it")
    parser.add_argument("-o", "--output", required=True, help=".safetensors file to write")
    parser.add_argument(
        "--image-size", type=int, default=256, help="side of the model's input (%(default)s)"
    )
    parser.add_argument(
        "--storage", choices=("fp32", "fp16"), default="fp32",
        help="fp16: half the file; weights are widened when it is loaded (%(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        tensors, config = convert(
            checkpoint.load(options.checkpoint), image_size=options.image_size
        )
        if options.storage == "fp16":
            tensors = halve(tensors)
        model_file.write(options.output, tensors, config)
    except (checkpoint.CheckpointError, architecture.ArchitectureError, OSError) as error:
        print(f"convert.py: {options.checkpoint}: {error}", file=sys.stderr)
        return 1
    parameters = sum(v.size for v in tensors.values())
    print(f"{options.output}: {len(tensors)} tensors, {parameters / 1e6:.2f} M parameters, {options.storage}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
