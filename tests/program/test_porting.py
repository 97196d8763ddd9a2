"""PORTING.md, followed to the letter: its target file and table row pass the tests of the kernels."""

import re
import shutil
import subprocess

import pytest

from conftest import ROOT


@pytest.fixture(scope="module")
def page():
    return (ROOT / "PORTING.md").read_text()


def test_the_worked_example(page, tmp_path):
    if subprocess.run(["uname", "-m"], capture_output=True, text=True).stdout.strip() != "x86_64":
        pytest.skip("the example is for x86-64")
    for folder in ("kernels", "include", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    name = re.search(r"First, `(kernels/targets/\w+\.hpp)`", page)[1]
    file, row = re.findall(r"```cpp\n(.*?)```", page, re.S)
    assert not (tmp_path / name).exists(), f"{name} is there already: PORTING.md needs another example"
    (tmp_path / name).write_text(file)
    table = tmp_path / re.search(r"row of the table in `([\w/.]+)`", page)[1]
    above = re.search(r"here after that of `([\w/.]+)`", page)[1]
    before = table.read_text()
    after = before.replace(f'#include "{above}"\n', f'#include "{above}"\n{row}')
    assert after != before
    table.write_text(after)
    assert len((file + row).splitlines()) <= 150

    commands = next(block for block in re.findall(r"```sh\n(.*?)```", page, re.S) if "./kernel_tests\n" in block)
    done = subprocess.run(["bash", "-ec", commands], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("target ssse3: ")
    assert re.search(r"test cases: +\d\d \| +\d\d passed \| 0 failed", done.stdout)


def test_every_target_says_what_it_must(page):
    """The fields that PORTING.md names are those that the files of the tree have."""
    table = (ROOT / "kernels" / "target.hpp").read_text()
    rows = re.findall(r'#include "targets/(\w+)\.hpp"', table)
    files = {path.stem: path.read_text() for path in (ROOT / "kernels" / "targets").glob("*.hpp")}
    assert sorted(rows) == sorted(files)
    must = page[page.index("## What a target file must say") : page.index("## What it may say")]
    for name, text in files.items():
        for field in re.findall(r"`(\w+)`", must):
            if field not in ("MulAdd",):
                assert field in text, f"{name} does not say {field}"
        assert f'name = "{name}"' in text
        assert "/// processor: " in text and "/// gnu flags: " in text
        assert len(text.splitlines()) <= 40
