"""What ships beside the library: scripts, recipes, learnt tokenizers, and generators.

In a checkout these folders are at its root; the wheel carries them inside the package (pyproject.toml).
"""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
FOLDERS = ("configs", "generators", "pipelines", "tokenizers")


def shipped(relative: str | Path) -> Path:
    """The path of something that ships with mmvit, such as `configs/emoji_demo.toml`; it need not exist."""
    inside = PACKAGE / relative
    return inside if inside.exists() else PACKAGE.parent / relative


def find(path: str | Path) -> Path:
    """`path` where it exists, seen from the working directory; otherwise what ships under that name."""
    path = Path(path)
    if path.exists() or path.is_absolute() or path.parts[:1] not in [(name,) for name in FOLDERS]:
        return path
    place = shipped(path)
    return place if place.exists() else path


@cache
def load_script(relative: str) -> ModuleType:
    """A script such as `pipelines/sample_images.py` as a module, loaded once.

    Scripts are no package: `tokenizers/` would shadow Hugging Face's.
    """
    path = shipped(relative)
    name = f"mmvit_script_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickled data workers look their module up here
    spec.loader.exec_module(module)
    return module
