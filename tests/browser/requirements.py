"""What the tests of this folder need on a machine."""

import importlib.util
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))  # names of each
AXE = Path(os.environ.get("AXE", ROOT / ".browser/node_modules/axe-core/axe.min.js"))


def find_lack() -> str | None:
    """The first thing that is missing; None if the tests can run."""
    if importlib.util.find_spec("selenium") is None:
        return "selenium"
    for names in PROGRAMS:
        if not any(map(shutil.which, names)):
            return names[0]
    return None if AXE.is_file() else "axe-core"
