"""HACKING.md's model, added to the letter: three files and a row, and the program's masks are PyTorch's."""

import re
import shutil
import subprocess
import sys

import numpy as np

from conftest import ROOT

BOX = (9, 12, 40, 50)

MAKE = """
import sys
import numpy as np, torch
import architecture, sam

torch.manual_seed(5)
flat = dict(depth=2, heads=8, mlp_dim=64, attention_downsample=2, multimask_outputs=3, iou_hidden=32, iou_depth=3)
encoder = dict(kind="plain_net", image_size=64, dim=20, depth=2, embed_dim=32)
policy = architecture.encoders.KNOWN["plain_net"].input_policy(encoder)
config = dict(input=policy, image_encoder=encoder, mask_in_chans=12, decoder=flat | dict(norm_epsilon=1e-5))
model = sam.Sam(config).eval()
torch.save(model.state_dict(), "checkpoint.pth")
assert architecture.infer_config({k: tuple(v.shape) for k, v in model.state_dict().items()}, 64) == config
pixels = np.load("image.npy").astype(np.float32)
image = torch.tensor((pixels - pixels.min()) / (pixels.max() - pixels.min())).permute(2, 0, 1)[None]
with torch.no_grad():
    masks, _ = model(image, torch.tensor([%s]).float())
np.save("expected.npy", masks[0, 0].numpy() > 0)
""" % (list(BOX),)


def test_the_worked_example(tmp_path):
    page = (ROOT / "HACKING.md").read_text()
    page = page[page.index("## Adding a model") : page.index("## Testing")]
    for folder in ("kernels", "include", "converters", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    before = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    header, include, row = re.findall(r"```cpp\n(.*?)```", page, re.S)
    files = re.findall(r"`((?:include|converters)/\S+plain_net\.\w+)`", page)
    assert len(files) == 3
    for name, text in zip(files, [header, *re.findall(r"```python\n(.*?)```", page, re.S)], strict=True):
        assert not (tmp_path / name).exists(), f"{name} is there already: HACKING.md needs another example"
        (tmp_path / name).write_text(text)
    table = tmp_path / re.search(r"row of the table in `([\w/.]+)`", page)[1]
    text = table.read_text()
    changed = re.sub(r"(#include <microtome/models/\w+\.hpp>\n)", include + r"\1", text, count=1)
    changed = re.sub(r"(using encoder_types = std::variant<.*\n)", r"\1" + row, changed, count=1)
    assert len(changed.splitlines()) == len(text.splitlines()) + 2
    table.write_text(changed)

    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (64, 64, 3), np.uint8)
    np.save(tmp_path / "image.npy", image)
    (tmp_path / "image.ppm").write_bytes(b"P6\n64 64\n255\n" + image.tobytes())
    paths = [str(tmp_path / "converters"), str(tmp_path / "converters" / "reference")]
    make = f"import sys; sys.path[:0] = {paths}\n" + MAKE
    for command in (
        [sys.executable, "-c", make],
        [sys.executable, "converters/convert.py", "checkpoint.pth", "--image-size", "64", "-o", "m.safetensors"],
        ["g++", "-std=c++20", "-O1", "-march=x86-64-v3", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-Iinclude", "-I.",
         "examples/embed/main.cpp", "-o", "embed"],
        ["./embed", "m.safetensors", "image.ppm", *map(str, BOX), "mask.pgm"],
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    mask = np.frombuffer((tmp_path / "mask.pgm").read_bytes()[-64 * 64:], np.uint8).reshape(64, 64) > 0
    expected = np.load(tmp_path / "expected.npy")
    assert mask.any() and not mask.all()
    assert (mask == expected).mean() > 0.999

    after = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    touched = [str(name) for name in before if after[name] != before[name]]
    assert touched == [str(table.relative_to(tmp_path))]
