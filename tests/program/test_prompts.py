"""Boxes, points, masks of earlier runs and multimask from the program, against PyTorch."""

import cv2
import numpy as np
import pytest
import torch

import sam
import seeded_weights
from conftest import DATA, make_case
from make_data import MODELS

HEIGHT, WIDTH = 70, 61


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """The model file and the PyTorch reference with the same weights."""
    config, seed = MODELS[request.param]
    reference = sam.Sam(config).eval()
    state = seeded_weights.seeded_state(config, seed=seed)
    reference.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
    return DATA / f"{request.param}.safetensors", reference


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(7).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    pixels = cv2.GaussianBlur(pixels, (9, 9), 3)
    cv2.imwrite(str(tmp_path / "photo.png"), pixels[..., ::-1])
    return pixels


def reference_answer(run, model, image, folder, prompts, multimask=False):
    """Logits (objects, side, side) and IoU predictions of the reference. Each prompt is a dict of box, points, labels
    and mask, in pixels of the image."""
    path, reference = model
    np.savez(folder / "traced.npz", imgs=image, boxes=np.array([[0, 0, 5, 5]]))
    done = run("trace", "-m", path, "-i", folder / "traced.npz", "-o", folder / "trace.npz", "--only", "input")
    assert done.returncode == 0, done.stderr
    policy = reference.config["input"]
    scale = policy["frame"] / max(HEIGHT, WIDTH)
    fitted = np.floor(np.array([WIDTH, HEIGHT]) * scale + 0.5)

    def to_frame(coordinates):
        pairs = np.array(coordinates, float).reshape(-1, 2)
        if policy["coordinates"] == "truncated":
            pairs = np.trunc(pairs * scale)
        else:
            pairs = pairs * (fitted / [WIDTH, HEIGHT])
        return torch.tensor(pairs).float()

    logits, predictions = [], []
    with torch.no_grad():
        embedding = reference.image_encoder(torch.tensor(np.load(folder / "trace.npz")["input"]))
        for prompt in prompts:
            arguments = {}
            if "box" in prompt:
                arguments["boxes"] = to_frame(prompt["box"]).reshape(1, 4)
            if "points" in prompt:
                arguments["points"] = to_frame(prompt["points"])[None]
                arguments["labels"] = torch.tensor([prompt["labels"]])
            if "mask" in prompt:
                arguments["masks"] = torch.tensor(prompt["mask"])[None, None]
            masks, iou = reference.decode(embedding, multimask, **arguments)
            best = iou[0].argmax()
            logits.append(masks[0, best].numpy())
            predictions.append(iou[0, best].item())
    return np.stack(logits), np.array(predictions)


def full_masks(logits, frame):
    """Where logits, through the square of the frame, are above 0 at the image's size."""
    logits = torch.tensor(logits)[None]
    logits = torch.nn.functional.interpolate(logits, (frame, frame), mode="bilinear")
    width, height = (int(n * frame / max(HEIGHT, WIDTH) + 0.5) for n in (WIDTH, HEIGHT))
    logits = torch.nn.functional.interpolate(logits[..., :height, :width], (HEIGHT, WIDTH), mode="bilinear")
    return (logits[0] > 0).numpy()


def check_logits(folder, name, expected, predictions):
    found = np.load(folder / name)
    assert found["low_res_masks"].dtype == np.float32 and found["low_res_masks"].shape == expected.shape
    np.testing.assert_allclose(found["low_res_masks"], expected, atol=2e-3 * max(1, expected.std()))
    np.testing.assert_allclose(found["iou_predictions"], predictions, atol=1e-4)


PROMPTS = {
    "a point": (["--point", "30,40,1"], [dict(points=[(30, 40)], labels=[1])]),
    "points in and out": (["--point", "30.5,40.25,1", "--point", "3,60,0"],
                          [dict(points=[(30.5, 40.25), (3, 60)], labels=[1, 0])]),
    "a box and points": (["--box", "5,6,40,50", "--point", "9,9,0", "--point", "20,21,1"],
                         [dict(box=(5, 6, 40, 50), points=[(9, 9), (20, 21)], labels=[0, 1])]),
    "several objects": (["--box", "5,6,40,50", "--box", "20,10,60,69", "--point", "30,40,1,2", "--point", "8,8,1,3",
                         "--point", "50,60,0,3"],
                        [dict(box=(5, 6, 40, 50)), dict(box=(20, 10, 60, 69), points=[(30, 40)], labels=[1]),
                         dict(points=[(8, 8), (50, 60)], labels=[1, 0])]),
}


@pytest.mark.parametrize("multimask", [False, True], ids=["one", "multimask"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_give_what_pytorch_gives(run, model, image, tmp_path, kind, multimask):
    options, prompts = PROMPTS[kind]
    done = run("segment", "-m", model[0], "-i", tmp_path / "photo.png", "-o", tmp_path / "out", "--logits",
               tmp_path / "logits", *options, *(["--multimask"] if multimask else []))
    assert done.returncode == 0, done.stderr
    expected, predictions = reference_answer(run, model, image, tmp_path, prompts, multimask)
    check_logits(tmp_path / "logits", "photo.npz", expected, predictions)
    assert ("object" if "box" not in prompts[-1] else "box") in done.stdout
    covered = cv2.imread(str(tmp_path / "out" / "photo.png")).any(2)
    assert (covered != full_masks(expected, model[1].config["input"]["frame"]).any(0)).mean() < 1e-3


def test_multimask_takes_the_mask_with_the_best_prediction(run, model, image, tmp_path):
    """And is not by chance the same as without."""
    _, prompts = PROMPTS["a point"]
    one, _ = reference_answer(run, model, image, tmp_path, prompts)
    best, _ = reference_answer(run, model, image, tmp_path, prompts, multimask=True)
    assert np.abs(one - best).max() > 0.1


@pytest.mark.parametrize("options", [["--point", "30,40,1"], ["--box", "5,6,40,50"], []],
                         ids=["point", "box", "mask alone"])
@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_mask_of_an_earlier_run_is_a_prompt(run, model, image, tmp_path, options, given):
    first = ["segment", "-m", model[0], "-i", tmp_path / "photo.png", "-o", tmp_path / "out"]
    done = run(*first, "--point", "30,40,1", "--logits", tmp_path / "first")
    assert done.returncode == 0, done.stderr
    mask = np.load(tmp_path / "first" / "photo.npz")["low_res_masks"][0]
    earlier = tmp_path / "first" / ("photo.npz" if given == "file" else "")
    done = run(*first, *options, "--mask", earlier, "--logits", tmp_path / "second")
    assert done.returncode == 0, done.stderr
    prompt = dict(mask=mask)
    if "--point" in options:
        prompt |= dict(points=[(30, 40)], labels=[1])
    if "--box" in options:
        prompt |= dict(box=(5, 6, 40, 50))
    check_logits(tmp_path / "second", "photo.npz", *reference_answer(run, model, image, tmp_path, [prompt]))


def test_points_of_a_case(run, model, image, tmp_path):
    points = [(30.5, 40, 1, 2), (3, 60, 0, 1), (8, 8, 1, 2)]
    np.savez(tmp_path / "a.npz", imgs=image, boxes=np.array([[5, 6, 40, 50]]), points=np.array(points))
    np.savez(tmp_path / "b.npz", imgs=image, points=np.array(points[1:]))
    done = run("segment", "-m", model[0], "-i", tmp_path / "a.npz", tmp_path / "b.npz", "-o", tmp_path / "out",
               "--logits", tmp_path / "logits")
    assert done.returncode == 0, done.stderr
    outside, inside = dict(points=[(3, 60)], labels=[0]), dict(points=[(8, 8)], labels=[1])
    check_logits(tmp_path / "logits", "a.npz", *reference_answer(run, model, image, tmp_path, [
        outside | dict(box=(5, 6, 40, 50)), dict(points=[(30.5, 40), (8, 8)], labels=[1, 1])]))
    check_logits(tmp_path / "logits", "b.npz", *reference_answer(run, model, image, tmp_path, [outside, inside]))
    assert np.load(tmp_path / "out" / "a.npz")["segs"].shape == (HEIGHT, WIDTH)


def test_multimask_of_a_volume(run, tiny_model, tmp_path):
    """Its middle slice is what the slice alone gives."""
    volume = np.random.default_rng(1).integers(0, 256, (3, HEIGHT, WIDTH), np.uint8)
    np.savez(tmp_path / "v.npz", imgs=volume, boxes=np.array([[5, 6, 0, 40, 50, 2]]))
    np.savez(tmp_path / "s.npz", imgs=volume[1], boxes=np.array([[5, 6, 40, 50]]))
    segs = {}
    for name, options in (("one", []), ("three", ["--multimask"])):
        done = run("segment", "-m", tiny_model, "-i", tmp_path / "v.npz", tmp_path / "s.npz", "-o", tmp_path / name,
                   *options)
        assert done.returncode == 0, done.stderr
        segs[name] = np.load(tmp_path / name / "v.npz")["segs"]
        np.testing.assert_array_equal(segs[name][1], np.load(tmp_path / name / "s.npz")["segs"])
    assert (segs["one"] != segs["three"]).any()


@pytest.mark.parametrize("options, complaint", [
    (["--point", "1,2"], "--point 1,2: expected x,y,label"),
    (["--point", "1,2,3"], "--point 1,2,3: expected x,y,label"),
    (["--point", "1,2,1,1,1"], "expected x,y,label"),
    (["--point", "1,nan,1"], "expected x,y,label"),
    (["--point", "1,2,1,2"], "object from 1 to 1"),
    (["--point", "1,2,1,0"], "object from 1 to 1"),
    (["--point", "1,2,1,1.5"], "object from 1 to 1"),
    (["--point", "1,2,1,2", "--point", "2,2,1,2"], "nothing for object 1"),
    (["--box", "1,2,8,9", "--box", "1,2,9,9", "--point", "1,2,1"], "which of the 2 boxes"),
    (["--box", "1,2,8,9.5"], "four whole numbers"),
    (["--box", "1,2,8"], "four whole numbers"),
    (["--mask", "nowhere"], "nowhere: no such file"),
])
def test_prompts_that_make_no_sense(run, tiny_model, image, tmp_path, options, complaint):
    done = run("segment", "-m", tiny_model, "-i", tmp_path / "photo.png", "-o", tmp_path / "out", *options)
    assert done.returncode == 2 and complaint in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_bad_point_costs_its_object_alone(run, tiny_model, image, tmp_path):
    done = run("segment", "-m", tiny_model, "-i", tmp_path / "photo.png", "-o", tmp_path / "out", "--overlay",
               tmp_path / "pictures", "--logits", tmp_path / "logits", "--box", "5,6,40,50", "--point", "300,4,1,2",
               "--point", "5,4,0,3")
    assert done.returncode == 1
    assert "object 1: point 0 (300, 4) lies outside the image of 61 x 70 pixels" in done.stderr
    found = np.load(tmp_path / "logits" / "photo.npz")
    assert np.isnan(found["iou_predictions"]).tolist() == [False, True, False]
    assert (tmp_path / "pictures" / "photo.png").exists()


@pytest.mark.parametrize("arrays, complaint", [
    (dict(points=np.ones((1, 3))), "array 'points' has shape (1, 3), expected (N, 4)"),
    (dict(points=np.array([[1, 2, 5, 1]])), "holds label 5"),
    (dict(points=np.array([[1, 2, 1, 3]])), "holds object 3"),
    (dict(points=np.array([[1, 2, 1, 0]])), "holds object 0"),
    (dict(points=np.array([[1, np.nan, 1, 1]])), "point 0 (1, nan) lies outside"),
    (dict(points=np.ones((70, 4))), "has 70 points, at most 64"),
    (dict(imgs=np.zeros((4, 9, 9), np.uint8), boxes=np.ones((1, 6), int), points=np.ones((1, 4))),
     "points are for images"),
    (dict(), "array 'boxes' is missing"),
])
def test_bad_points_of_a_case(run, tiny_model, tmp_path, arrays, complaint):
    np.savez(tmp_path / "a.npz", **(dict(imgs=np.zeros((9, 9, 3), np.uint8)) | arrays))
    make_case(tmp_path / "b.npz")
    done = run("segment", "-m", tiny_model, "-i", tmp_path / "a.npz", tmp_path / "b.npz", "-o", tmp_path / "out")
    assert done.returncode == 1 and "a.npz" in done.stderr and complaint in done.stderr, done.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b.npz"]


@pytest.mark.parametrize("masks, complaint", [
    (np.zeros((2, 52, 52), np.float32), "has masks of 2 objects, expected 1"),
    (np.zeros((1, 52, 51), np.float32), "its mask has 2652 values, expected 52 x 52"),
    (np.zeros((1, 52, 52)), "has dtype '<f8'"),
    (np.zeros((52, 52), np.float32), "has shape (52, 52)"),
    (np.full((1, 52, 52), np.inf, np.float32), "not finite"),
])
def test_bad_masks(run, tiny_model, image, tmp_path, masks, complaint):
    np.savez(tmp_path / "m.npz", low_res_masks=masks)
    done = run("segment", "-m", tiny_model, "-i", tmp_path / "photo.png", "-o", tmp_path / "out", "--box",
               "5,6,40,50", "--mask", tmp_path / "m.npz")
    assert done.returncode == 1 and complaint in done.stderr, done.stderr


def test_masks_and_logits_are_for_images(run, tiny_model, tmp_path):
    make_case(tmp_path / "v.npz", shape=(3, 40, 41), boxes=[(5, 6, 0, 30, 31, 2)])
    for option in "--mask", "--logits":
        folder = tmp_path / option.strip("-")
        folder.mkdir()
        done = run("segment", "-m", tiny_model, "-i", tmp_path / "v.npz", "-o", tmp_path / "out", option, folder)
        assert done.returncode == 1 and f"{option} is for images" in done.stderr, done.stderr
    done = run("segment", "-m", tiny_model, "-i", tmp_path / "v.npz", "-o", tmp_path / "out", "--logits",
               tmp_path / "out")
    assert done.returncode == 2 and "would be written twice" in done.stderr
