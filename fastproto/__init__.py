"""Fast, exact, drop-in parts for prototypical contrastive self-supervised learning."""

from __future__ import annotations

from pathlib import Path

# In a checkout the Triton kernels are the folder beside this one, which an installed package holds as fastproto/kernels.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

from fastproto._settings import backend as backend  # noqa: E402
from fastproto._settings import set_debug as set_debug  # noqa: E402

__version__ = "0.1.0"
__all__ = ["__version__", "backend", "set_debug"]
