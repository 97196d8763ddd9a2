"""Reading of .pth files: everything that training writes, nothing that executes."""

import collections
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

import checkpoint


def save(path, content):
    torch.save(content, path)
    return path


@pytest.fixture
def state():
    torch.manual_seed(0)
    return collections.OrderedDict(a=torch.randn(3, 5), b=torch.randn(7), c=torch.tensor(4))


def check(loaded, state):
    assert list(loaded) == list(state)
    for name, value in state.items():
        np.testing.assert_array_equal(loaded[name], value.numpy())


def test_bare_state_dict(tmp_path, state):
    check(checkpoint.load(save(tmp_path / "x.pth", state)), state)


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "_orig_mod.module.", "module.module.", "model.",
                                    "model._orig_mod.", "module.model.net.module."])
def test_training_checkpoint(tmp_path, state, key, prefix):
    parameters = [torch.nn.Parameter(torch.ones(4))]
    optimizer = torch.optim.AdamW(parameters)
    parameters[0].grad = torch.ones(4)
    optimizer.step()
    content = {
        "epoch": 7,
        key: collections.OrderedDict((prefix + k, v) for k, v in state.items()),
        "optimizer": optimizer.state_dict(),
        "best_loss": np.float64(0.25),
        "loss": torch.tensor(0.5),  # tensors beside the model make no model of what is around it
        "rng_state": torch.get_rng_state(),
        "losses": [0.5, 0.25],
        "note": None,
    }
    check(checkpoint.load(save(tmp_path / "x.pth", content)), state)


def test_wrappers_inside_and_two_levels_down(tmp_path, state):
    inside = {f"encoder._orig_mod.module.{k}": v for k, v in state.items()} | {"decoder.module.d": torch.ones(2)}
    loaded = checkpoint.load(save(tmp_path / "x.pth", {"checkpoint": {"model": inside, "ema": {"decay": 1}}}))
    assert list(loaded) == [f"encoder.{k}" for k in state] + ["decoder.d"]


@pytest.fixture
def model():
    torch.manual_seed(1)
    return {f"{part}.{n}.weight": torch.randn(3) for part in ("image_encoder", "prompt_encoder", "mask_decoder")
            for n in "ab"}


@pytest.mark.parametrize("prefix", ["model.", "net.", "module.model._orig_mod.", "model.sam."])
def test_tensors_beside_the_model(tmp_path, model, prefix):
    beside = {"loss_fn.weight": torch.ones(3), "metric.total": torch.tensor(4), "teacher.mask_decoder.a": torch.ones(2)}
    content = {"state_dict": beside | {prefix + name: value for name, value in model.items()}}
    notes = []
    check(checkpoint.load(save(tmp_path / "x.pth", content), notes.append), model)
    bare = ".".join(p for p in prefix.split(".") if p not in checkpoint.WRAPPERS)
    assert notes == [f"left out, as they are not below {bare!r}: 'loss_fn.weight', 'metric.total', "
                     "'teacher.mask_decoder.a'"]


def test_nothing_is_left_out_of_the_model_itself(tmp_path, model):
    notes = []
    for content in (model | {"loss_fn.weight": torch.ones(3)},
                    {f"model.{n}": v for n, v in model.items()} | {"model.loss_fn.weight": torch.ones(3)}):
        loaded = checkpoint.load(save(tmp_path / "x.pth", content), notes.append)
        assert loaded.keys() == model.keys() | {"loss_fn.weight"} and not notes


@pytest.mark.parametrize("first, second", [("model.", ""), ("", "sam."), ("net.", "model."), ("net.model.", "net.")])
def test_models_in_two_places(tmp_path, model, first, second):
    names = list(model)
    content = {first + name: model[name] for name in names[:3]} | {second + name: model[name] for name in names[3:]}
    content["loss_fn.weight"] = torch.ones(3)
    with pytest.raises(checkpoint.CheckpointError, match="in more than one place") as error:
        checkpoint.load(save(tmp_path / "x.pth", content))
    assert repr(first + names[0]) in str(error.value) and repr(second + names[3]) in str(error.value)


def test_names_that_wrappers_told_apart(tmp_path):
    content = {"module.a": torch.ones(2), "_orig_mod.a": torch.zeros(2)}
    with pytest.raises(checkpoint.CheckpointError, match="two tensors are both 'a'.*'_orig_mod.a'"):
        checkpoint.load(save(tmp_path / "x.pth", content))


def test_state_dict_of_a_module(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    check(checkpoint.load(save(tmp_path / "x.pth", module.state_dict())), module.state_dict())


def test_parameters(tmp_path, state):
    wrapped = {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()}
    loaded = checkpoint.load(save(tmp_path / "x.pth", wrapped))
    np.testing.assert_array_equal(loaded["a"], state["a"])


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
     torch.int8, torch.uint8, torch.bool],
)
def test_dtypes(tmp_path, dtype):
    values = torch.arange(-3, 9).to(dtype)
    loaded = checkpoint.load(save(tmp_path / "x.pth", {"x": values}))["x"]
    expected = values.float() if dtype == torch.bfloat16 else values
    np.testing.assert_array_equal(loaded, expected.numpy())


def test_views_and_shared_storage(tmp_path):
    base = torch.arange(60.0).reshape(3, 4, 5)
    content = {"t": base.transpose(0, 2), "s": base[1:, ::2, 1:4], "e": base[:0], "all": base}
    check(checkpoint.load(save(tmp_path / "x.pth", content)), content)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/microtome_was_here",)


@pytest.mark.parametrize("place", [lambda e: e, lambda e: {"model": {"a": torch.ones(2)}, "x": e}])
def test_nothing_is_executed(tmp_path, place):
    path = save(tmp_path / "evil.pth", place(Evil()))
    with pytest.raises(checkpoint.CheckpointError, match="system"):
        checkpoint.load(path)
    assert not os.path.exists("/tmp/microtome_was_here")


@pytest.mark.parametrize(
    "module, name",
    [("builtins", "eval"), ("builtins", "getattr"), ("torch", "load"), ("torch.nn", "Linear"),
     ("numpy", "fromfile"), ("collections", "defaultdict"), ("torch._utils", "_rebuild_wrapper")],
)
def test_other_globals_are_refused(tmp_path, module, name):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")R.")
    with pytest.raises(checkpoint.CheckpointError, match=f"{module}.{name}"):
        checkpoint.load(path)


def test_a_whole_module_is_refused_with_advice(tmp_path):
    path = save(tmp_path / "x.pth", torch.nn.Linear(2, 2))
    with pytest.raises(checkpoint.CheckpointError, match="state_dict"):
        checkpoint.load(path)


@pytest.mark.parametrize("content", [3, [torch.ones(2)], {}, {"a": 3}, {"model": {"b": "c"}}])
def test_no_state_dict(tmp_path, content):
    with pytest.raises(checkpoint.CheckpointError, match="no state dict"):
        checkpoint.load(save(tmp_path / "x.pth", content))


def test_cut_off_anywhere(tmp_path, state):
    whole = save(tmp_path / "x.pth", state).read_bytes()
    for size in range(0, len(whole), 97):
        cut = tmp_path / "cut.pth"
        cut.write_bytes(whole[:size])
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.load(cut)


def test_damaged_anywhere(tmp_path, state):
    """A flipped bit gives an error or, where it hits a name or a number, something else: no crash."""
    whole = save(tmp_path / "x.pth", state).read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        (tmp_path / "d.pth").write_bytes(damaged)
        try:
            checkpoint.load(tmp_path / "d.pth")
        except checkpoint.CheckpointError:
            pass


def replace_in_pickle(path, old, new):
    """Changes the pickle inside the archive, checksums and all."""
    with zipfile.ZipFile(path) as archive:
        entries = {n: archive.read(n) for n in archive.namelist()}
    name = next(n for n in entries if n.endswith("data.pkl"))
    assert old in entries[name]
    entries[name] = entries[name].replace(old, new)
    with zipfile.ZipFile(path, "w") as archive:
        for n, data in entries.items():
            archive.writestr(n, data)


def test_a_tensor_beyond_its_storage(tmp_path):
    path = save(tmp_path / "x.pth", {"x": torch.zeros(77, 1)})
    replace_in_pickle(path, bytes([ord("K"), 77, ord("K"), 1, 0x86]), bytes([ord("K"), 99, ord("K"), 1, 0x86]))
    with pytest.raises(checkpoint.CheckpointError, match="99"):
        checkpoint.load(path)


def test_a_storage_that_is_missing(tmp_path, state):
    path = save(tmp_path / "x.pth", state)
    with zipfile.ZipFile(path) as archive:
        entries = {n: archive.read(n) for n in archive.namelist() if not n.endswith("data/1")}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(checkpoint.CheckpointError, match="'b'.*missing"):
        checkpoint.load(path)


def test_the_format_before_1_6(tmp_path, state):
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(checkpoint.CheckpointError, match="1.6"):
        checkpoint.load(tmp_path / "x.pth")


def test_a_plain_pickle(tmp_path):
    (tmp_path / "x.pth").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(checkpoint.CheckpointError, match="no ZIP"):
        checkpoint.load(tmp_path / "x.pth")


def test_a_number_that_python_would_reserve_memory_for(tmp_path):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}r\xff\xff\xff\x7f.")  # 32 GB in Python's unpickler
    with pytest.raises(checkpoint.CheckpointError, match="object 2147483647 in 9 bytes"):
        checkpoint.load(path)


@pytest.mark.parametrize("of", ["storage", "tensor", "type"])
@pytest.mark.parametrize(
    "fields",
    [("",), (None, -(1 << 33), (1 << 30,), (1 << 20,)), {"dtype": "", "shape": (1 << 30,), "offset": -(1 << 33)},
     (None, {"dtype": "", "elements": 1 << 30, "shape": (1 << 30,), "offset": -(1 << 33)})],
)  # fmt: skip
def test_fields_that_a_pickle_sets_after_they_were_checked(tmp_path, state, of, fields):
    good = save(tmp_path / "good.pth", state)
    path = save(tmp_path / "x.pth", {"a": torch.ones(7)})
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("x/data.pkl")
    made = {"storage": b"Q", "tensor": b"R", "type": b"FloatStorage\nq\x04"}[of]
    assert made in pickled
    # What pickle makes of the fields, without its first bytes and its last, and the instruction to set them.
    setting = pickle.dumps(fields, protocol=2)[2:-1] + b"b"
    place = pickled.rindex(made) + len(made)
    replace_in_pickle(path, pickled, pickled[:place] + setting + pickled[place:])
    with pytest.raises(checkpoint.CheckpointError, match="data.pkl is damaged"):
        checkpoint.load(path)
    check(checkpoint.load(good), state)


def test_attributes_of_a_state_dict(tmp_path, state):
    """PyTorch sets `_metadata`; what hides a method of the dictionary changes nothing either."""
    path = save(tmp_path / "x.pth", state)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("x/data.pkl")
    setting = pickle.dumps({"_metadata": 1, "items": 1, "values": 1, "get": 1, "keys": 1}, protocol=2)[2:-1] + b"b."
    replace_in_pickle(path, pickled, pickled[:-1] + setting)
    check(checkpoint.load(path), state)
