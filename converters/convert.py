#!/usr/bin/env python3
"""Converts a checkpoint (.pth) of LiteMedSAM or another promptable model into a model file for microtome (.safetensors).

It prunes weights where asked to, also those of a model file that it wrote before: by their magnitudes (see
pruning.py), or by what calibration saw of the layers' inputs (see repair.py).

A checkpoint that was trained with quantisation in the loop, as a Brevitas state dict or a quantised ONNX
graph, keeps its 8-bit weights and its scales: see brevitas_state.py and onnx_file.py.

Needs NumPy, not PyTorch. Nothing in the checkpoint is executed: see checkpoint.py.
"""

import argparse
import sys

import numpy as np

import architecture
import brevitas_state
import checkpoint
import model_file
import onnx_file
import pruning
import quantized
import repair


def batch_norm_scale(tensors, norm, epsilon):
    """What a BatchNorm multiplies its channels by, in double precision."""
    gamma, variance = (tensors[f"{norm}.{part}"].astype(np.float64) for part in ("weight", "running_var"))
    if (variance < 0).any():
        raise architecture.ArchitectureError(f"{norm}.running_var has negative values")
    return gamma / np.sqrt(variance + epsilon)


def fold_batch_norm(tensors, epsilon):
    """Replaces every convolution and BatchNorm pair (`NAME.c`, `NAME.bn`; see architecture.norm_after) by the one
    convolution with bias that computes the same, folded in double precision:

        w' = w * gamma / sqrt(var + eps),    b' = beta - mean * gamma / sqrt(var + eps)
    """
    folded, norms = {}, []
    for name, value in tensors.items():
        convolution = name.removesuffix(".weight")
        norm = architecture.norm_after(convolution)
        if convolution == name or not norm or f"{norm}.running_mean" not in tensors:
            folded[name] = value
            continue
        beta, mean = (tensors[f"{norm}.{part}"].astype(np.float64) for part in ("bias", "running_mean"))
        scale = batch_norm_scale(tensors, norm, epsilon)
        folded[name] = (value * scale[:, None, None, None]).astype(np.float32)
        folded[f"{convolution}.bias"] = (beta - mean * scale).astype(np.float32)
        norms.append(norm)
    for norm in norms:
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            folded.pop(f"{norm}.{part}", None)
    return folded


def halve(tensors, least=4096):
    """Stores tensors of at least `least` elements, which are nearly all there is, as 16-bit floats.
    Biases and norms stay fp32."""
    halved = {}
    for name, value in tensors.items():
        if value.size >= least and value.dtype == np.float32:
            largest = np.abs(value).max()
            if largest > np.finfo(np.float16).max:
                raise architecture.ArchitectureError(f"{name} has values of {largest:.3g}, too large for fp16")
            value = value.astype(np.float16)
        halved[name] = value
    return halved


def fold_into_layer(layer, tensors, epsilon):
    """A quantised layer with the BatchNorm that follows it, if one does, folded into its scales."""
    norm = architecture.norm_after(layer.name)
    if not norm or f"{norm}.running_mean" not in tensors:
        return layer
    return layer.folded(batch_norm_scale(tensors, norm, epsilon))


def convert(state, config=None, image_size=None, layers=()):
    """Turns a state dict {name: array} into the tensors and the configuration of a model file. The
    configuration is read off the shapes unless it is given. `layers` are those in 8 bits; the state dict
    has their weights in floats, too."""
    state = {n: v for n, v in state.items() if not architecture.ignored(n)}
    shapes = {name: value.shape for name, value in state.items()}
    config = config or architecture.infer_config(shapes, image_size)
    architecture.check(shapes, config)
    for name, value in state.items():
        if value.dtype.kind != "f":
            raise architecture.ArchitectureError(f"{name} has dtype {value.dtype}, expected floats")
        if not np.isfinite(value).all():
            raise architecture.ArchitectureError(f"{name} holds NaN or infinite values")
    state = {n: v.astype(np.float32) for n, v in state.items()}
    epsilon = architecture.encoder_of(config).BATCH_NORM_EPSILON
    tensors = fold_batch_norm(state, epsilon)
    for layer in layers:
        layer.check()
        tensors |= fold_into_layer(layer, state, epsilon).tensors()
    return tensors, config


def complete(found, layers, base, image_size):
    """The state dict of which an ONNX graph holds `found`, among tensors that are not the checkpoint's,
    and `base`, {name: array}, the rest. A convolution that has a bias in the graph has no BatchNorm."""
    folded = architecture.folded_convolutions(found)
    gone = tuple(f"{architecture.norm_after(name)}." for name in folded)
    together = {n: v for n, v in base.items() if not n.startswith(gone)} | found
    try:
        config = architecture.infer_config({n: v.shape for n, v in together.items()}, image_size)
        expected = architecture.expected_shapes(config, folded).keys()
        missing = [n for n in expected if n not in together]
        if missing and not base:
            raise architecture.ArchitectureError(f"{len(missing)} tensors are missing, such as {missing[0]!r}")
    except architecture.ArchitectureError as error:
        if base:
            raise
        raise architecture.ArchitectureError(
            f"{error}. Graphs rarely name every tensor: --base takes the checkpoint that has the others"
        ) from None
    known = expected | base.keys()
    known |= {f"{layer.name}.weight" for layer in layers}
    return {n: v for n, v in together.items() if n in known}


def read_checkpoint(path):
    """The state dict in a checkpoint, pruned or not; says what it leaves out."""
    return pruning.joined(checkpoint.load(path, lambda note: print(f"{path}: {note}", file=sys.stderr)))


def read(path, base, image_size, choices):
    """The state dict in a file, and its layers in 8 bits."""
    if not path.lower().endswith(".onnx"):
        return brevitas_state.read(read_checkpoint(path), choices)
    found, layers = onnx_file.read(path)
    rest = {}
    if base:
        try:
            rest = read_checkpoint(base)
        except (checkpoint.CheckpointError, architecture.ArchitectureError, OSError) as error:
            raise checkpoint.CheckpointError(f"{base}: {error}") from None
    state = complete(found, layers, rest, image_size)
    if base:
        taken = sum(n not in found and not architecture.ignored(n) for n in state)
        print(f"{base}: {taken} tensors, which the graph does not name")
    return state, layers


def read_model_file(path):
    """The tensors in a model file whose layers are in floating point, its configuration, and how it was
    pruned."""
    tensors, config, metadata = model_file.read(path)
    if "scheme" in metadata or any(v.dtype == np.int8 for v in tensors.values()):
        raise architecture.ArchitectureError(
            "a model file with layers in 8 bits stays as it is: convert the fp32 or fp16 file that it is made of"
        )
    return tensors, config, metadata.get("pruning")


def prune_by_moments(tensors, path, choices):
    """See repair.prune: with the moments in a file, which have to be of this model, stored as fp32 or fp16."""
    if any(value.dtype == np.int8 for value in tensors.values()):
        raise architecture.ArchitectureError("--calibration is for layers in floating point, but some are in 8 bits")
    try:
        moments = repair.Moments(path)
    except (model_file.ModelFileError, OSError) as error:
        raise model_file.ModelFileError(f"{path}: {error}") from None
    own = model_file.fingerprint(tensors)
    if moments.model != own and moments.model != model_file.fingerprint(halve(tensors)):
        raise architecture.ArchitectureError(
            f"the moments in {path} are of another model ({moments.model}, but this one is {own})"
        )
    return repair.prune(tensors, moments, choices)


def run(options):
    """Reads, prunes, converts, writes; returns what was written, in words."""
    quantisation = brevitas_state.Choices(options.scaling, options.weight_scales, tuple(options.unsigned))
    choices = pruning.Choices(
        options.prune, options.prune_2_4, options.prune_layerwise, tuple(options.prune_keep)
    )
    config = pruned = None
    if is_model_file(options.checkpoint):
        state, config, pruned = read_model_file(options.checkpoint)
        layers = []
    else:
        state, layers = read(options.checkpoint, options.base, options.image_size, quantisation)
    way, unseen, changed = choices.text() if choices.asked() else "", 0, False
    if not options.calibration:
        state, layers, changed = pruning.prune(state, layers, choices)
    tensors, config = convert(state, config, options.image_size, layers)
    if options.calibration:
        way += ", by moments"
        changed, unseen = prune_by_moments(tensors, options.calibration, choices)
        tensors |= changed
    if changed:
        pruned = way
    elif pruning.sparsity(state) >= pruning.LEAST_FOUND:
        pruned = pruned or pruning.FOUND
    if options.storage == "fp16":
        tensors = halve(tensors)
    model_file.write(options.output, tensors, config, quantized.scheme(layers), pruned)
    parameters = sum(v.size for v in tensors.values())
    words = f"{len(tensors)} tensors, {parameters / 1e6:.2f} M parameters, {options.storage}"
    if layers:
        words += f", {len(layers)} layers in 8 bits"
    if pruned:
        words += f", {100 * pruning.sparsity(tensors):.1f} % of the layers' weights are zero ({pruned})"
    if unseen:
        words += f"; {unseen} layers that calibration did not see stay"
    return words


def is_model_file(path):
    return path.lower().endswith(".safetensors")


def fraction(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def add_pruning(parser):
    group = parser.add_argument_group(
        "pruning", "Weights of convolutions and linear layers that become zero, before BatchNorm is folded, or after it "
        "with --calibration."
    )
    group.add_argument(
        "--prune", metavar="AMOUNT", type=fraction,
        help="this fraction of all weights, the smallest, such as 0.2",
    )
    group.add_argument(
        "--prune-layerwise", action="store_true", help="with --prune: the same fraction in each layer by itself",
    )
    group.add_argument(
        "--prune-2-4", action="store_true",
        help="all but the two largest of every four weights in a row along the inputs; depthwise convolutions "
        "and the embedding of pixels, whose inputs are fewer than four, stay as they are",
    )
    group.add_argument(
        "--prune-keep", metavar="PATTERN", action="append", default=[],
        help="layers that stay as they are, such as 'mask_decoder.*' or '*.qkv'; may be repeated",
    )
    group.add_argument(
        "--calibration", metavar="MOMENTS",
        help="what `microtome calibrate --moments` wrote of this model: weights are chosen by the error of the layers' "
        "outputs, and the others make up for them; layers that bear it give up more, unless --prune-layerwise is given",
    )


def check_options(parser, options):
    if options.base and not options.checkpoint.lower().endswith(".onnx"):
        parser.error("--base is for .onnx files")
    if is_model_file(options.checkpoint) and options.image_size:
        parser.error("--image-size is for checkpoints: a model file has its own")
    if options.prune is not None and options.prune_2_4:
        parser.error("--prune and --prune-2-4 exclude each other")
    if options.prune_layerwise and options.prune is None:
        parser.error("--prune-layerwise needs --prune")
    if options.prune_keep and options.prune is None and not options.prune_2_4:
        parser.error("--prune-keep needs --prune or --prune-2-4")
    if options.calibration and options.prune is None and not options.prune_2_4:
        parser.error("--calibration needs --prune or --prune-2-4")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "checkpoint",
        help=".pth file, as torch.save writes it, quantised .onnx file, or .safetensors model file with fp32 or "
        "fp16 weights",
    )
    parser.add_argument("-o", "--output", required=True, help=".safetensors file to write")
    parser.add_argument("--image-size", type=int, help="side of the model's input (256 for LiteMedSAM)")
    parser.add_argument(
        "--storage", choices=("fp32", "fp16"), default="fp32",
        help="fp16: half the file; weights are widened when it is loaded (%(default)s)",
    )
    parser.add_argument(
        "--base", metavar="CHECKPOINT",
        help="for .onnx: the .pth file that has the tensors which the graph does not name",
    )
    add_pruning(parser)
    brevitas = parser.add_argument_group("what the state dict of a Brevitas model does not say")
    brevitas.add_argument(
        "--unsigned", metavar="PATTERN", action="append", default=[],
        help="layers with unsigned inputs, such as 'mask_decoder.*.lin2'; may be repeated",
    )
    brevitas.add_argument(
        "--weight-scales", choices=("channel", "tensor"), default="channel",
        help="what weights have a scale each for, where it is not kept (%(default)s)",
    )
    brevitas.add_argument(
        "--scaling", choices=("float", "log", "power-of-two"), default="float",
        help="how scales are kept (%(default)s)",
    )
    options = parser.parse_args(arguments)
    check_options(parser, options)
    try:
        written = run(options)
    except (
        checkpoint.CheckpointError, architecture.ArchitectureError, model_file.ModelFileError, OSError
    ) as error:
        print(f"convert.py: {options.checkpoint}: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
