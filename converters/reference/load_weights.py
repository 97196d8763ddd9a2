"""The PyTorch reference with the weights of a checkpoint or of a model file, whose BatchNorms are folded."""

import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import architecture  # noqa: E402
import convert  # noqa: E402
import sam  # noqa: E402


def build(config, names):
    """A model for a state dict with these names: where a convolution has a bias, the BatchNorm is gone."""
    model = sam.Sam(config)
    for name in architecture.folded_convolutions(names):
        pair = model.get_submodule(name.rpartition(".")[0])
        if hasattr(pair, "fold"):
            pair.fold()
    return model


def read(path, image_size=None):
    """The configuration and the state dict in a checkpoint (.pth), pruned or not, or in a model file
    (.safetensors) in floating point. A checkpoint does not tell the side of the model's input."""
    if convert.is_model_file(str(path)):
        state, config, _ = convert.read_model_file(path)
    else:
        state = convert.read_checkpoint(path)
        state = {n: v for n, v in state.items() if not architecture.ignored(n)}
        config = architecture.infer_config({n: v.shape for n, v in state.items()}, image_size)
    architecture.check({n: v.shape for n, v in state.items()}, config)
    return config, {n: torch.from_numpy(v.astype(np.float32)) for n, v in state.items()}


def load(path):
    config, state = read(path)
    model = build(config, state)
    model.load_state_dict(state, strict=False)  # only BatchNorm's counters are missing
    return model
