"""The program as a user meets it: results, errors, exit codes, and what is left on the disk."""

import json
import os
import resource
import shutil
import signal
import subprocess
import time

import cv2
import numpy as np
import pytest
import torch

import sam
import seeded_weights
from conftest import DATA, ROOT, SHARED, make_case
from make_data import CONFIG


@pytest.fixture(scope="module")
def reference():
    model = sam.Sam(CONFIG).eval()
    state = seeded_weights.seeded_state(CONFIG, seed=3)
    model.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
    return model


def reference_input(image, side):
    scale = side / max(image.shape[:2])
    size = max(1, int(image.shape[1] * scale + 0.5)), max(1, int(image.shape[0] * scale + 0.5))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    small = small.reshape(size[1], size[0], -1).astype(np.float32)
    small = (small - small.min()) / max(small.max() - small.min(), 1e-8)
    padded = np.zeros((side, side, 3), np.float32)
    padded[: size[1], : size[0]] = small
    return padded.transpose(2, 0, 1)[None], size


def reference_segs(model, image, boxes):
    """LiteMedSAM's own way with a 2-D case."""
    side = model.config["image_encoder"]["image_size"]
    pixels, (width, height) = reference_input(image, side)
    segs = np.zeros(image.shape[:2], np.uint8)
    scale = side / max(image.shape[:2])
    with torch.no_grad():
        embedding = model.image_encoder(torch.tensor(pixels))
        for label, box in enumerate(boxes, 1):
            prompt = torch.tensor([[int(v * scale) for v in box]]).float()
            mask, _ = model.decode(embedding, boxes=prompt)
            mask = mask[..., :height, :width]
            mask = torch.nn.functional.interpolate(mask, image.shape[:2], mode="bilinear")
            segs[mask[0, 0].sigmoid().numpy() > 0.5] = label
    return segs


def files_in(folder):
    return sorted(p.name for p in folder.iterdir())


def test_segments_a_case_as_pytorch_does(run, tiny_model, reference, tmp_path):
    boxes = [(5, 6, 40, 50), (20, 10, 60, 69), (0, 0, 61, 70)]
    image = make_case(tmp_path / "a.npz", boxes=boxes)
    done = run("segment", "-m", tiny_model, "-i", tmp_path / "a.npz", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "a.npz" in done.stdout and "3 boxes" in done.stdout
    segs = np.load(tmp_path / "out" / "a.npz")["segs"]
    expected = reference_segs(reference, image, boxes)
    assert segs.dtype == np.uint8 and segs.shape == expected.shape
    assert (segs != expected).mean() < 1e-3 and (segs > 0).any()


def test_trace_of_more_boxes_than_are_decoded_at_once(run, tiny_model, tmp_path):
    boxes = [(i, 2 * i, 30 + i, 40 + i) for i in range(9)]
    make_case(tmp_path / "all.npz", boxes=boxes)
    make_case(tmp_path / "last.npz", boxes=boxes[-1:])
    for name in "all", "last":
        done = run("trace", "-m", tiny_model, "-i", tmp_path / f"{name}.npz", "-o", tmp_path / f"{name}_trace.npz")
        assert done.returncode == 0, done.stderr
    whole, last = np.load(tmp_path / "all_trace.npz"), np.load(tmp_path / "last_trace.npz")
    assert whole.files == last.files and len(whole["low_res_masks"]) == 9
    for name in "low_res_masks", "iou_predictions":
        np.testing.assert_array_equal(whole[name][-1:], last[name])
    for name in "mask_decoder.transformer.queries", "mask_decoder.transformer.keys":
        rows = last[name].shape[1]
        assert whole[name].shape[1] == 9 * rows
        np.testing.assert_array_equal(whole[name][:, -rows:], last[name])


@pytest.mark.parametrize("seed", range(40))
def test_preprocessing_equals_opencv(run, tiny_model, tmp_path, seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 300, 2)
    if seed % 4 == 0:  # whole factors
        height, width = 52 * rng.integers(1, 6), 52 * rng.integers(1, 3)
    image = make_case(tmp_path / "a.npz", seed, (height, width, 3), [(0, 0, 1, 1)])
    done = run("trace", "-m", tiny_model, "-i", tmp_path / "a.npz", "-o", tmp_path / "t.npz",
               "--only", "input")
    assert done.returncode == 0, done.stderr
    expected, _ = reference_input(image, 52)
    np.testing.assert_array_equal(np.load(tmp_path / "t.npz")["input"], expected)


def test_trace_names_every_module(run, tiny_model, reference, tmp_path):
    image = make_case(tmp_path / "a.npz")
    out = tmp_path / "t.npz"
    assert run("trace", "-m", tiny_model, "-i", tmp_path / "a.npz", "-o", out).returncode == 0
    trace = np.load(out)
    outputs = {}
    for name, module in reference.named_modules():
        if name in trace:
            module.register_forward_hook(lambda _, __, y, name=name: outputs.setdefault(name, y))
    boxes = torch.tensor([(int(a * 52 / 70), int(b * 52 / 70), int(c * 52 / 70), int(d * 52 / 70))
                          for a, b, c, d in ((5, 6, 40, 50), (20, 10, 60, 69))]).float()
    with torch.no_grad():
        masks, iou = reference(torch.tensor(reference_input(image, 52)[0]), boxes)
    assert len(outputs) > 30
    for name, value in outputs.items():
        if not name.endswith(".attn"):  # ours is in the order of the map, PyTorch's of the windows
            np.testing.assert_allclose(trace[name], value.numpy(), atol=2e-4, err_msg=name)
    np.testing.assert_allclose(trace["low_res_masks"], masks.numpy(), atol=2e-3)
    np.testing.assert_allclose(trace["iou_predictions"], iou.numpy(), atol=1e-4)
    only = run("trace", "-m", tiny_model, "-i", tmp_path / "a.npz", "-o", out, "--only",
               "image_encoder.layers.1")
    assert only.returncode == 0
    assert all(n.startswith("image_encoder.layers.1.") for n in np.load(out).files)
    nothing = run("trace", "-m", tiny_model, "-i", tmp_path / "a.npz", "-o", out, "--only", "nothing")
    assert nothing.returncode == 2 and "nothing" in nothing.stderr


def test_volumes_folders_workers_and_overlays(run, tiny_model, tmp_path):
    cases = tmp_path / "in"
    cases.mkdir()
    make_case(cases / "v.npz", 1, (6, 40, 50), [(4, 5, 0, 30, 30, 5), (9, 9, 1, 45, 38, 2)])
    make_case(cases / "a.npz", 2)
    make_case(cases / "b.npz", 3)
    results = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        done = run("segment", "-m", tiny_model, "-i", cases, "-o", out, "--workers", workers,
                   "--overlay", tmp_path / "pictures")
        assert done.returncode == 0, done.stderr
        assert files_in(out) == ["a.npz", "b.npz", "v.npz"]
        results.append({n: np.load(out / n)["segs"] for n in files_in(out)})
    for name, segs in results[0].items():
        np.testing.assert_array_equal(segs, results[1][name])
    assert results[0]["v.npz"].shape == (6, 40, 50)
    assert files_in(tmp_path / "pictures") == ["a.png", "b.png", "v_z001.png", "v_z002.png"]
    picture = cv2.imread(str(tmp_path / "pictures" / "v_z002.png"))
    assert max(picture.shape) >= 512


def test_png_images(run, tiny_model, reference, tmp_path):
    image = np.random.default_rng(5).integers(0, 256, (64, 80, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "x.png"), image[..., ::-1])
    done = run("segment", "-m", tiny_model, "-i", tmp_path / "x.png", "-o", tmp_path / "out",
               "--box", "3,4,50,60", "--box", "30,30,79,63")
    assert done.returncode == 0, done.stderr
    expected = reference_segs(reference, image, [(3, 4, 50, 60), (30, 30, 79, 63)])
    # OpenCV shows the palette's colours; the labels are as many as there are colours.
    shown = cv2.imread(str(tmp_path / "out" / "x.png"))
    assert shown.shape == image.shape
    background = (shown == 0).all(-1)
    assert (background != (expected == 0)).mean() < 1e-3


def test_grey_png_and_16_bits(run, tiny_model, tmp_path):
    grey = np.random.default_rng(6).integers(0, 256, (40, 40), np.uint8)
    cv2.imwrite(str(tmp_path / "g.png"), grey)
    cv2.imwrite(str(tmp_path / "d.png"), grey.astype(np.uint16) * 257)
    done = run("segment", "-m", tiny_model, "-i", tmp_path / "g.png", tmp_path / "d.png", "-o",
               tmp_path / "out", "--box", "1,1,30,30")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "g.png").read_bytes() == (tmp_path / "out" / "d.png").read_bytes()


def test_bad_cases_are_named_and_the_others_written(run, tiny_model, tmp_path):
    cases = tmp_path / "in"
    cases.mkdir()
    make_case(cases / "good.npz")
    np.savez(cases / "no_boxes.npz", imgs=np.zeros((9, 9, 3), np.uint8))
    np.savez(cases / "floats.npz", imgs=np.zeros((9, 9, 3), np.float32), boxes=np.zeros((0, 4), int))
    make_case(cases / "outside.npz", boxes=[(62, 0, 70, 9)])
    make_case(cases / "reversed.npz", boxes=[(9, 9, 3, 20)])
    make_case(cases / "z.npz", shape=(4, 30, 30), boxes=[(1, 1, 2, 9, 9, 7)])
    (cases / "cut.npz").write_bytes((cases / "good.npz").read_bytes()[:500])
    (cases / "empty.npz").write_bytes(b"")
    shutil.copy(DATA / "bomb.npz", cases / "bomb.npz")
    done = run("segment", "-m", tiny_model, "-i", cases, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert files_in(tmp_path / "out") == ["good.npz"]
    for name, why in {"no_boxes": "'boxes'", "floats": "'imgs'", "outside": "outside", "z": "slices",
                      "reversed": "reversed", "cut": "archive", "empty": "archive",
                      "bomb": "imgs"}.items():
        line = next(s for s in done.stderr.splitlines() if f"{name}.npz FAILED" in s)
        assert why in line


def test_no_boxes_at_all(run, tiny_model, tmp_path):
    make_case(tmp_path / "a.npz", boxes=np.zeros((0, 4)))
    assert run("segment", "-m", tiny_model, "-i", tmp_path / "a.npz", "-o", tmp_path / "o").returncode == 0
    assert not np.load(tmp_path / "o" / "a.npz")["segs"].any()


def test_more_than_255_boxes(run, tiny_model, tmp_path):
    boxes = [(x, y, x + 9, y + 9) for x in range(0, 50, 3) for y in range(0, 60, 3)]
    make_case(tmp_path / "a.npz", boxes=boxes)
    assert run("segment", "-m", tiny_model, "-i", tmp_path / "a.npz", "-o", tmp_path / "o").returncode == 0
    segs = np.load(tmp_path / "o" / "a.npz")["segs"]
    assert segs.dtype == np.uint16 and segs.max() > 255


@pytest.mark.parametrize(
    "arguments, why",
    [
        ((), "subcommand"),
        (("segment",), "--model"),
        (("segment", "-m", "M", "-i", "nowhere.npz", "-o", "O"), "nowhere.npz"),
        (("segment", "-m", "M", "-i", "I/a.txt", "-o", "O"), "a.txt"),
        (("segment", "-m", "M", "-i", "I/a.npz", "-o", "I"), "replace an input"),
        (("segment", "-m", "M", "-i", "I/a.npz", "I/b/a.npz", "-o", "O"), "for both"),
        (("segment", "-m", "M", "-i", "I/x.png", "-o", "O"), "--box"),
        (("segment", "-m", "M", "-i", "I/x.png", "-o", "O", "--overlay", "I", "--box", "1,2,3,4"),
         "replace an input"),
        (("segment", "-m", "M", "-i", "I/x.png", "-o", "O", "--overlay", "O", "--box", "1,2,3,4"),
         "twice for"),
        (("segment", "-m", "M", "-i", "I/x.png", "-o", "O", "--box", "1,2,3"), "1,2,3"),
        (("segment", "-m", "M", "-i", "I/a.npz", "-o", "O", "--box", "1,2,3,4"), "--box"),
        (("segment", "-m", "M", "-i", "I/a.npz", "-o", "O", "--threads", "-1"), "--threads"),
        (("segment", "-m", "M", "-i", "I/a.npz", "-o", "O", "--padding", "some"), "--padding"),
        (("segment", "-m", "M", "-i", "I/e", "-o", "O"), "no .npz"),
        (("bench", "-m", "M", "--runs", "0"), "--runs"),
        (("fly",), "subcommand"),
    ],
)
def test_wrong_usage_is_2(run, tiny_model, tmp_path, arguments, why):
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (folder / "e").mkdir()
    make_case(folder / "a.npz")
    make_case(folder / "b" / "a.npz")
    (folder / "a.txt").write_text("text")
    cv2.imwrite(str(folder / "x.png"), np.zeros((9, 9, 3), np.uint8))
    given = [str(a).replace("I/", f"{folder}/") if a.startswith("I/") else a for a in arguments]
    given = [{"M": tiny_model, "O": tmp_path / "out", "I": folder}.get(a, a) for a in given]
    done = run(*given)
    assert done.returncode == 2, done.stderr
    assert why in done.stderr + done.stdout
    assert not (tmp_path / "out").exists() or not files_in(tmp_path / "out")


def test_help_and_version(run):
    for arguments in (["--help"], ["segment", "--help"], ["--version"]):
        assert run(*arguments).returncode == 0


def test_bad_models(run, tiny_model, tmp_path):
    make_case(tmp_path / "a.npz")
    sound = tiny_model.read_bytes()
    for name, data, why in [("empty", b"", "short"), ("cut", sound[:4000], "truncated"),
                            ("half", sound[: len(sound) // 2], "truncated"),
                            ("zip", (tmp_path / "a.npz").read_bytes(), "ZIP archive")]:
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        done = run("segment", "-m", path, "-i", tmp_path / "a.npz", "-o", tmp_path / "out")
        assert done.returncode == 1
        assert f"{name}.safetensors" in done.stderr and why in done.stderr
    assert not files_in(tmp_path / "out")


def test_an_output_folder_that_cannot_be_written(run, tiny_model, tmp_path):
    make_case(tmp_path / "a.npz")
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        done = run("segment", "-m", tiny_model, "-i", tmp_path / "a.npz", "-o", folder)
        assert done.returncode == 1 and str(folder) in done.stderr
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_leaves_the_old_result(run, tiny_model, tmp_path):
    """A limit on the size of files stands for the disk: writing fails half-way."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (600, 600, 3), np.uint8)
    boxes = [tuple(int(v) for v in (x, y, x + 150, y + 150)) for x, y in rng.integers(0, 449, (40, 2))]
    np.savez(tmp_path / "a.npz", imgs=image, boxes=np.array(boxes))
    out = tmp_path / "out"
    assert run("segment", "-m", tiny_model, "-i", tmp_path / "a.npz", "-o", out).returncode == 0
    before = (out / "a.npz").read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    done = run("segment", "-m", tiny_model, "-i", tmp_path / "a.npz", "-o", out, preexec_fn=limit)
    assert done.returncode == 1 and "a.npz" in done.stderr
    assert files_in(out) == ["a.npz"] and (out / "a.npz").read_bytes() == before


def test_bench_prints_one_json_object(run, tiny_model):
    done = run("bench", "-m", tiny_model, "--runs", 3, "--threads", 2, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result) == ["model", "precision", "target", "threads", "runs", "encoder_ms",
                            "decoder_ms", "batched_box_ms", "gflops", "peak_gflops", "encoder_peak_rss_mb",
                            "peak_rss_mb"]
    assert result["threads"] == 2 and result["runs"] == 3 and result["precision"] == "fp32"
    for part in ("encoder_ms", "decoder_ms"):
        assert 0 < result[part]["min"] <= result[part]["median"] <= result[part]["max"]
    assert 0 < result["gflops"] < result["peak_gflops"]
    assert 1 < result["encoder_peak_rss_mb"] <= result["peak_rss_mb"] < 500
    table = run("bench", "-m", tiny_model, "--runs", 1)
    assert all(s in table.stdout for s in ("encoder", "decoder", "layers.3", "neck", "GFLOP/s"))


def test_info(run, tiny_model):
    assert "target" in run("info").stdout
    text = run("info", "-m", tiny_model).stdout
    assert "image_encoder.layers.0.blocks.0.conv1.c.weight" in text and "windows 7 x 7" in text


def test_efficientvit_goes_through_every_command(run, tmp_path):
    """Another model of the family, with prompts in a frame of another size than its input."""
    model = ROOT / "tests" / "data" / "tiny_efficientvit.safetensors"
    cases = tmp_path / "cases"
    cases.mkdir()
    make_case(cases / "image.npz")
    make_case(cases / "volume.npz", shape=(5, 61, 70), boxes=((5, 6, 1, 40, 50, 4), (20, 10, 0, 60, 55, 3)))
    for way in ("on", "off"):
        done = run("segment", "-m", model, "-i", cases, "-o", tmp_path / way, "--winograd", way)
        assert done.returncode == 0, done.stderr
    for name in ("image", "volume"):
        on, off = (np.load(tmp_path / way / f"{name}.npz")["segs"] for way in ("on", "off"))
        assert on.any() and (on == off).mean() > 0.999
    text = run("info", "-m", model).stdout
    for part in ("efficientvit", "input         48 x 48", "antialiased", "104 x 104", "blocks of linear attention"):
        assert part in text
    assert "stages.2" in run("bench", "-m", model, "--runs", 1).stdout
    labelled = tmp_path / "labelled"
    labelled.mkdir()
    case = dict(np.load(cases / "image.npz"))
    np.savez(labelled / "image.npz", **case, gts=np.load(tmp_path / "on" / "image.npz")["segs"])
    ranges, moments, int8 = tmp_path / "r.json", tmp_path / "m.safetensors", tmp_path / "int8.safetensors"
    for command in (
        ("calibrate", "-m", model, "-i", cases, "-o", ranges, "--moments", moments),
        ("quantize", "-m", model, "-r", ranges, "--moments", moments, "-o", int8),
        ("segment", "-m", int8, "-i", cases, "-o", tmp_path / "int8"),
        ("segment", "-m", model, "-i", cases, "-o", tmp_path / "bf16", "--precision", "bf16"),
        ("sensitivity", "-m", model, "-i", labelled, "-r", ranges, "-o", tmp_path / "s.csv", "--by", "layer"),
    ):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    for way in ("int8", "bf16"):
        assert (np.load(tmp_path / way / "image.npz")["segs"] == np.load(tmp_path / "on" / "image.npz")["segs"]).mean() > 0.9
    assert "3:1:depth_conv" in (tmp_path / "s.csv").read_text()


def test_flops_are_those_that_pytorch_counts(run, tmp_path):
    """On maps that need no padding, so that the reference does no extra work."""
    from torch.utils.flop_counter import FlopCounterMode

    import convert
    import model_file

    config = json.loads(json.dumps(CONFIG))
    config["image_encoder"]["image_size"] = config["input"]["frame"] = 56
    for stage, window in zip(config["image_encoder"]["stages"][1:], (7, 7, 14)):
        stage["window"] = window
    tensors, _ = convert.convert(seeded_weights.seeded_state(config, 1), config)
    model_file.write(tmp_path / "m.safetensors", tensors, config)
    model = sam.Sam(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.image_encoder(torch.zeros(1, 3, 56, 56))
    result = json.loads(run("bench", "-m", tmp_path / "m.safetensors", "--runs", 1, "--json").stdout)
    flops = result["gflops"] * 1e6 * result["encoder_ms"]["median"]
    assert flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_the_progress_bar_on_a_terminal(program, tiny_model, tmp_path):
    import pty

    make_case(tmp_path / "v.npz", 1, (9, 40, 50), [(4, 5, 0, 30, 30, 8)])
    master, slave = pty.openpty()
    done = subprocess.run([program, "segment", "-m", tiny_model, "-i", tmp_path / "v.npz", "-o",
                           tmp_path / "out"], stdout=subprocess.PIPE, stderr=slave, timeout=60)
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    assert done.returncode == 0
    assert "cases 0/1" in shown and "[" in shown
    assert done.stdout.decode().startswith("[1/1] v.npz")


def test_memory_on_a_large_image(program, golden_folder, tmp_path):
    model = os.environ.get("MICROTOME_GOLDEN_MODEL")
    if not model:
        pytest.skip("MICROTOME_GOLDEN_MODEL is not set")
    command = [program, "segment", "-m", model, "-i", SHARED / "data" / "mammography_2d.npz", "-o", tmp_path]
    if os.environ.get("MICROTOME_SANITIZED"):
        pytest.skip("sanitizers take memory of their own")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        peak = 0  # kB; the system's own count of a finished process includes its parent's at the start
        while process.poll() is None:
            with open(f"/proc/{process.pid}/status") as status:
                lines = [s.split() for s in status if s.startswith("VmHWM")]
            peak = max([peak, *(int(words[1]) for words in lines)])
            time.sleep(0.005)
    assert process.returncode == 0
    assert 40e3 < peak <= 250e6 / 1024
