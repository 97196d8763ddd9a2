"""Checkpoints trained with quantisation in the loop: their whole numbers and scales arrive, and microtome
computes with them what PyTorch does."""

import json
import struct

import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch
from onnx import TensorProto, helper, numpy_helper

import convert
import quantized
import sam
import seeded_weights
from conftest import make_case
from make_data import CONFIG as TINY

# A last stage of a width that keeps the resolution, so that the shapes tell the whole configuration.
LAST = dict(kind="attention", dim=320, depth=1, heads=4, window=14, mlp_ratio=1)
ENCODER = TINY["image_encoder"]
CONFIG = {**TINY, "image_encoder": {**ENCODER, "stages": [*ENCODER["stages"][:-1], LAST]}}
SIDE = CONFIG["image_encoder"]["image_size"]
BOXES = ((5, 6, 40, 50), (20, 10, 50, 45), (0, 0, 51, 51))
ACT = "input_quant.fused_activation_quant_proxy.tensor_quant"
WEIGHT = "weight_quant.tensor_quant"
BITS = "msb_clamp_bit_width_impl.bit_width_offset"
STORED = "image_encoder.layers.1.blocks.1.mlp.fc1"  # one layer of each kind, for the tests of what is wrong
CONV = "image_encoder.layers.0.blocks.1.conv2.c"
TRANSPOSED = "mask_decoder.output_upscaling.3"


@pytest.fixture(scope="module")
def state():
    """With BatchNorms whose gammas have both signs."""
    seeded = seeded_weights.seeded_state(CONFIG, seed=3)
    seeded["image_encoder.layers.0.blocks.1.conv2.bn.weight"][::3] *= -1
    return seeded


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    path = tmp_path_factory.mktemp("case") / "case.npz"
    image = make_case(path, shape=(SIDE, SIDE, 3), boxes=BOXES).astype(np.float32)
    pixels = (image - image.min()) / (image.max() - image.min())
    return path, torch.tensor(pixels.transpose(2, 0, 1)[None])


def torch_model(state):
    model = sam.Sam(CONFIG).eval()
    model.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
    return model


def modules(model):
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d)
    return {n: m for n, m in model.named_modules() if isinstance(m, kinds)}


def masks(model, pixels):
    with torch.no_grad():
        embedding = model.image_encoder(pixels)
        return [
            model.decode(embedding, boxes=torch.tensor([box]).float())[0][0, 0].numpy() for box in BOXES
        ]


def wholly_quantised(name):
    """The layers that the tests quantise: not those of attention that the runtime multiplies into
    others, where there is no input to quantise."""
    return name.startswith("image_encoder.") or "upscaling" in name or ".lin" in name


@pytest.fixture(scope="module")
def inputs(state, case):
    """{layer: (least, largest)} of what comes into each layer."""
    seen = {}
    model = torch_model(state)
    for name, module in modules(model).items():
        def see(_, x, name=name):
            low, high = seen.get(name, (0.0, 0.0))
            seen[name] = min(low, float(x[0].min())), max(high, float(x[0].max()))
        module.register_forward_pre_hook(see)
    masks(model, case[1])
    return {n: r for n, r in seen.items() if wholly_quantised(n)}


def on_channels(values, name, ndim):
    axis = 1 if "output_upscaling" in name else 0
    return np.asarray(values).reshape([-1 if i == axis else 1 for i in range(ndim)])


@pytest.fixture(scope="module")
def qat(state, inputs):
    """A Brevitas state dict with every kind of quantiser, and what it stands for:
    {layer: (whole numbers, scales, input scales, zero points)}, of which there are one or one for each channel."""
    entries, meant = dict(state), {}
    for i, (name, (low, high)) in enumerate(inputs.items()):
        weight = state[f"{name}.weight"]
        axes = tuple(a for a in range(weight.ndim) if a != ("output_upscaling" in name))
        largest = np.abs(weight).max(axes)
        if i % 3 == 0 and name != STORED:  # not kept
            scale = largest / np.float32(127)
        else:  # learned: less than the largest, so that some are clamped
            per_tensor = i % 3 == 1 and name not in (STORED, TRANSPOSED)
            threshold = np.float32(0.9) * (largest.max() if per_tensor else largest)
            stored = threshold if per_tensor else on_channels(threshold, name, weight.ndim)
            entries[f"{name}.{WEIGHT}.scaling_impl.value"] = np.asarray(stored, np.float32)
            scale = np.broadcast_to(threshold / np.float32(127), largest.shape)
        whole = np.clip(np.rint(weight / on_channels(scale, name, weight.ndim)), -127, 127)
        key = f"{name}.{ACT}.scaling_impl.value"
        channels = len(weight) if weight.ndim == 4 and weight.shape[1] == 1 and "local_conv" not in name else 1
        if channels > 1:  # a range for each
            shares = np.linspace(0.4, 1, channels, dtype=np.float32)
            low, high = (np.asarray(v * shares, np.float32).reshape(1, -1, 1, 1) for v in (low, high))
        if i % 2 == 0 or name == STORED:  # asymmetric
            entries[key] = np.float32(high - low)
            step = np.float32(high - low) / np.float32(255)
            entries[f"{name}.{ACT}.zero_point_impl.value"] = np.float32(low)
            zero_point = np.rint(np.abs(np.float32(low)) / step)
        else:
            entries[key] = np.float32(np.maximum(high, -low))
            step = entries[key] / np.float32(128)
            zero_point = np.full_like(step, 128)
        entries[f"{name}.{ACT}.{BITS}"] = np.float32(6)
        meant[name] = whole, scale.astype(np.float32), np.ravel(step), np.ravel(zero_point)
    return entries, meant


def simulated(state, meant):
    """PyTorch with the same weights and bytes."""
    model = torch_model(state)
    for name, module in modules(model).items():
        if name not in meant:
            continue
        whole, scale, step, zero_point = meant[name]
        module.weight.data = torch.tensor((whole * on_channels(scale, name, whole.ndim)).astype(np.float32))

        def quantise(_, x, step=torch.tensor(step), zero_point=torch.tensor(zero_point).int()):
            if len(step) > 1:
                return torch.fake_quantize_per_channel_affine(x[0], step, zero_point, 1, 0, 255), *x[1:]
            return torch.fake_quantize_per_tensor_affine(x[0], step, zero_point, 0, 255), *x[1:]

        module.register_forward_pre_hook(quantise)
    return model


def save(path, entries):
    torch.save({k: torch.tensor(np.asarray(v)) for k, v in entries.items()}, path)
    return path


def converted(tmp_path, source, *options):
    output = tmp_path / "qat.safetensors"
    arguments = [str(source), "-o", str(output), "--image-size", str(SIDE), *map(str, options)]
    assert convert.main(arguments) == 0
    raw = output.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return output, safetensors.numpy.load_file(output), json.loads(raw[8 : 8 + length])["__metadata__"]


def gamma_over_deviation(state, name):
    norm = name.removesuffix("c") + "bn."
    if norm + "weight" not in state:
        return np.ones(1)
    return state[norm + "weight"] / np.sqrt(state[norm + "running_var"].astype(np.float64) + 1e-5)


def check_layers(tensors, meant, state):
    assert {n for n in tensors if n.endswith(".weight_scale")} == {f"{n}.weight_scale" for n in meant}
    for name, (whole, scale, step, zero_point) in meant.items():
        factor = gamma_over_deviation(state, name)
        weight = tensors[f"{name}.weight"]
        assert weight.dtype == np.int8 and tensors[f"{name}.weight_scale"].dtype == np.float32, name
        sign = on_channels(np.broadcast_to(np.sign(factor), scale.shape), name, whole.ndim)
        assert np.array_equal(weight, whole * sign), name
        expected = (scale.astype(np.float64) * np.abs(factor)).astype(np.float32)
        assert np.array_equal(tensors[f"{name}.weight_scale"], expected), name
        assert np.array_equal(tensors[f"{name}.input_scale"], step), name
        assert np.array_equal(tensors[f"{name}.input_zero_point"], zero_point), name


def check_masks(run, output, case, model, folder):
    done = run("segment", "-m", output, "-i", case[0], "-o", folder)
    assert done.returncode == 0, done.stderr
    segs = np.load(folder / "case.npz")["segs"]
    expected = np.zeros_like(segs)
    for label, mask in enumerate(masks(model, case[1]), 1):
        expected[mask > 0] = label
    assert 0.02 < (expected > 0).mean() < 0.999
    assert (segs != expected).mean() < 0.04
    done = run("trace", "-m", output, "-i", case[0], "-o", folder / "trace.npz")
    assert done.returncode == 0, done.stderr
    # The same until a sum in another order makes some byte another, which then spreads.
    early = "image_encoder.layers.1.blocks.0"
    found = {}
    model.get_submodule(early).register_forward_hook(lambda _, __, y: found.update({early: y}))
    masks(model, case[1])
    difference = np.abs(np.load(folder / "trace.npz")[early].ravel() - found[early].numpy().ravel())
    assert (difference > 1e-4).mean() < 0.02


def test_a_brevitas_state_dict(tmp_path, qat, state, case, run):
    entries, meant = qat
    output, tensors, metadata = converted(tmp_path, save(tmp_path / "x.pth", entries))
    check_layers(tensors, meant, state)
    plain = convert.fold_batch_norm(state, 1e-5)
    others = tensors.keys() - {f"{n}.{p}" for n in meant for p in (
        "weight", "weight_scale", "input_scale", "input_zero_point")}
    assert all(np.array_equal(tensors[n], plain[n]) for n in others)
    assert others | {f"{n}.weight" for n in meant} == plain.keys()
    assert metadata["precision"] == "mixed"
    assert "1:0:attn.proj|attn.qkv|local_conv|mlp.fc1|mlp.fc2=int8" in metadata["scheme"]
    assert "decoder:output_upscaling:0|3=int8" in metadata["scheme"]
    check_masks(run, output, case, simulated(state, meant), tmp_path / "out")


def test_every_layer_may_be_quantised(tmp_path, state, case, run):
    entries = {**state, **{f"{n}.{ACT}.scaling_impl.value": np.float32(8) for n in modules(torch_model(state))}}
    output, _, _ = converted(tmp_path, save(tmp_path / "x.pth", entries))
    done = run("segment", "-m", output, "-i", case[0], "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr


def test_the_scheme_is_one(tmp_path, qat, tiny_model, run):
    """The program's own parser finds every rule's layers."""
    _, _, metadata = converted(tmp_path, save(tmp_path / "x.pth", qat[0]))
    scheme = metadata["scheme"].replace("=int8", "=int8-weights")
    done = run("quantize", "-m", tiny_model, "-o", tmp_path / "y.safetensors", "--scheme", scheme)
    assert done.returncode == 0, done.stderr
    quantised = {n for n in safetensors.numpy.load_file(tmp_path / "y.safetensors") if n.endswith("_scale")}
    kept = "image_encoder.patch_embed.seq.0.c"  # which the program itself never quantises
    assert quantised == {f"{n}.weight_scale" for n in qat[1] if n != kept}


def test_batch_norm_that_was_folded_before(tmp_path, qat, state):
    """Weights and bias of the convolution are kept as they are."""
    entries = dict(qat[0])
    for part in ("weight", "bias", "running_mean", "running_var"):
        del entries[f"{CONV.removesuffix('c')}bn.{part}"]
    entries[f"{CONV}.bias"] = np.full(state[f"{CONV}.weight"].shape[0], 0.25, np.float32)
    _, tensors, _ = converted(tmp_path, save(tmp_path / "x.pth", entries))
    assert np.array_equal(tensors[f"{CONV}.weight"], qat[1][CONV][0])
    assert np.array_equal(tensors[f"{CONV}.weight_scale"], qat[1][CONV][1])
    assert (tensors[f"{CONV}.bias"] == 0.25).all()


def test_a_channel_that_batch_norm_removes(tmp_path, qat):
    gamma = qat[0][f"{CONV.removesuffix('c')}bn.weight"].copy()
    gamma[2] = 0
    entries = {**qat[0], f"{CONV.removesuffix('c')}bn.weight": gamma}
    _, tensors, _ = converted(tmp_path, save(tmp_path / "x.pth", entries))
    assert not tensors[f"{CONV}.weight"][2].any() and tensors[f"{CONV}.weight_scale"][2] == 1


@pytest.mark.parametrize("scaling, value, unsigned, scale", [
    ("float", 4.0, False, 4 / 128),
    ("float", 4.0, True, 4 / 255),
    ("log", 1.5, False, 2**1.5 / 128),
    ("log", 1.5, True, 2**1.5 / 255),
    ("power-of-two", 1.5, False, 4 / 128),
    ("power-of-two", 1.5, True, 4 / 256),
])
def test_scales_of_inputs(tmp_path, state, scaling, value, unsigned, scale):
    entries = {**state, f"{STORED}.{ACT}.scaling_impl.value": np.float32(value)}
    options = ["--scaling", scaling] + (["--unsigned", "*.blocks.1.mlp.*"] if unsigned else [])
    _, tensors, _ = converted(tmp_path, save(tmp_path / "x.pth", entries), *options)
    np.testing.assert_allclose(tensors[f"{STORED}.input_scale"], [scale], rtol=1e-6)
    assert tensors[f"{STORED}.input_zero_point"] == (0 if unsigned else 128)


@pytest.mark.parametrize("options, scale", [
    ((), lambda w: np.abs(w).max(1) / np.float32(127)),
    (("--weight-scales", "tensor"), lambda w: np.full(len(w), np.abs(w).max() / np.float32(127))),
    (("--scaling", "power-of-two"), lambda w: 2 ** np.ceil(np.log2(np.abs(w).max(1))) / 128),
])
def test_scales_of_weights_that_are_not_kept(tmp_path, state, options, scale):
    weight = state[f"{STORED}.weight"].copy()
    weight[1] = 0
    entries = {**state, f"{STORED}.weight": weight, f"{STORED}.{ACT}.scaling_impl.value": np.float32(2)}
    _, tensors, _ = converted(tmp_path, save(tmp_path / "x.pth", entries), *options)
    with np.errstate(divide="ignore"):
        expected = scale(weight)
    expected[expected == 0] = 1
    np.testing.assert_array_equal(tensors[f"{STORED}.weight_scale"], expected.astype(np.float32))
    again = np.clip(np.rint(weight / expected.astype(np.float32)[:, None]), -127, 127)
    np.testing.assert_array_equal(tensors[f"{STORED}.weight"], again)


def test_16_bit_storage_leaves_8_bit_layers(tmp_path, qat):
    source = save(tmp_path / "x.pth", qat[0])
    _, tensors, _ = converted(tmp_path, source, "--storage", "fp16")
    for name, (whole, scale, *_) in qat[1].items():
        assert tensors[f"{name}.weight"].dtype == np.int8 and tensors[f"{name}.weight_scale"].dtype == np.float32


def failure(tmp_path, capsys, source, *options):
    output = tmp_path / "bad.safetensors"
    arguments = [str(source), "-o", str(output), "--image-size", str(SIDE), *map(str, options)]
    assert convert.main(arguments) == 1
    assert not output.exists()
    message = capsys.readouterr().err
    assert source.name in message
    return message


S, Z = f"{STORED}.{ACT}.scaling_impl.value", f"{STORED}.{ACT}.zero_point_impl.value"
W, T = f"{STORED}.{WEIGHT}.scaling_impl.value", f"{TRANSPOSED}.{WEIGHT}.scaling_impl.value"


@pytest.mark.parametrize("key, value, complaint", [
    (S, np.nan, "finite"),
    (S, np.inf, "finite"),
    (S, 0.0, "holds 0.0"),
    (S, -1.0, "logarithms"),
    (S, 1e-30, "holds 1.0"),
    (S, [1.0, 2.0], "expected one number"),
    (f"{CONV}.{ACT}.scaling_impl.value", [1.0, 2.0], "expected one number or (1, "),
    (f"{CONV}.{ACT}.scaling_impl.value", np.ones((1, 1, 1, 3)), "expected one number or (1, "),
    (f"{CONV}.{ACT}.zero_point_impl.value", [1.0, 2.0, 3.0], "expected one number or (1, "),
    (S, None, "is missing"),
    (W, np.nan, "finite"),
    (W, 0.0, "holds 0.0"),
    (W, -1.0, "logarithms"),
    (W, [1.0, 2.0], "expected one number or (40, 1)"),
    (T, np.ones((4, 8, 1, 1)), "expected one number or (1, 4, 1, 1)"),
    (Z, np.nan, "finite"),
    (Z, -1e6, "zero point"),
    (f"{STORED}.{ACT}.{BITS}", 2.0, "4 bits, expected 8"),
    (f"{STORED}.{WEIGHT}.{BITS}", 7.0, "9 bits, expected 8"),
    (f"{STORED}.{WEIGHT}.zero_point_impl.value", 1.0, "not understood"),
    (f"{STORED}.{ACT}.scaling_impl.runtime_stats.running_stats", 1.0, "not understood"),
    (f"{STORED}.output_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value", 1.0, "output_quant"),
    (f"image_encoder.patch_embed.seq.1.act_quant.{ACT.partition('.')[2]}.scaling_impl.value", 1.0, "act_quant"),
    (f"image_encoder.nobody.{ACT}.scaling_impl.value", 1.0, "belongs to no layer"),
    (f"mask_decoder.iou_token.{ACT}.scaling_impl.value", 1.0, "no convolution"),
    (f"{STORED}.weight", np.full((40, 20), np.nan), "NaN"),
    (f"{STORED}.weight", None, "is missing"),
    (f"{STORED}.weight", np.ones((40, 21)), "expected"),
])
def test_brevitas_keys_that_are_wrong(tmp_path, capsys, qat, key, value, complaint):
    entries = dict(qat[0])
    if value is None:
        del entries[key]
    else:
        entries[key] = np.asarray(value, np.float32)
    message = failure(tmp_path, capsys, save(tmp_path / "x.pth", entries))
    assert complaint in message
    assert key.split(f".{ACT}")[0].split(".weight")[0].split("_quant")[0] in message


def test_a_pattern_of_unsigned_inputs_that_matches_nothing(tmp_path, capsys, qat):
    message = failure(tmp_path, capsys, save(tmp_path / "x.pth", qat[0]), "--unsigned", "nobody.*")
    assert "nobody.*" in message


class Learning(torch.nn.Module):
    """A weight that is quantised whenever it is read, as in training."""

    def __init__(self, scale, axis):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero_point", torch.zeros(len(scale), dtype=torch.int32))
        self.axis = axis

    def forward(self, weight):
        return torch.fake_quantize_per_channel_affine(weight, self.scale, self.zero_point, self.axis, -128, 127)


class Segmenter(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image, boxes):
        return self.model(image, boxes)[0]


@pytest.mark.filterwarnings("ignore")
def test_a_graph_that_torch_exports(tmp_path, qat, state, case, run):
    """With most names of weights lost, as the exporter does it."""
    model = simulated(state, qat[1])
    for name, module in modules(model).items():
        if name in qat[1]:
            torch.nn.utils.parametrize.register_parametrization(
                module, "weight", Learning(qat[1][name][1], quantized.out_axis(name)), unsafe=True)
    boxes = torch.tensor([BOXES[0]]).float()
    torch.onnx.export(Segmenter(model), (case[1], boxes), tmp_path / "x.onnx", dynamo=False, opset_version=17)
    base = save(tmp_path / "base.pth", state)
    output, tensors, _ = converted(tmp_path, tmp_path / "x.onnx", "--base", base)
    check_layers(tensors, qat[1], state)
    check_masks(run, output, case, simulated(state, qat[1]), tmp_path / "out")


class Graph:
    """A QDQ graph by hand: float tensors under their names, and layers each with an input of its own."""

    def __init__(self, state, without=()):
        self.nodes, self.inputs = [], []
        self.tensors = {n: v for n, v in state.items() if n not in without}

    def node(self, kind, *inputs, name="", **attributes):
        output = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=name, **attributes))
        return output

    def tensor(self, name, values, dtype=np.float32):
        self.tensors[name] = np.asarray(values, dtype)
        return name

    def taken(self, name, scale=0.5, zero_point=3, dtype=np.uint8):
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        levels = self.tensor(f"{name}_scale", scale), self.tensor(f"{name}_zero_point", zero_point, dtype)
        return self.node("DequantizeLinear", self.node("QuantizeLinear", name, *levels), *levels)

    def weight(self, name, whole, scale, axis=0, dtype=np.int8, zero_point=0):
        levels = self.tensor(f"{name}_scale", scale), self.tensor(
            f"{name}_zero_point", np.full(np.shape(scale), zero_point), dtype)
        return self.node("DequantizeLinear", self.tensor(name, whole, dtype), *levels, axis=axis)

    def save(self, path):
        initializers = [numpy_helper.from_array(np.asarray(v), n) for n, v in self.tensors.items()]
        graph = helper.make_graph(self.nodes, "x", self.inputs, [], initializers)
        onnx.save(helper.make_model(graph), path)
        return path


@pytest.fixture
def whole():
    return np.random.default_rng(5).integers(-127, 128, (40, 20))


SCALES = np.linspace(0.01, 0.02, 40, dtype=np.float32)


def layer_of(tensors, name=STORED):
    return [tensors[f"{name}.{p}"] for p in ("weight", "weight_scale", "input_scale", "input_zero_point")]


@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "transposed Gemm", "Transpose"])
@pytest.mark.parametrize("named_by", ["weight", "bias", "node"])
def test_linear_layers_of_a_graph(tmp_path, state, whole, kind, named_by):
    graph = Graph(state, [f"{STORED}.weight"] + [f"{STORED}.bias"] * (named_by == "node"))
    name = f"{STORED}.weight_quantized" if named_by == "weight" else "onnx::MatMul_77"
    bias = graph.tensor("b" if named_by == "node" else f"{STORED}.bias", np.arange(40))
    node = "/image_encoder/layers.1/blocks.1/mlp/fc1/MatMul" if named_by == "node" else "n"
    x = graph.taken("x", 0.5, -3, np.int8)
    if kind in ("transposed Gemm", "Transpose"):
        w = graph.weight(name, whole, SCALES, 0)
    else:
        w = graph.weight(name, whole.T, SCALES, 1)
    if "Gemm" in kind:
        graph.node("Gemm", x, w, bias, name=node, transB=int(kind != "Gemm"))
    else:
        w = graph.node("Transpose", w, perm=[1, 0]) if kind == "Transpose" else w
        graph.node("Add", bias, graph.node("MatMul", x, w, name=node))
    _, tensors, _ = converted(tmp_path, graph.save(tmp_path / "x.onnx"))
    weight, scale, input_scale, zero_point = layer_of(tensors)
    assert np.array_equal(weight, whole) and np.array_equal(scale, SCALES)
    assert input_scale == 0.5 and zero_point == 125
    assert np.array_equal(tensors[f"{STORED}.bias"], np.arange(40))


def test_a_transposed_convolution_of_a_graph(tmp_path, state):
    whole = np.random.default_rng(6).integers(1, 256, state[f"{TRANSPOSED}.weight"].shape)
    graph = Graph(state, [f"{TRANSPOSED}.weight"])
    w = graph.weight(f"{TRANSPOSED}.weight", whole, SCALES[: whole.shape[1]], 1, np.uint8, 128)
    graph.node("ConvTranspose", graph.taken("x"), w, f"{TRANSPOSED}.bias")
    _, tensors, _ = converted(tmp_path, graph.save(tmp_path / "x.onnx"))
    weight, scale, input_scale, zero_point = layer_of(tensors, TRANSPOSED)
    assert np.array_equal(weight, whole - 128) and np.array_equal(scale, SCALES[: whole.shape[1]])
    assert input_scale == 0.5 and zero_point == 3


def test_a_convolution_with_its_batch_norm_folded_in_a_graph(tmp_path, capsys, state):
    """Known by the name of its scale, as in Brevitas's exports; the other checkpoint still has the norm."""
    shape = state[f"{CONV}.weight"].shape
    whole = np.random.default_rng(7).integers(-127, 128, shape)
    graph = Graph(state, [n for n in state if n.startswith(CONV.removesuffix("c"))])
    scale = graph.tensor(f"m.{CONV}.weight_quant.export_handler.lifted_tensor_4", SCALES[: shape[0]])
    zero = graph.tensor("shared", np.zeros(shape[0]), np.int8)
    w = graph.node("DequantizeLinear", graph.tensor("slice_1", whole, np.int8), scale, zero, axis=0)
    graph.node("Conv", graph.taken("x"), w, graph.tensor("onnx::Conv_9", np.arange(shape[0])))
    base = save(tmp_path / "base.pth", state)
    _, tensors, _ = converted(tmp_path, graph.save(tmp_path / "x.onnx"), "--base", base)
    assert np.array_equal(tensors[f"{CONV}.weight"], whole)
    assert np.array_equal(tensors[f"{CONV}.weight_scale"], SCALES[: shape[0]])
    assert np.array_equal(tensors[f"{CONV}.bias"], np.arange(shape[0]))
    assert "base.pth: 0 tensors" in capsys.readouterr().out


def test_weights_alone_in_a_graph(tmp_path, state, whole):
    graph = Graph(state, [f"{STORED}.weight"])
    graph.node("MatMul", "x", graph.weight(f"{STORED}.weight", whole.T, 0.25))
    _, tensors, metadata = converted(tmp_path, graph.save(tmp_path / "x.onnx"))
    assert np.array_equal(tensors[f"{STORED}.weight"], whole) and f"{STORED}.input_scale" not in tensors
    assert (tensors[f"{STORED}.weight_scale"] == 0.25).all()
    assert metadata["scheme"] == "1:1:mlp.fc1=int8-weights"


@pytest.mark.parametrize("weight, taken, complaint", [
    (dict(scale=np.nan), {}, "nan"),
    (dict(scale=0), {}, "holds 0.0"),
    (dict(scale=-SCALES, axis=1), {}, "holds -0.0"),
    (dict(scale=SCALES[:39], axis=1), {}, "fc1.weight"),
    (dict(scale=SCALES[:20], axis=0), {}, "one for each output channel"),
    (dict(scale=0.1, zero_point=100), {}, "expected -127 to 127"),
    (dict(scale=0.1, dtype=np.int16), {}, "int16"),
    ({}, dict(scale=np.inf), "inf"),
    ({}, dict(scale=0), "holds 0.0"),
    ({}, dict(scale=[1, 2], zero_point=[0, 0]), "2 scales"),
    ({}, dict(dtype=np.uint16), "uint16"),
    ({}, dict(zero_point=[3, 3]), "expected ()"),
])
def test_levels_of_a_graph_that_are_wrong(tmp_path, capsys, state, whole, weight, taken, complaint):
    graph = Graph(state, [f"{STORED}.weight"])
    w = graph.weight(f"{STORED}.weight", whole.T, **{"scale": SCALES, "axis": 1, **weight})
    graph.node("MatMul", graph.taken("x", **taken), w)
    assert complaint in failure(tmp_path, capsys, graph.save(tmp_path / "x.onnx"))


def test_graphs_that_are_wrong(tmp_path, capsys, state, whole):
    graph = Graph(state, [f"{STORED}.weight"])
    w = graph.weight("nobody", whole.T, SCALES, 1)
    graph.node("MatMul", graph.taken("x"), w, name="nothing")
    assert "nobody" in failure(tmp_path, capsys, graph.save(tmp_path / "x.onnx"))
    assert "--base" in failure(tmp_path, capsys, Graph(state, [f"{STORED}.bias"]).save(tmp_path / "y.onnx"))
    graph = Graph(state, [f"{STORED}.weight"])
    graph.node("MatMul", graph.taken("x"), graph.weight(f"{STORED}.weight", whole, 0.5))
    assert "mis-shaped: " + STORED in failure(tmp_path, capsys, graph.save(tmp_path / "z.onnx"))
    (tmp_path / "w.onnx").write_bytes(b"\xff" * 100)
    assert "ONNX" in failure(tmp_path, capsys, tmp_path / "w.onnx")
    graph = Graph(state, [f"{STORED}.weight"])
    graph.nodes += [helper.make_node("Identity", ["b"], ["a"]), helper.make_node("Identity", ["a"], ["b"])]
    graph.node("MatMul", "x", "a")
    assert STORED in failure(tmp_path, capsys, graph.save(tmp_path / "v.onnx"))


def test_without_the_onnx_package(tmp_path, capsys, state, monkeypatch):
    source = Graph(state).save(tmp_path / "x.onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    assert "pip install onnx" in failure(tmp_path, capsys, source)


def test_inputs_of_a_graph_that_are_wrong(tmp_path, capsys, state, whole):
    def complaint(*inputs):
        graph = Graph(state, [f"{STORED}.weight"])
        w = graph.weight(f"{STORED}.weight", whole.T, SCALES, 1)
        zero = graph.tensor("zero", 3, np.uint8)
        for scales in inputs:
            scales = [graph.tensor(f"s{s}", s) for s in scales]
            x = graph.node("QuantizeLinear", "x", scales[0], zero)
            if len(scales) == 3:
                x = graph.node("Clip", x, zero)
            graph.node("MatMul", graph.node("DequantizeLinear", x, scales[1], zero), w)
        return failure(tmp_path, capsys, graph.save(tmp_path / "x.onnx"))

    assert f"{STORED}: its input is quantised and dequantised with different levels" in complaint((1, 2))
    assert f"{STORED}: its input is clipped" in complaint((1, 1, 1))
    assert f"{STORED} is in the graph twice" in complaint((1, 1), (2, 2))


@pytest.mark.parametrize("axis, moved", [(2, False), (-1, False), (1, True)])
def test_ranges_of_a_graph_that_are_not_of_channels(tmp_path, capsys, state, axis, moved):
    graph = Graph(state, [f"{CONV}.weight"])
    channels = len(state[f"{CONV}.weight"])
    levels = (graph.tensor("scale", np.full(channels, 0.1)), graph.tensor("zero", np.zeros(channels), np.uint8))
    x = graph.node("DequantizeLinear", graph.node("QuantizeLinear", "x", *levels, axis=axis), *levels, axis=axis)
    if moved:
        x = graph.node("Transpose", x, perm=[0, 1, 3, 2])
    whole = np.ones(state[f"{CONV}.weight"].shape)
    graph.node("Conv", x, graph.weight(f"{CONV}.weight", whole, np.full(channels, 0.5)))
    assert f"the {channels} scales of {CONV}'s input are not of its channels" in failure(
        tmp_path, capsys, graph.save(tmp_path / "x.onnx"))


def test_a_base_that_is_missing(tmp_path, capsys, state):
    source = Graph(state).save(tmp_path / "x.onnx")
    assert "nothing.pth" in failure(tmp_path, capsys, source, "--base", tmp_path / "nothing.pth")
