#!/usr/bin/env python3
"""Writes a model file of LiteMedSAM's full architecture with seeded random weights.

It runs as fast as a trained model, and its masks mean nothing. Needs NumPy alone.
"""

import argparse
import math
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import architecture  # noqa: E402
import convert  # noqa: E402
import model_file  # noqa: E402

LITE_MEDSAM = architecture.upgraded(dict(
    image_size=256,
    pixel_channels=3,
    stages=[
        dict(kind="conv", dim=64, depth=2, expand=4, stride=2),
        dict(kind="attention", dim=128, depth=2, heads=4, window=7, mlp_ratio=4, stride=2),
        dict(kind="attention", dim=160, depth=6, heads=5, window=14, mlp_ratio=4, stride=1),
        dict(kind="attention", dim=320, depth=2, heads=10, window=7, mlp_ratio=4),
    ],
    embed_dim=256,
    mask_in_chans=16,
    decoder=dict(depth=2, heads=8, mlp_dim=2048, attention_downsample=2, multimask_outputs=3,
                 iou_hidden=256, iou_depth=3),
))


def seeded_state(config, seed):
    """A state dict {name: array} in which activations keep a sensible size from layer to layer."""
    rng = np.random.default_rng(seed)

    def fill(name, shape):
        if name.endswith("running_var"):
            return rng.uniform(0.5, 1.5, shape)
        if "norm" in name or ".bn." in name or ".neck.1" in name or ".neck.3" in name:
            return rng.normal(1 if name.endswith("weight") else 0, 0.1, shape)
        if "gaussian_matrix" in name:
            return rng.normal(0, 1, shape)
        if name.endswith("bias") or name.endswith("attention_biases"):
            return rng.normal(0, 0.1, shape)
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        return rng.normal(0, 1 / math.sqrt(fan_in), shape)

    expected = architecture.expected_shapes(config)
    return {name: fill(name, shape).astype(np.float32) for name, shape in expected.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", required=True, help=".safetensors file to write")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    options = parser.parse_args()
    tensors, config = convert.convert(seeded_state(LITE_MEDSAM, options.seed), LITE_MEDSAM)
    model_file.write(options.output, tensors, config)
    print(f"{options.output}: LiteMedSAM with seeded, untrained weights")


if __name__ == "__main__":
    main()
