"""`microtome eval --coco` against pycocotools: masks, mean IoU, the twelve numbers of average precision; and what it
says of files that are not sound."""

import contextlib
import csv
import io
import json
import struct

import cv2
import numpy as np
import pycocotools.mask as coco_masks
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from conftest import DATA

CATEGORIES = [{"id": 3, "name": "cell"}, {"id": 7, "name": 'organ, "left"'}, {"id": 90, "name": "tumour"}]
MODELS = ["tiny", "tiny_efficientvit"]


def model(name):
    return DATA / f"{name}.safetensors"


def compressed(mask):
    runs = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": runs["size"], "counts": runs["counts"].decode()}


def uncompressed(mask):
    flat = mask.astype(np.uint8).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": ([0] if flat[0] else []) + counts}


def ellipse(rng, height, width, radius):
    """A polygon of `radius` pixels about, somewhere in the image, perhaps over its border."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
    x = rng.uniform(0, width) + radius * rng.uniform(0.6, 1.4) * np.cos(angles)
    y = rng.uniform(0, height) + radius * rng.uniform(0.6, 1.4) * np.sin(angles)
    return np.stack([x, y], 1).round(2).ravel().tolist()


def mask_of(segmentation, height, width):
    """By pycocotools, bool."""
    if isinstance(segmentation, list):
        runs = coco_masks.merge(coco_masks.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        runs = coco_masks.frPyObjects(segmentation, height, width)
    else:
        runs = segmentation
    return coco_masks.decode(runs).astype(bool)


def annotation(number, image, category, segmentation, crowd=0):
    height, width = image["height"], image["width"]
    mask = mask_of(segmentation, height, width)
    rows, columns = np.nonzero(mask)
    box = [0.0, 0.0, 0.0, 0.0]
    if len(rows):
        box = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
    return {"id": number, "image_id": image["id"], "category_id": category, "iscrowd": crowd, "area": int(mask.sum()),
            "bbox": box, "segmentation": segmentation}


def make_instances(seed, sizes, objects=9):
    """Objects of all sizes, categories and kinds of segmentation; each third one of a kind; some crowds."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for i, (height, width) in enumerate(sizes):
        images.append({"id": 40 - 7 * i, "file_name": f"{i}.png", "height": height, "width": width})
        while sum(a["image_id"] == images[-1]["id"] for a in annotations) < objects:
            number = len(annotations) + 1
            polygons = [ellipse(rng, height, width, rng.choice([6, 12, 30, 70])) for _ in range(rng.integers(1, 3))]
            mask = mask_of(polygons, height, width)
            if mask.sum() < 1:
                continue
            segmentation = [polygons, uncompressed(mask), compressed(mask)][number % 3]
            crowd = int(number % 5 == 4)
            category = CATEGORIES[int(rng.integers(0, 3))]["id"]
            annotations.append(annotation(number, images[-1], category, segmentation, crowd))
    return {"images": images, "categories": list(CATEGORIES), "annotations": annotations}


def write_json(path, value):
    path.write_text(json.dumps(value))
    return path


def write_images(folder, instances):
    rng = np.random.default_rng(5)
    folder.mkdir(exist_ok=True)
    for image in instances["images"]:
        pixels = rng.integers(0, 60, (image["height"], image["width"], 3), np.uint8)
        for a in instances["annotations"]:
            if a["image_id"] == image["id"]:
                pixels[mask_of(a["segmentation"], image["height"], image["width"])] += rng.integers(0, 190, 3, np.uint8) // 2
        cv2.imwrite(str(folder / image["file_name"]), pixels)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A folder with images/, instances.json and its content."""
    folder = tmp_path_factory.mktemp("coco")
    instances = make_instances(1, [(97, 131), (240, 177), (61, 203)])
    write_images(folder / "images", instances)
    write_json(folder / "instances.json", instances)
    return folder, instances


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def iou_of(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


def evaluate(run, *more, **files):
    """Runs `eval --coco`; options by their names with underscores."""
    options = [str(part) for name, value in files.items() for part in (f"--{name.replace('_', '-')}", value)]
    return run("eval", *options, *more)


def by_pycocotools(instances, results):
    """The twelve numbers; `results` is a list or a file."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(instances))
        evaluation = COCOeval(truth, truth.loadRes(results if isinstance(results, list) else str(results)), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def measures(path):
    return [float(row["value"]) for row in read_rows(path)]


def check_mean_iou(done, rows, masks, instances):
    """What was printed and the rows of the table against the masks that were written."""
    annotations = {a["id"]: a for a in instances["annotations"]}
    images = {i["id"]: i for i in instances["images"]}
    names = {c["id"]: c["name"] for c in instances["categories"]}
    by_area = {"all": [], "small": [], "medium": [], "large": []}
    for row, result in zip(rows, masks, strict=True):
        a = annotations[int(row["annotation"])]
        image = images[a["image_id"]]
        truth = mask_of(a["segmentation"], image["height"], image["width"])
        assert result["image_id"] == a["image_id"] and result["category_id"] == a["category_id"]
        assert row["image"] == image["file_name"] and row["category"] == names[a["category_id"]]
        expected = iou_of(truth, mask_of(result["segmentation"], image["height"], image["width"]))
        assert float(row["iou"]) == pytest.approx(expected, abs=1e-9)
        by_area["all"].append(expected)
        assert float(row["area"]) == a["area"]
        size = "small" if a["area"] < 32**2 else "large" if a["area"] > 96**2 else "medium"
        by_area[size].append(expected)
    printed = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.split()[0] in by_area}
    for size, values in by_area.items():
        expected = f"{np.mean(values):.6f}" if values else "-"
        assert printed[size] == [str(len(values)), expected], size
    return by_area


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("crowds", [False, True])
def test_mean_iou(run, dataset, tmp_path, name, crowds):
    folder, instances = dataset
    done = evaluate(run, *(["--crowds"] if crowds else []), coco=folder / "instances.json", images=folder / "images",
                    model=model(name), output=tmp_path / "t.csv", masks=tmp_path / "m.json")
    assert done.returncode == 0, done.stderr
    rows, masks = read_rows(tmp_path / "t.csv"), json.loads((tmp_path / "m.json").read_text())
    wanted = {a["id"] for a in instances["annotations"] if crowds or not a["iscrowd"]}
    assert {int(row["annotation"]) for row in rows} == wanted and len(rows) == len(wanted)
    by_area = check_mean_iou(done, rows, masks, instances)
    assert all(by_area.values()) and 0.02 < np.mean(by_area["all"]) < 0.9
    assert [line.split(":")[0] for line in done.stdout.splitlines()[:3]] == ["[1/3] 2.png", "[2/3] 1.png", "[3/3] 0.png"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("multimask", [False, True])
def test_masks_are_those_of_segment(run, dataset, tmp_path, name, multimask):
    folder, instances = dataset
    more = ["--multimask"] if multimask else []
    evaluate(run, *more, coco=folder / "instances.json", images=folder / "images", model=model(name),
             output=tmp_path / "t.csv", masks=tmp_path / "m.json")
    annotations = {a["id"]: a for a in instances["annotations"]}
    written = list(zip(read_rows(tmp_path / "t.csv"), json.loads((tmp_path / "m.json").read_text()), strict=True))
    for row, result in written[::4]:
        x, y, w, h = annotations[int(row["annotation"])]["bbox"]
        done = run("segment", "-m", model(name), "-i", folder / "images" / row["image"], "-o", tmp_path, *more,
                   "--box", f"{x},{y},{x + w},{y + h}", "--logits", tmp_path)
        assert done.returncode == 0, done.stderr
        expected = cv2.imread(str(tmp_path / row["image"])).any(-1)
        np.testing.assert_array_equal(mask_of(result["segmentation"], *expected.shape), expected)
        predicted = np.load(tmp_path / f"{row['image'][:-4]}.npz")["iou_predictions"]
        assert result["score"] == pytest.approx(predicted.item(), abs=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_boxes_of_a_detector(run, dataset, tmp_path, name):
    folder, instances = dataset
    rng = np.random.default_rng(2)
    detections = []
    for a in instances["annotations"] * 2:
        box = (np.array(a["bbox"]) + rng.uniform(-2, 2, 4)).clip(0.5).round(3)
        detections.append({"image_id": a["image_id"], "category_id": a["category_id"], "bbox": box.tolist(),
                           "score": float(rng.choice([0.25, 0.5, rng.random()]))})
    detections[3]["category_id"] = 90
    write_json(tmp_path / "d.json", detections)
    done = evaluate(run, coco=folder / "instances.json", images=folder / "images", model=model(name),
                    detections=tmp_path / "d.json", output=tmp_path / "t.csv", masks=tmp_path / "m.json")
    assert done.returncode == 0, done.stderr
    masks = json.loads((tmp_path / "m.json").read_text())
    assert sorted(m["score"] for m in masks) == sorted(d["score"] for d in detections)
    expected = by_pycocotools(folder / "instances.json", tmp_path / "m.json")
    np.testing.assert_allclose(measures(tmp_path / "t.csv"), expected, atol=1e-9, rtol=0)
    assert "mIoU" not in done.stdout
    again = evaluate(run, coco=folder / "instances.json", masks_from=tmp_path / "m.json", output=tmp_path / "u.csv")
    assert again.returncode == 0 and measures(tmp_path / "u.csv") == measures(tmp_path / "t.csv")


def perturbed(rng, mask):
    """Nearly the same mask."""
    moved = np.roll(mask, rng.integers(-4, 5, 2), (0, 1)).astype(np.uint8)
    kernel = np.ones(rng.integers(1, 5, 2), np.uint8)
    return [moved, cv2.dilate(moved, kernel), cv2.erode(moved, kernel)][int(rng.integers(0, 3))]


def perturbed_results(rng, instances, copies=3):
    images = {i["id"]: i for i in instances["images"]}
    results = []
    for _ in range(copies):
        for a in instances["annotations"]:
            image = images[a["image_id"]]
            mask = perturbed(rng, mask_of(a["segmentation"], image["height"], image["width"]))
            category = a["category_id"] if rng.random() < 0.9 else int(rng.choice([3, 7, 90]))
            score = [rng.random(), 0.5, round(rng.random(), 1)][int(rng.integers(0, 3))]  # some of them equal
            results.append({"image_id": a["image_id"], "category_id": category, "score": float(score),
                            "segmentation": compressed(mask)})
    return results


@pytest.mark.parametrize("seed", range(12))
def test_average_precision_of_results(run, tmp_path, seed):
    rng = np.random.default_rng(seed)
    sizes = [tuple(int(v) for v in rng.integers(40, 200, 2)) for _ in range(5)]
    instances = make_instances(seed, sizes, objects=int(rng.integers(2, 12)))
    instances["categories"] = CATEGORIES + [{"id": 1, "name": "of which there is none"}]
    results = perturbed_results(rng, instances)
    if seed % 3 == 0:  # more than 100 of an image and category, and an image of which nothing is said
        few = [r for r in results if r["image_id"] == results[0]["image_id"]]
        results += [dict(r, category_id=results[0]["category_id"], score=float(rng.random())) for r in few * 12]
        instances["images"].append({"id": 2, "file_name": "x.png", "height": 5, "width": 5})
    if seed % 3 == 1:  # an image in which nothing is, and results without order
        instances["images"].append({"id": 2, "file_name": "x.png", "height": 5, "width": 5})
        results.append({"image_id": 2, "category_id": 3, "score": 0.7, "segmentation": compressed(np.ones((5, 5)))})
        rng.shuffle(results)
    if seed == 5:  # one category has crowds alone
        for a in instances["annotations"]:
            a["iscrowd"] = 1 if a["category_id"] == 7 else a["iscrowd"]
    if seed == 6:  # of one image alone
        results = [r for r in results if r["image_id"] == 40]
    write_json(tmp_path / "i.json", instances)
    write_json(tmp_path / "r.json", results)
    done = evaluate(run, coco=tmp_path / "i.json", masks_from=tmp_path / "r.json", output=tmp_path / "t.csv")
    assert done.returncode == 0, done.stderr
    expected = by_pycocotools(tmp_path / "i.json", results)
    np.testing.assert_allclose(measures(tmp_path / "t.csv"), expected, atol=1e-9, rtol=0)
    if seed != 6:
        assert 0.2 < expected[0] < 0.95 and len(set(expected)) > 6
    lines = done.stdout.splitlines()
    assert lines[0].startswith(" Average Precision (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = ")
    assert [float(line.split(" = ")[1]) for line in lines] == pytest.approx(expected, abs=5.1e-5)


def test_area_of_a_result_is_that_of_its_mask(run, tmp_path):
    """Where results have boxes, too, pycocotools would take the boxes' area, and others take them away before."""
    instances = make_instances(3, [(150, 140)])
    results = perturbed_results(np.random.default_rng(0), instances, 1)
    write_json(tmp_path / "i.json", instances)
    write_json(tmp_path / "r.json", [dict(r, bbox=[0, 0, 150, 140]) for r in results])
    evaluate(run, coco=tmp_path / "i.json", masks_from=tmp_path / "r.json", output=tmp_path / "t.csv")
    np.testing.assert_allclose(measures(tmp_path / "t.csv"), by_pycocotools(tmp_path / "i.json", results), atol=1e-9)


def test_nothing_to_find_is_minus_one(run, tmp_path):
    instances = make_instances(3, [(50, 40)], objects=0)
    write_json(tmp_path / "i.json", instances)
    write_json(tmp_path / "r.json", [])
    done = evaluate(run, coco=tmp_path / "i.json", masks_from=tmp_path / "r.json", output=tmp_path / "t.csv")
    assert done.returncode == 0 and measures(tmp_path / "t.csv") == [-1] * 12


@pytest.mark.parametrize("seed", range(4))
def test_polygons_as_pycocotools_draws_them(run, tmp_path, seed):
    """Of all kinds: outside, without area, with equal vertices, thin, through themselves. An IoU that is right to
    nine digits has the right pixels."""
    rng = np.random.default_rng(seed)
    height, width = [(83, 61), (40, 151), (97, 97), (9, 33)][seed]
    image = {"id": 1, "file_name": "0.png", "height": height, "width": width}
    annotations = []
    for i in range(160):
        n = int(rng.integers(3, 9))
        inside = rng.uniform(0, 1, (n, 2)) * (width, height)
        far = rng.uniform(-1, 2, (n, 2)) * (width, height)
        fifths = inside.round(1)
        same = np.repeat(inside[:1], n, 0)
        line = np.linspace(far[0], far[1], n)
        closed = np.concatenate([inside, inside[:1]])
        whole = far.round()
        outside = far * 0.1 + (2 * width, 0)
        polygon = [inside, far, fifths, same, line, closed, whole, outside][i % 8].ravel().tolist()
        more = [] if i % 3 else [(inside[::-1] * 0.7).ravel().tolist()]
        annotations.append(annotation(i + 1, image, 3, [polygon, *more]) | {
            "bbox": [0, 0, width, height] if i % 2 else [1, 1, width // 2, height // 2], "area": 5})
    instances = {"images": [image], "categories": CATEGORIES, "annotations": annotations}
    write_images(tmp_path, instances)
    write_json(tmp_path / "i.json", instances)
    done = evaluate(run, coco=tmp_path / "i.json", images=tmp_path, model=model("tiny"), output=tmp_path / "t.csv",
                    masks=tmp_path / "m.json")
    assert done.returncode == 0, done.stderr
    rows, masks = read_rows(tmp_path / "t.csv"), json.loads((tmp_path / "m.json").read_text())
    by_area = check_mean_iou(done, rows, masks, instances)
    assert len(rows) == 160 and np.count_nonzero(by_area["all"]) > 80


def test_runs_are_written_as_pycocotools_writes_them(run, dataset, tmp_path):
    folder, _ = dataset
    evaluate(run, coco=folder / "instances.json", images=folder / "images", model=model("tiny"),
             masks=tmp_path / "m.json")
    for result in json.loads((tmp_path / "m.json").read_text()):
        assert compressed(coco_masks.decode(result["segmentation"])) == result["segmentation"]


def with_orientation(jpeg, orientation):
    """The JPEG with EXIF data that ask for a turned picture."""
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<HHHIHHI", 1, 0x112, 3, 1, orientation, 0, 0)
    body = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


@pytest.fixture
def reads_jpeg(run, tmp_path):
    """Skips where the program was built without libjpeg."""
    instances = make_instances(4, [(5, 5)], objects=1)
    instances["images"][0]["file_name"] = "a.jpg"
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((5, 5), np.uint8))
    done = evaluate(run, coco=write_json(tmp_path / "a.json", instances), images=tmp_path, model=model("tiny"))
    if "built without" in done.stderr:
        pytest.skip("the program was built without libjpeg")
    assert done.returncode == 0 or "annotation" in done.stderr, done.stderr


@pytest.mark.parametrize("kind", ["colour", "grey", "progressive", "turned"])
def test_jpeg_images(run, dataset, reads_jpeg, tmp_path, kind):
    """Pixels are those that OpenCV reads, whatever EXIF data say: JPEG images give the masks of the PNG images."""
    folder, instances = dataset
    masks = []
    for extension in (".jpg", ".png"):
        images = tmp_path / extension
        images.mkdir()
        for image in instances["images"]:
            pixels = cv2.imread(str(folder / "images" / image["file_name"]))
            pixels = pixels[..., 1] if kind == "grey" else pixels
            options = [cv2.IMWRITE_JPEG_PROGRESSIVE, int(kind == "progressive")]
            jpeg = cv2.imencode(".jpg", pixels, options)[1].tobytes()
            if extension == ".jpg":
                # What an image is depends on its content: COCO's names end as they like.
                (images / image["file_name"]).write_bytes(with_orientation(jpeg, 6) if kind == "turned" else jpeg)
            else:
                decoded = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
                cv2.imwrite(str(images / image["file_name"]), decoded)
        done = evaluate(run, coco=folder / "instances.json", images=images, model=model("tiny"),
                        masks=tmp_path / "m.json")
        assert done.returncode == 0, done.stderr
        masks.append((tmp_path / "m.json").read_text())
    assert masks[0] == masks[1]


def test_images_that_cannot_be_read_fail_alone(run, dataset, reads_jpeg, tmp_path):
    _, instances = dataset
    instances = make_instances(1, [(97, 131), (240, 177), (61, 203), (50, 60), (70, 71), (30, 31), (40, 41)], 3)
    write_images(tmp_path, instances)
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_text("no image")
    cv2.imwrite(str(tmp_path / "3.png"), np.zeros((60, 50), np.uint8))
    noise = np.random.default_rng(0).integers(0, 256, (70, 71, 3), np.uint8)
    jpeg = cv2.imencode(".jpg", noise)[1].tobytes()
    (tmp_path / "4.png").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "5.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    (tmp_path / "6.png").write_bytes(jpeg[:20])
    done = evaluate(run, coco=write_json(tmp_path / "i.json", instances), images=tmp_path, model=model("tiny"),
                    output=tmp_path / "t.csv")
    assert done.returncode == 1
    for name, why in {"1": "1.png", "2": "neither a PNG nor a JPEG", "3": "50 x 60 pixels, expected 60 x 50",
                      "4": "not a sound JPEG", "5": "not a sound PNG", "6": "not a sound JPEG"}.items():
        assert why in next(s for s in done.stderr.splitlines() if f"{name}.png FAILED" in s)
    rows = read_rows(tmp_path / "t.csv")
    assert rows and {row["image"] for row in rows} == {"0.png"}
    # In the average precision they count neither as found nor as missed.
    detections = [dict(image_id=a["image_id"], category_id=a["category_id"], bbox=a["bbox"], score=0.5)
                  for a in instances["annotations"]]
    done = evaluate(run, coco=tmp_path / "i.json", images=tmp_path, model=model("tiny"), output=tmp_path / "t.csv",
                    detections=write_json(tmp_path / "d.json", detections), masks=tmp_path / "m.json")
    assert done.returncode == 1 and done.stderr.count("FAILED") == 6
    instances["images"] = instances["images"][:1]
    instances["annotations"] = [a for a in instances["annotations"] if a["image_id"] == 40]
    expected = by_pycocotools(write_json(tmp_path / "j.json", instances), tmp_path / "m.json")
    np.testing.assert_allclose(measures(tmp_path / "t.csv"), expected, atol=1e-9)


BAD_ANNOTATIONS = {
    "no image": (dict(image_id=1234), "no image 1234"),
    "no category": (dict(category_id=8), "no category 8"),
    "text for an id": (dict(image_id="40"), "'image_id' is not a whole number"),
    "a fraction for an id": (dict(image_id=40.5), "'image_id' is not a whole number"),
    "an id beyond all": (dict(image_id=2**63 + 5), "'image_id' is not a whole number"),
    "no area": (dict(area=None), "'area' is not a number"),
    "an area below nothing": (dict(area=-1), "'area' is -1"),
    "a short box": (dict(bbox=[1, 2, 3]), "'bbox' is not a list"),
    "a box of text": (dict(bbox=[1, 2, "3", 4]), "'bbox' is not a number"),
    "a box of no size": (dict(bbox=[1, 2, -3, 4]), "'bbox' has the size -3 x 4"),
    "a box outside": (dict(bbox=[5000, 2, 3, 4]), "outside the image"),
    "no box": (dict(bbox=...), "'bbox' is missing"),
    "crowd": (dict(iscrowd=2), "'iscrowd' is neither"),
    "no segmentation": (dict(segmentation=...), "'segmentation' is missing"),
    "a segmentation of text": (dict(segmentation="all"), "neither a list of polygons nor"),
    "no polygon": (dict(segmentation=[]), "has no polygon"),
    "numbers for polygons": (dict(segmentation=[1, 2, 3, 4, 5, 6]), "not a list of polygons"),
    "two vertices": (dict(segmentation=[[1, 2, 3, 4]]), "a polygon of 4 numbers"),
    "half a vertex": (dict(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "a polygon of 7 numbers"),
    "a polygon of text": (dict(segmentation=[[1, 2, 3, 4, 5, "6"]]), "is not a number"),
    "a polygon of null": (dict(segmentation=[[1, 2, 3, 4, 5, None]]), "is not a number"),
    "a polygon from afar": (dict(segmentation=[[1, 2, 3, 4, 5, 1e9]]), "is not a number up to 1e+06"),
    "counts alone": (dict(segmentation={"counts": [5]}), "nor counts and size"),
    "runs of another size": (dict(segmentation={"counts": [100], "size": [10, 10]}), "expected [97,131]"),
    "runs of half the size": (dict(segmentation={"counts": [100], "size": [97]}), "expected [97,131]"),
    "runs too short": (dict(segmentation={"counts": [100], "size": [97, 131]}), "runs of 100 pixels"),
    "runs too long": (dict(segmentation={"counts": [97 * 131, 1], "size": [97, 131]}), "runs of 12708 pixels"),
    "a run below nothing": (dict(segmentation={"counts": [97 * 131, -1, 1], "size": [97, 131]}), "has a run that"),
    "a run of a fraction": (dict(segmentation={"counts": [97 * 131.0], "size": [97, 131]}), "has a run that"),
    "a run beyond all": (dict(segmentation={"counts": [2**64 - 1], "size": [97, 131]}), "has a run that"),
    "runs of null": (dict(segmentation={"counts": None, "size": [97, 131]}), "neither a list nor text"),
    "no text": (dict(segmentation={"counts": "", "size": [97, 131]}), "runs of 0 pixels"),
    "text that ends early": (dict(segmentation={"counts": "o", "size": [97, 131]}), "damaged at character 1"),
    "text of other characters": (dict(segmentation={"counts": "1 2", "size": [97, 131]}), "damaged at character 1"),
    "a number without end": (dict(segmentation={"counts": "o" * 40 + "0", "size": [97, 131]}), "damaged at character 8"),
    "a negative run": (dict(segmentation={"counts": "O", "size": [97, 131]}), "has a run of -1"),
    "not an object": (None, "is not an object"),
}


@pytest.mark.parametrize("case", BAD_ANNOTATIONS)
def test_a_bad_annotation_fails_alone(run, tmp_path, case):
    change, why = BAD_ANNOTATIONS[case]
    instances = make_instances(1, [(97, 131)], 5)
    instances["annotations"][0]["iscrowd"] = 0
    write_images(tmp_path, instances)
    changed = None if change is None else instances["annotations"][0] | change
    if changed:
        changed = {key: value for key, value in changed.items() if value is not ...}
    instances["annotations"][0] = changed
    done = evaluate(run, coco=write_json(tmp_path / "i.json", instances), images=tmp_path, model=model("tiny"),
                    output=tmp_path / "t.csv")
    assert done.returncode == 1
    line = next(s for s in done.stderr.splitlines() if "FAILED" in s)
    assert why in line and done.stderr.count("FAILED") == 1
    assert ("0.png" if case == "a box outside" else "i.json") in line
    assert change is None or "id 1)" in line or "annotation 1:" in line
    assert [row["annotation"] for row in read_rows(tmp_path / "t.csv")] == ["2", "3", "5"]


@pytest.mark.parametrize("part, change, why", [
    ("images", dict(height=0), "'height' is not a whole number"),
    ("images", dict(width=2**40), "'width' is not a whole number"),
    ("images", dict(width=2**20, height=2**20), "at most"),
    ("images", dict(file_name="../0.png"), "not the name of a file in a folder"),
    ("images", dict(file_name="/0.png"), "not the name of a file in a folder"),
    ("images", dict(file_name="a\x1b[2J.png"), "not the name of a file in a folder"),
    ("images", dict(file_name=3), "'file_name' is missing"),
    ("images", dict(id=33), "has the id of another one"),
    ("categories", dict(name=None), "'name' is missing"),
    ("categories", dict(id=7), "has the id of another one"),
    ("annotations", dict(id=2), "has the id of another one"),
])
def test_bad_images_and_categories(run, tmp_path, part, change, why):
    instances = make_instances(1, [(97, 131), (50, 60)], 4)
    instances[part].insert(3, instances[part][0] | change)
    if change.get("id") != 2:
        instances[part].pop(0)
    done = evaluate(run, coco=write_json(tmp_path / "i.json", instances),
                    masks_from=write_json(tmp_path / "r.json", []))
    assert done.returncode == 1 and "Average Precision" in done.stdout
    assert any(why in line and "i.json" in line for line in done.stderr.splitlines()), done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("text, why", [
    ("", "is not JSON"),
    ("[]", "'annotations' is missing"),
    ("{}", "'annotations' is missing"),
    ('{"annotations": [], "images": {}, "categories": []}', "'images' is missing"),
    ('{"annotations": [], "images": []}', "'categories' is missing"),
    ('{"annotations": [NaN], "images": [], "categories": []}', "is not JSON"),
    ('{"annotations": [1e999], "images": [], "categories": []}', "is not JSON"),
    ("[" * 100000, "nests deeper"),
])
def test_files_that_are_something_else(run, tmp_path, text, why):
    (tmp_path / "i.json").write_text(text)
    done = evaluate(run, coco=tmp_path / "i.json", masks_from=write_json(tmp_path / "r.json", []))
    assert done.returncode == 1 and why in done.stderr and "i.json" in done.stderr


def test_bad_results(run, tmp_path):
    instances = make_instances(1, [(97, 131)], 5)
    good = perturbed_results(np.random.default_rng(0), instances, 1)
    bad = [good[0] | change for change in (dict(score="high"), dict(score=None), dict(segmentation=None),
                                           dict(image_id=None), dict(category_id=1.5))]
    strangers = [good[0] | dict(image_id=5), good[0] | dict(image_id=6), good[0] | dict(category_id=1)]
    write_json(tmp_path / "i.json", instances)
    write_json(tmp_path / "r.json", [*bad, *good, *strangers, 7, {}])
    done = evaluate(run, coco=tmp_path / "i.json", masks_from=tmp_path / "r.json", output=tmp_path / "t.csv")
    assert done.returncode == 1 and done.stderr.count("FAILED") == 9, done.stderr
    assert "r.json: result number 0 (image_id 40): 'score' is not a number" in done.stderr
    assert "2 results are of images that the annotations do not have, the first of 5" in done.stderr
    assert "1 results are of categories" in done.stderr
    np.testing.assert_allclose(measures(tmp_path / "t.csv"), by_pycocotools(tmp_path / "i.json", good), atol=1e-9)
    write_json(tmp_path / "r.json", {"results": []})
    done = evaluate(run, coco=tmp_path / "i.json", masks_from=tmp_path / "r.json")
    assert done.returncode == 1 and "r.json: is not a list" in done.stderr


def test_a_bad_box_of_a_detector_fails_alone(run, dataset, tmp_path):
    folder, _ = dataset
    good = [dict(image_id=40, category_id=3, bbox=[10, 10, 50, 40], score=0.5)]
    bad = [good[0] | dict(bbox=box) for box in ([1, 2, 3], [5000, 5, 9, 9], [5, 5, -9, 9])] + [
        {k: v for k, v in good[0].items() if k != "bbox"}]
    done = evaluate(run, coco=folder / "instances.json", images=folder / "images", model=model("tiny"),
                    detections=write_json(tmp_path / "d.json", bad + good), masks=tmp_path / "m.json")
    assert done.returncode == 1 and done.stderr.count("FAILED") == 4, done.stderr
    assert len(json.loads((tmp_path / "m.json").read_text())) == 1


def test_objects_of_less_than_a_pixel_are_left_out(run, tmp_path):
    instances = make_instances(1, [(97, 131)], 3)
    instances["annotations"][1]["area"] = 0.5
    write_images(tmp_path, instances)
    done = evaluate(run, coco=write_json(tmp_path / "i.json", instances), images=tmp_path, model=model("tiny"),
                    output=tmp_path / "t.csv")
    assert done.returncode == 0 and "1 object of an area below 1 left out" in done.stdout
    assert [row["annotation"] for row in read_rows(tmp_path / "t.csv")] == ["1", "3"]


@pytest.mark.parametrize("arguments, why", [
    ("", "--segs is required, or --coco"),
    ("-s S", "--gts is required"),
    ("--coco I", "--coco needs --model and --images, or --masks-from"),
    ("--coco I -m M", "--coco needs"),
    ("--coco I -m M --images F -s S", "--segs excludes --coco"),
    ("--coco I -m M --images F -g S", "--gts excludes --coco"),
    ("--coco I -m M --images F --tolerance 3", "--tolerance excludes --coco"),
    ("-s S -g S -m M", "--model requires --coco"),
    ("-s S -g S --images F", "--images requires --coco"),
    ("-s S -g S --masks X", "--masks requires --coco"),
    ("-s S -g S --threads 2", "--threads requires --coco"),
    ("-s S -g S --precision bf16", "--precision requires --coco"),
    ("--coco I --masks-from R -m M", "--masks-from excludes --model"),
    ("--coco I --masks-from R --detections R", "--masks-from excludes --detections"),
    ("--coco I -m M --images F --detections R --crowds", "--crowds is for the mean IoU"),
    ("--coco nowhere --masks-from R", "nowhere: no such file"),
    ("--coco I --masks-from nowhere", "nowhere: no such file"),
    ("--coco I -m M --images nowhere", "nowhere: no such folder"),
    ("--coco I -m M --images F -o I", "would replace an input"),
    ("--coco I -m M --images F -o X --masks X", "would replace an input or the other output"),
    ("--coco I -m M --images F -o nowhere/x", "nowhere: no such folder"),
])
def test_usage(run, dataset, tmp_path, arguments, why):
    folder, _ = dataset
    write_json(tmp_path / "r.json", [])
    names = {"I": folder / "instances.json", "M": model("tiny"), "F": folder / "images", "R": tmp_path / "r.json",
             "S": tmp_path, "X": tmp_path / "x"}
    done = run("eval", *(names.get(a, a) for a in arguments.split()), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert why in done.stderr and not (tmp_path / "x").exists()
