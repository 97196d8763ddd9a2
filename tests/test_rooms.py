"""Headers include only what lies in their own folder and below: see HACKING.md."""

import re

import pytest

from conftest import ROOT

BELOW = {  # the folders that each may include from, besides its own
    "kernels": [],
    "core": ["kernels"],
    "model_file": ["core", "kernels"],
    "ops": ["model_file", "core", "kernels"],
    "models": ["ops", "model_file", "core", "kernels"],
    "quantization": ["model_file", "core", "kernels"],
    "imaging": ["models", "core", "kernels"],
    "io": ["imaging", "core", "kernels"],
}
LIBRARIES = re.compile(r"#include <(zip|spng|zlib)\.h>")


def folder(room):
    return ROOT / "kernels" if room == "kernels" else ROOT / "include" / "microtome" / room


def test_every_folder_is_known():
    assert {p.name for p in (ROOT / "include" / "microtome").iterdir() if p.is_dir()} == BELOW.keys() - {"kernels"}


@pytest.mark.parametrize("room", BELOW)
def test_headers_include_from_below_only(room):
    headers = sorted(folder(room).rglob("*.hpp"))
    assert headers
    for header in headers:
        text = header.read_text()
        for include in re.findall(r"#include [<\"]((?:kernels|microtome)/[^>\"]*)", text):
            place = include.split("/")[0 if include.startswith("kernels") else 1]
            assert place == room or place in BELOW[room], f"{header} includes {include}"
        assert room == "io" or not LIBRARIES.search(text), f"{header} needs a library"
