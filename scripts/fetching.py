"""What scripts/fetch_model and scripts/fetch_images share: the cache folder, checksums, and files out of
packages. Needs Python's own library alone; what has to run with NumPy runs in .venv, as a command.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

SCRIPTS = pathlib.Path(__file__).resolve().parent


class FetchError(Exception):
    """Something could not be brought or made; the message says what, and what to do."""


def say(*words):
    """Standard output is for the path alone."""
    print(*words, file=sys.stderr, flush=True)


def run_script(name, main):
    """Runs main(), which returns the path to print; ends the process with 1 and a sentence on errors."""
    try:
        print(main())
    except (FetchError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted; what was there before is as it was")


def cache_folder():
    """Where models and images are kept; it need not be there yet."""
    if own := os.environ.get("MICROTOME_CACHE"):
        return pathlib.Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base).absolute() / "microtome"


@contextlib.contextmanager
def working_folder(cache):
    """A temporary folder in the cache, so that renaming a file out of it is atomic. Two processes that
    fetch the same have one each, and the later one replaces a file by an equal one."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache)
    except OSError as error:
        raise FetchError(
            f"the cache folder {cache} cannot be written ({error.strerror}). "
            "Set MICROTOME_CACHE to a folder that can"
        ) from None
    with folder as path:
        yield pathlib.Path(path)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sources_hash(paths):
    """One checksum of several files: it changes where the code that makes a file does."""
    return hashlib.sha256("".join(sha256(path) for path in sorted(paths)).encode()).hexdigest()


def stamped(stamp):
    """What a stamp says, or nothing."""
    try:
        found = json.loads(stamp.read_text())
        return found["made_by"], dict(found["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, {}


def write_stamp(stamp, made_by, files):
    """Notes which code made `files`, which lie beside the stamp, and what is in them. Files of the stamp
    before that are not made any more are removed."""
    for name in stamped(stamp)[1].keys() - {file.name for file in files}:
        (stamp.parent / name).unlink(missing_ok=True)
    found = {"made_by": made_by, "files": {file.name: sha256(file) for file in files}}
    temporary = stamp.with_name(f"{stamp.name}.{os.getpid()}")
    temporary.write_text(json.dumps(found, indent=1))
    os.replace(temporary, stamp)


def is_current(stamp, made_by):
    """Whether the files of a stamp are there, whole, and made by the code that `made_by` is of."""
    before, files = stamped(stamp)
    try:
        return before == made_by and all(sha256(stamp.parent / n) == digest for n, digest in files.items())
    except OSError:
        return False


def environment(requirements):
    """The Python of .venv, with the packages of a requirements file in it."""
    done = subprocess.run([SCRIPTS / "python_environment", requirements], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise FetchError(
            f"the packages of {requirements} could not be installed in .venv. Run this once where pip "
            "reaches its package index"
        )
    return done.stdout.strip()


def last_error(text):
    """The last line of a command's messages that says it is an error, or the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    return next((line for line in reversed(lines) if line.startswith(("ERROR", "E:"))), lines[-1])


def pip_download(python, package, folder, *options):
    """Downloads the package of packages/NAME.txt, which names its version and checksum, into a folder,
    without what it depends on. Returns None, or pip's error in a line."""
    command = [python, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--retries", "2"]
    command += ["--disable-pip-version-check", "--dest", folder, *options]
    command += ["--requirement", SCRIPTS / "packages" / f"{package}.txt"]
    # What pip unpacks goes into the folder, too, and with it.
    variables = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    return last_error(done.stderr) if done.returncode else None
