"""Pruned weights: the same as PyTorch's, whatever way they arrive, and how the model file stores them."""

import json
import struct

import numpy as np
import pytest

import architecture
import convert
import model_file
import pruning
import quantized
import seeded_weights

# A small one, whose last stage is of a width that keeps the resolution, so that the shapes tell all of it.
CONFIG = architecture.upgraded(dict(
    image_size=52,
    pixel_channels=3,
    stages=[
        dict(kind="conv", dim=12, depth=2, expand=3, stride=2),
        dict(kind="attention", dim=20, depth=2, heads=5, window=7, mlp_ratio=2, stride=2),
        dict(kind="attention", dim=28, depth=1, heads=4, window=5, mlp_ratio=3, stride=1),
        dict(kind="attention", dim=320, depth=1, heads=4, window=14, mlp_ratio=1),
    ],
    embed_dim=32,
    mask_in_chans=12,
    decoder=dict(depth=2, heads=8, mlp_dim=70, attention_downsample=2, multimask_outputs=3,
                 iou_hidden=40, iou_depth=3),
))
SIDE = CONFIG["image_encoder"]["image_size"]
AMOUNTS = [0, 1e-5, 0.123, 0.2, 1 / 3, 0.5, 1.0]
DEPTHWISE = "image_encoder.layers.0.blocks.1.conv2.c"
PIXELS = "image_encoder.patch_embed.seq.0.c"
CONV = "image_encoder.layers.0.blocks.1.conv1.c"
FC = "image_encoder.layers.1.blocks.1.mlp.fc1"
UPSCALING = "mask_decoder.output_upscaling.3"


@pytest.fixture(scope="module")
def state():
    return seeded_weights.seeded_state(CONFIG, seed=3)


@pytest.fixture(scope="module")
def torch():
    reason = "PyTorch is missing, with which pruning is compared"
    pytest.importorskip("torch.nn.utils.prune", reason=reason)
    return pytest.importorskip("torch", reason=reason)


@pytest.fixture
def layers_of(torch):
    """Makes {layer: module} of the reference with a state dict."""
    import sam

    def make(state, config=CONFIG):
        model = sam.Sam(config)
        model.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
        kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d)
        return model, {n: m for n, m in model.named_modules() if isinstance(m, kinds)}

    return make


def prune_globally(torch, modules, amount):
    prune = torch.nn.utils.prune
    prune.global_unstructured([(m, "weight") for m in modules.values()], prune.L1Unstructured, amount=amount)


def zeros_of(modules):
    return {n: (m.weight == 0).numpy() for n, m in modules.items()}


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name


# What is pruned


def test_the_layers_are_all_that_pytorch_calls_so(state, layers_of):
    assert pruning.layers(state).keys() == layers_of(state)[1].keys()


@pytest.mark.parametrize("amount", AMOUNTS)
def test_globally_as_pytorch(torch, state, layers_of, amount):
    _, modules = layers_of(state)
    prune_globally(torch, modules, amount)
    found = pruning.pruned_weights(pruning.layers(state), pruning.Choices(amount))
    check_equal(found, zeros_of(modules))
    total = sum(z.size for z in found.values())
    assert sum(z.sum() for z in found.values()) == round(amount * total)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_each_layer_as_pytorch(torch, state, layers_of, amount):
    _, modules = layers_of(state)
    for module in modules.values():
        torch.nn.utils.prune.l1_unstructured(module, "weight", amount)
    found = pruning.pruned_weights(pruning.layers(state), pruning.Choices(amount, layerwise=True))
    check_equal(found, zeros_of(modules))


def test_the_full_model_as_pytorch(torch, layers_of):
    """Among ten million weights some are equal; which of those at the limit PyTorch prunes is open."""
    config = seeded_weights.LITE_MEDSAM
    state = seeded_weights.seeded_state(config, seed=1)
    _, modules = layers_of(state, config)
    prune_globally(torch, modules, 0.2)
    found, expected = pruning.pruned_weights(pruning.layers(state), pruning.Choices(0.2)), zeros_of(modules)
    limit = max(np.abs(state[f"{n}.weight"][z]).max(initial=0) for n, z in found.items())
    equal = 0
    for name in expected:
        magnitudes = np.abs(state[f"{name}.weight"])
        equal += (magnitudes == limit).sum()
        assert np.array_equal(found[name] & (magnitudes < limit), expected[name] & (magnitudes < limit)), name
    assert sum(z.sum() for z in found.values()) == sum(z.sum() for z in expected.values())
    assert equal < 20


@pytest.mark.parametrize("numbers, amount, pruned", [
    ([3, 1, 2, 5, 4], 0.5, [1, 2]),  # 2.5 rounds to 2
    ([3, 1, 2], 0.5, [1, 2]),  # and 1.5 to 2, as in Python
    ([2, 1, 1, 1, 3], 0.4, [1, 2]),  # of equal ones the earlier
    ([1, 0, 0, 2], 0.5, [1, 2]),  # zeros count
    ([1, 2, 3], 0.0, []),
    ([1, 2, 3], 1.0, [0, 1, 2]),
    ([], 0.5, []),
])
def test_the_smallest(numbers, amount, pruned):
    assert np.flatnonzero(pruning.smallest(np.array(numbers, np.float32), amount)).tolist() == pruned


def naive_two_of_four(weight, axis):
    """True for what goes, one group after the other."""
    gone = np.zeros(weight.shape, bool)
    rest = [range(n) for i, n in enumerate(weight.shape) if i != axis]
    for place in np.array(np.meshgrid(*rest, indexing="ij")).reshape(len(rest), -1).T:
        for start in range(0, weight.shape[axis], 4):
            inputs = range(start, min(start + 4, weight.shape[axis]))
            at = [tuple(np.insert(place, axis, i)) for i in inputs]
            by_size = sorted(at, key=lambda i: -abs(weight[i]))  # stable
            for i in by_size[2:]:
                gone[i] = True
    return gone


@pytest.mark.parametrize("name, shape, axis", [
    ("mask_decoder.x", (5, 16), 1),
    ("mask_decoder.x", (3, 7), 1),
    ("mask_decoder.x", (2, 13), 1),
    ("image_encoder.neck.2", (3, 10, 3, 3), 1),
    (UPSCALING, (9, 5, 2, 2), 0),
    (UPSCALING, (8, 4, 2, 2), 0),
])
def test_two_of_four(name, shape, axis):
    weight = np.random.default_rng(1).integers(-3, 4, shape).astype(np.float32)  # many are equal
    found = pruning.pruned_weights({name: weight}, pruning.Choices(two_of_four=True))[name]
    assert np.array_equal(found, naive_two_of_four(weight, axis))


def test_two_of_four_leaves_layers_of_fewer_than_four_inputs(state):
    weights = pruning.layers(state)
    found = pruning.pruned_weights(weights, pruning.Choices(two_of_four=True))
    few = {n for n, w in weights.items() if w.shape[1 - quantized.out_axis(n)] < 4}
    assert {DEPTHWISE, PIXELS, "prompt_encoder.mask_downscaling.0"} <= few
    assert {n for n, z in found.items() if not z.any()} == few


def test_layers_that_are_kept(state):
    keep = ("mask_decoder.*", "*.qkv", "*.blocks.1.conv1")
    found = pruning.pruned_weights(pruning.layers(state), pruning.Choices(0.5, keep=keep))
    kept = pruning.layers(state).keys() - found.keys()
    assert CONV in kept and UPSCALING in kept and "image_encoder.layers.2.blocks.0.attn.qkv" in kept
    assert FC in found and DEPTHWISE in found
    assert all(n.startswith("mask_decoder.") or n.endswith((".qkv", "blocks.1.conv1.c")) for n in kept)
    total = sum(z.size for z in found.values())
    assert sum(z.sum() for z in found.values()) == round(0.5 * total)


def test_every_layer_may_be_kept(state):
    for choices in (pruning.Choices(0.5, keep=("*",)), pruning.Choices(two_of_four=True, keep=("*",))):
        pruned, _, changed = pruning.prune(state, [], choices)
        assert not changed and all(np.array_equal(pruned[n], state[n]) for n in state)


# The command


def save(torch, path, state):
    torch.save({k: torch.as_tensor(v) for k, v in state.items()}, path)
    return path


def raw(path):
    """The header and the metadata of a model file."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return header, header.pop("__metadata__")


def converted(tmp_path, source, *options):
    """The tensors, expanded, and the metadata that a conversion writes."""
    target = tmp_path / "out.safetensors"
    assert convert.main([str(source), "-o", str(target), *options]) == 0
    tensors, config, metadata = model_file.read(target)
    assert config == CONFIG
    return tensors, metadata


@pytest.fixture
def source(torch, tmp_path, state):
    return save(torch, tmp_path / "x.pth", state)


@pytest.fixture
def dense(tmp_path, state):
    """A model file without zeros."""
    path = tmp_path / "dense.safetensors"
    model_file.write(path, *convert.convert(state, CONFIG))
    return path


SIZE = ("--image-size", str(SIDE))


@pytest.mark.parametrize("options, choices, text", [
    (["--prune", "0.2"], pruning.Choices(0.2), "global 0.2"),
    (["--prune", "1"], pruning.Choices(1.0), "global 1"),
    (["--prune", "0.5", "--prune-layerwise"], pruning.Choices(0.5, layerwise=True), "per layer 0.5"),
    (["--prune-2-4"], pruning.Choices(two_of_four=True), "2:4"),
    (["--prune", "0.25", "--prune-keep", "*.qkv", "--prune-keep", "*.proj"],
     pruning.Choices(0.25, keep=("*.qkv", "*.proj")), "global 0.25 but for *.qkv, *.proj"),
])
def test_pruned_before_batch_norm_is_folded(tmp_path, capsys, source, state, options, choices, text):
    tensors, metadata = converted(tmp_path, source, *SIZE, *options)
    zeroed = dict(state)
    for name, gone in pruning.pruned_weights(pruning.layers(state), choices).items():
        zeroed[f"{name}.weight"] = np.where(gone, 0, state[f"{name}.weight"])
    check_equal(tensors, convert.fold_batch_norm(zeroed, 1e-5))
    assert metadata["pruning"] == text
    weights = [w for n, w in zeroed.items() if n.removesuffix(".weight") in pruning.layers(state)]
    share = 100 * sum((w == 0).sum() for w in weights) / sum(w.size for w in weights)
    assert f"{share:.1f} % of the layers' weights are zero ({text})" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--prune", "0"], ["--prune-2-4", "--prune-keep", "*"]])
def test_nothing_is_said_where_nothing_was_pruned(tmp_path, capsys, source, state, options):
    tensors, metadata = converted(tmp_path, source, *SIZE, *options)
    check_equal(tensors, convert.fold_batch_norm(state, 1e-5))
    assert "pruning" not in metadata and "zero" not in capsys.readouterr().out


@pytest.mark.parametrize("options, complaint", [
    (["--prune", "1.01"], "1.01 is not between 0 and 1"),
    (["--prune", "-0.1"], "-0.1 is not between 0 and 1"),
    (["--prune", "nan"], "nan is not between 0 and 1"),
    (["--prune", "half"], "half"),
    (["--prune", "0.5", "--prune-2-4"], "--prune and --prune-2-4 exclude each other"),
    (["--prune", "0", "--prune-2-4"], "--prune and --prune-2-4 exclude each other"),
    (["--prune-layerwise"], "--prune-layerwise needs --prune"),
    (["--prune-layerwise", "--prune-2-4"], "--prune-layerwise needs --prune"),
    (["--prune-keep", "*"], "--prune-keep needs --prune or --prune-2-4"),
])
def test_options_that_make_no_sense(tmp_path, capsys, options, complaint):
    with pytest.raises(SystemExit) as stopped:
        convert.main([str(tmp_path / "x.pth"), "-o", str(tmp_path / "y.safetensors"), *options])
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err


def failure(tmp_path, capsys, source, *options):
    target = tmp_path / "bad.safetensors"
    assert convert.main([str(source), "-o", str(target), *options]) == 1
    assert not target.exists()
    message = capsys.readouterr().err
    assert source.name in message
    return message


def test_a_pattern_that_matches_nothing(tmp_path, capsys, dense):
    for pattern in ("mask_encoder.*", "*.norm1", "mask_decoder.iou_token"):
        options = ["--prune", "0.2", "--prune-keep", "*.qkv", "--prune-keep", pattern]
        assert f"--prune-keep {pattern!r} matches no" in failure(tmp_path, capsys, dense, *options)


def test_weights_that_are_whole_numbers_are_still_refused(torch, tmp_path, capsys, state):
    for dtype in (np.uint8, np.bool_):
        weight = state[f"{FC}.weight"].astype(dtype)
        source = save(torch, tmp_path / "x.pth", {**state, f"{FC}.weight": weight})
        message = failure(tmp_path, capsys, source, *SIZE, "--prune-2-4")
        assert f"{FC}.weight has dtype {weight.dtype}" in message


def test_layers_in_8_bits_keep_their_scales(torch, tmp_path, state):
    act = "input_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value"
    names = [FC, CONV, UPSCALING]
    source = save(torch, tmp_path / "x.pth", {**state, **{f"{n}.{act}": np.float32(4) for n in names}})
    before, _ = converted(tmp_path, source, *SIZE)
    after, metadata = converted(tmp_path, source, *SIZE, "--prune", "0.4")
    gone = pruning.pruned_weights(pruning.layers(state), pruning.Choices(0.4))
    for name in names:
        weight = after[f"{name}.weight"]
        assert weight.dtype == np.int8 and gone[name].any()
        assert np.array_equal(weight, np.where(gone[name], 0, before[f"{name}.weight"])), name
        assert np.array_equal(after[f"{name}.weight_scale"], before[f"{name}.weight_scale"]), name
    assert metadata["pruning"] == "global 0.4" and "int8" in metadata["scheme"]


# Checkpoints that arrive pruned


def test_zeros_are_recognised(torch, tmp_path, capsys, state):
    zeroed, _, _ = pruning.prune(state, [], pruning.Choices(0.3))
    source = save(torch, tmp_path / "x.pth", zeroed)
    tensors, metadata = converted(tmp_path, source, *SIZE)
    check_equal(tensors, convert.fold_batch_norm(zeroed, 1e-5))
    assert metadata["pruning"] == "found in the checkpoint"
    assert "30.0 % of the layers' weights are zero (found in the checkpoint)" in capsys.readouterr().out
    _, metadata = converted(tmp_path, source, *SIZE, "--prune", "0.2")  # less than there is: the same
    assert metadata["pruning"] == "found in the checkpoint"
    _, metadata = converted(tmp_path, source, *SIZE, "--prune", "0.4")
    assert metadata["pruning"] == "global 0.4"


def test_some_zeros_are_no_pruning(torch, tmp_path, state):
    zeroed, _, _ = pruning.prune(state, [], pruning.Choices(0.02))
    assert "pruning" not in converted(tmp_path, save(torch, tmp_path / "x.pth", zeroed), *SIZE)[1]


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_masks_of_pytorch(torch, tmp_path, state, layers_of, prefix):
    model, modules = layers_of(state)
    prune = torch.nn.utils.prune
    prune_globally(torch, modules, 0.4)
    prune.l1_unstructured(modules[FC], "bias", 3)
    prune.random_unstructured(modules[CONV], "weight", 0.5)  # a second time
    pruned = {prefix + k: v for k, v in model.state_dict().items()}
    assert f"{prefix}{CONV}.weight_orig" in pruned and f"{prefix}{FC}.bias_mask" in pruned
    source = tmp_path / "x.pth"
    torch.save({"model": pruned, "epoch": 3}, source)
    tensors, metadata = converted(tmp_path, source, *SIZE)
    for name, module in modules.items():
        prune.remove(module, "weight")
    prune.remove(modules[FC], "bias")
    removed = {k: v.numpy() for k, v in model.state_dict().items() if not architecture.ignored(k)}
    check_equal(tensors, convert.fold_batch_norm(removed, 1e-5))
    assert (tensors[f"{FC}.bias"] == 0).sum() == 3 and (tensors[f"{CONV}.weight"] == 0).mean() > 0.5
    assert metadata["pruning"] == "found in the checkpoint"


def orig_and_mask(state, mask, name=f"{FC}.weight"):
    parts = {f"{name}_orig": state[name], f"{name}_mask": np.asarray(mask)}
    return {k: v for k, v in state.items() if k != name} | parts


def test_masks_of_other_types(state):
    bits = np.random.default_rng(2).integers(0, 2, state[f"{FC}.weight"].shape)
    for dtype in (bool, np.uint8, np.float16, np.float64):
        joined = pruning.joined(orig_and_mask(state, bits.astype(dtype)))
        assert joined.keys() == state.keys() and joined[f"{FC}.weight"].dtype == np.float32
        assert np.array_equal(joined[f"{FC}.weight"], state[f"{FC}.weight"] * bits)


@pytest.mark.parametrize("change, complaint", [
    ({f"{FC}.weight_mask": np.ones((40, 21))}, [f"{FC}.weight_mask has shape (40, 21)", "_orig has (40, 20)"]),
    ({f"{FC}.weight_mask": np.ones((20, 40))}, [f"{FC}.weight_mask has shape (20, 40)", "_orig has (40, 20)"]),
    ({f"{FC}.weight_mask": None}, [f"{FC}.weight_orig (40, 20) is there without {FC}.weight_mask"]),
    ({f"{FC}.weight_orig": None}, [f"{FC}.weight_mask (40, 20) is there without {FC}.weight_orig"]),
    ({f"{FC}.weight_mask": np.full((40, 20), 0.5)}, [f"{FC}.weight_mask (40, 20) holds 0.5"]),
    ({f"{FC}.weight_mask": np.full((40, 20), -1)}, [f"{FC}.weight_mask (40, 20) holds -1"]),
    ({f"{FC}.weight_mask": np.full((40, 20), np.nan)}, [f"{FC}.weight_mask (40, 20) holds nan"]),
    ({f"{FC}.weight": np.ones((40, 20), np.float32)}, [f"{FC}.weight (40, 20) is there beside"]),
    ({f"{CONV}.bias_mask": np.ones(36)}, [f"{CONV}.bias_mask (36,) is there without {CONV}.bias_orig"]),
])
def test_masks_that_are_wrong(torch, tmp_path, capsys, state, change, complaint):
    entries = orig_and_mask(state, np.ones((40, 20), np.float32)) | change
    source = save(torch, tmp_path / "x.pth", {k: v for k, v in entries.items() if v is not None})
    message = failure(tmp_path, capsys, source, *SIZE)
    assert all(c in message for c in complaint)


# The model file


def unpacked(values, mask, shape):
    """A weight, as the format is described: bit i % 8 of byte i // 8 is weight i's."""
    weight, left = np.zeros(shape, values.dtype), iter(values)
    for i, place in enumerate(np.ndindex(shape)):
        if mask[i // 8] >> (i % 8) & 1:
            weight[place] = next(left)
    assert next(left, None) is None
    return weight


@pytest.mark.parametrize("storage, dtype", [("fp32", "F32"), ("fp16", "F16")])
def test_the_file_leaves_zeros_out(tmp_path, dense, state, storage, dtype):
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is missing")
    target = tmp_path / "out.safetensors"
    convert.main([str(dense), "-o", str(target), "--prune-2-4", "--storage", storage])
    header, _ = raw(target)
    stored = safetensors.load_file(target)
    expected, _, _ = pruning.prune(convert.fold_batch_norm(state, 1e-5), [], pruning.Choices(two_of_four=True))
    if storage == "fp16":
        expected = convert.halve(expected, least=4096)
    sparse = [n for n, v in pruning.layers(expected).items() if (v == 0).any()]
    assert len(sparse) > 40 and sum(header[f"{n}.weight_values"]["dtype"] == dtype for n in sparse) > 1
    for name, value in expected.items():
        layer = name.removesuffix(".weight")
        if layer not in sparse:
            assert np.array_equal(stored[name], value), name
            continue
        assert name not in header
        mask, values = stored[f"{name}_mask"], stored[f"{name}_values"]
        assert header[f"{name}_mask"]["dtype"] == "U8" and mask.shape == (-(-value.size // 8),)
        assert values.dtype == value.dtype and values.all()
        assert np.array_equal(unpacked(values, mask, value.shape), value), name
        assert not np.unpackbits(mask, bitorder="little")[value.size :].any()
    assert len(stored) == len(expected) + len(sparse)


def test_half_of_16_bit_weights_takes_9_bits_each(tmp_path):
    weight = np.random.default_rng(1).normal(0, 1, (64, 128)).astype(np.float16)
    weight[pruning.outside_two_of_four(np.abs(weight.T)).T] = 0
    held = model_file.compressed({"a.weight": weight})
    assert sum(v.nbytes for v in held.values()) == weight.size * 9 // 8


def test_without_any_weight_left(tmp_path, dense, state):
    target = tmp_path / "out.safetensors"
    convert.main([str(dense), "-o", str(target), "--prune", "1"])
    header, metadata = raw(target)
    assert header[f"{FC}.weight_values"]["shape"] == [0] and header[f"{FC}.weight_mask"]["shape"] == [100]
    tensors, _, _ = model_file.read(target)
    assert all(not w.any() for w in pruning.layers(tensors).values())
    assert tensors["mask_decoder.iou_token.weight"].all() and metadata["pruning"] == "global 1"


def test_only_where_it_is_smaller():
    weight = np.ones((4, 64), np.int8)
    for zeros, fewer in ((32, False), (33, True)):  # the mask takes 32 bytes
        weight.flat[:zeros] = 0
        held = model_file.compressed({"a.weight": weight, "a.weight_scale": np.zeros(4, np.float32)})
        assert ("a.weight" not in held) == fewer and "a.weight_scale" in held
    zeros = {"mask_tokens.weight": np.zeros((4, 64)), "norm.weight": np.zeros(64), "x.bias": np.zeros(64)}
    assert model_file.compressed(zeros).keys() == zeros.keys()


def test_what_becomes_zero_in_16_bits_counts(tmp_path, state):
    name = "image_encoder.layers.3.blocks.0.mlp.fc1.weight"
    weight = state[name].copy()
    assert weight.size >= 4096
    weight[:, ::2] = 1e-9
    model_file.write(tmp_path / "x.safetensors", *convert.convert({**state, name: weight}, CONFIG))
    target = tmp_path / "y.safetensors"
    assert convert.main([str(tmp_path / "x.safetensors"), "-o", str(target), "--storage", "fp16"]) == 0
    header, _ = raw(target)
    entry = header[f"{name}_values"]
    assert entry["dtype"] == "F16" and entry["shape"] == [weight.size // 2]


def test_8_bit_layers_are_stored_without_zeros_too(torch, tmp_path, state):
    act = "input_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value"
    source = save(torch, tmp_path / "x.pth", {**state, f"{FC}.{act}": np.float32(4)})
    converted(tmp_path, source, *SIZE, "--prune", "0.6")
    header, _ = raw(tmp_path / "out.safetensors")
    assert header[f"{FC}.weight_values"]["dtype"] == "I8"
    assert {f"{FC}.weight_scale", f"{FC}.input_scale", f"{FC}.bias"} <= header.keys()


def rewritten(path, change):
    """A model file whose stored tensors `change` has changed, whatever sense they make then."""
    data = path.read_bytes()
    header, metadata = raw(path)
    start = 8 + struct.unpack("<Q", data[:8])[0]
    tensors = {
        n: (e["dtype"], e["shape"], data[start + e["data_offsets"][0] : start + e["data_offsets"][1]])
        for n, e in header.items()
    }
    change(tensors)
    entries, body = {"__metadata__": metadata}, b""
    for name, (dtype, shape, content) in tensors.items():
        entries[name] = dict(dtype=dtype, shape=shape, data_offsets=[len(body), len(body) + len(content)])
        body += content
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


VALUES, MASK = f"{FC}.weight_values", f"{FC}.weight_mask"


def cut(tensors, name, count):
    dtype, shape, content = tensors[name]
    width = len(content) // shape[0]
    tensors[name] = dtype, [shape[0] - count], content[: len(content) - count * width]


@pytest.mark.parametrize("change, complaint", [
    (lambda t: t.pop(MASK), f"{FC}.weight is not stored as"),
    (lambda t: t.pop(VALUES), f"{FC}.weight is not stored as"),
    (lambda t: t.update({f"{FC}.weight": ("F32", [1], bytes(4))}), f"{FC}.weight is not stored as"),
    (lambda t: t.update({"x.weight_mask": t[MASK], "x.weight_values": t[VALUES]}), "x.weight is not stored as"),
    (lambda t: cut(t, MASK, 1), f"{MASK} is uint8 (99,), expected uint8 (100,) for {FC}.weight (40, 20)"),
    (lambda t: cut(t, VALUES, 1), f"{VALUES} has shape (399,), but {MASK} has 400 bits"),
    (lambda t: t.update({MASK: ("I8", *t[MASK][1:])}), f"{MASK} is int8"),
    (lambda t: t.update({VALUES: ("F64", *t[VALUES][1:])}), f"{VALUES!r} has a malformed dtype"),
    (lambda t: t.update({VALUES: ("F16", *t[VALUES][1:])}), f"{VALUES!r}: F16 (400,) is not what the file has"),
    (lambda t: t.update({VALUES: ("F32", [-400], b"")}), f"{VALUES!r}: F32 (-400,) is not what the file has"),
    (lambda t: t.update({VALUES: ("F32", [400] + 70 * [1], t[VALUES][2])}), f"{VALUES!r}: F32 (400, 1, 1, "),
])
def test_sparse_tensors_that_are_wrong(tmp_path, capsys, dense, change, complaint):
    target = tmp_path / "sparse.safetensors"
    convert.main([str(dense), "-o", str(target), "--prune", "0.5", "--prune-layerwise"])
    assert complaint in failure(tmp_path, capsys, rewritten(target, change))


def test_bits_past_the_end(tmp_path):
    mask = np.array([0b111], np.uint8)
    tensors = {"a.weight_values": np.ones(3, np.float32), "a.weight_mask": mask}
    assert np.array_equal(model_file.expanded(tensors, {"a.weight": (1, 3)})["a.weight"], [[1, 1, 1]])
    with pytest.raises(model_file.ModelFileError, match="a.weight_mask has bits past the end of a.weight"):
        model_file.expanded(tensors, {"a.weight": (1, 2)})


@pytest.mark.parametrize("make", [
    lambda data: b"",
    lambda data: data[:7],
    lambda data: data[:200],
    lambda data: data[:-1],
    lambda data: b"\x10" + bytes(7) + b"not a header at all",
    lambda data: data.replace(b'"microtome"', b'"macrotome"'),
    lambda data: data.replace(b'"config":"{', b'"config":"['),
    lambda data: data.replace(b'\\"stages\\"', b'\\"steges\\"'),
    lambda data: data.replace(b'\\"mlp_dim\\": 70', b'\\"mlp_dim\\":7.0'),
    lambda data: data.replace(b'\\"mlp_dim\\": 70', b'\\"mlp_dim\\": -7'),
    lambda data: data.replace(b'"__metadata__"', b'"__netadata__"'),
])
def test_files_that_are_no_model_files(tmp_path, capsys, dense, make):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(make(dense.read_bytes()))
    failure(tmp_path, capsys, damaged)


# Model files as what is converted


@pytest.mark.parametrize("storage", ["fp32", "fp16"])
def test_a_model_file_is_converted_to_itself(tmp_path, dense, storage):
    once, twice = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    options = ["--prune", "0.4", "--storage", storage]
    assert convert.main([str(dense), "-o", str(once), *options]) == 0
    assert convert.main([str(once), "-o", str(twice), "--storage", storage]) == 0
    assert once.read_bytes() == twice.read_bytes()
    assert raw(twice)[1]["pruning"] == "global 0.4" and model_file.read(twice)[1] == CONFIG
    assert convert.main([str(once), "-o", str(twice), "--prune-2-4"]) == 0
    assert raw(twice)[1]["pruning"] == "2:4"


def test_16_bit_floats_of_the_other_kind(tmp_path, dense):
    """A BF16 tensor, which other writers make, is widened."""
    def shorten(tensors):
        dtype, shape, content = tensors[f"{FC}.weight"]
        halves = np.frombuffer(content, "<u4") >> 16
        tensors[f"{FC}.weight"] = "BF16", shape, halves.astype("<u2").tobytes()

    before, _, _ = model_file.read(dense)
    after, _, _ = model_file.read(rewritten(dense, shorten))
    assert after[f"{FC}.weight"].dtype == np.float32
    np.testing.assert_allclose(after[f"{FC}.weight"], before[f"{FC}.weight"], rtol=2**-7)


def test_a_model_file_in_8_bits_is_refused(torch, tmp_path, capsys, state):
    act = "input_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value"
    source = save(torch, tmp_path / "x.pth", {**state, f"{FC}.{act}": np.float32(4)})
    converted(tmp_path, source, *SIZE)
    assert "8 bits" in failure(tmp_path, capsys, tmp_path / "out.safetensors", "--prune", "0.5")


def test_a_model_file_has_its_own_image_size(tmp_path, capsys, dense):
    with pytest.raises(SystemExit):
        convert.main([str(dense), "-o", str(tmp_path / "y.safetensors"), *SIZE])
    assert "--image-size" in capsys.readouterr().err
    assert model_file.read(dense)[1] == CONFIG
