"""A process's own folder for temporary files. What it leaves when it is killed the next one of its node removes."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from raygent.actors.file_lock import lock

PREFIX = "raygent-engine-"
HELD = "held"  # a file in the folder, locked as long as its process lives


class Scratch:
    """`path`, where from now on all that this process and its children make with `tempfile` is; `remove()` it at the end."""

    def __init__(self) -> None:
        root = Path(tempfile.gettempdir())
        _remove_left(root)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        new = self.path / f"{HELD}.new"
        self.held = new.open("w")
        lock(self.held, 0)
        new.rename(self.path / HELD)  # so nobody ever finds it there and free
        # What torch compiled is of use to later runs, too.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(root / f"torchinductor_{os.getuid()}"))
        os.environ["TMPDIR"] = tempfile.tempdir = str(self.path)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self.held.close()


def _remove_left(root: Path) -> None:
    for path in root.glob(f"{PREFIX}*/{HELD}"):
        try:
            held = path.open("r+")
        except OSError:  # another user's, or gone by now
            continue
        with held:
            if lock(held, 0):
                shutil.rmtree(path.parent, ignore_errors=True)
