"""A process's folder for temporary files: gone with it, by the next one's start where it was killed."""

import os
import subprocess
import sys
import tempfile

import pytest

from raygent.actors.scratch import Scratch

HOLDS = "from raygent.actors.scratch import Scratch; scratch = Scratch(); print(scratch.path, flush=True); input()"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
    return tmp_path


def hold():
    process = subprocess.Popen([sys.executable, "-c", HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(root):
    (dead, left), (alive, used) = hold(), hold()
    dead.kill()
    dead.wait()
    assert os.path.isdir(left) and os.path.isdir(used)
    scratch = Scratch()
    assert sorted(map(str, root.iterdir())) == sorted([used, str(scratch.path)])
    with tempfile.NamedTemporaryFile() as file:
        assert file.name.startswith(str(scratch.path))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(root / "torchinductor"))
    scratch.remove()
    assert list(map(str, root.iterdir())) == [used]
    alive.communicate("\n")
