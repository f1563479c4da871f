"""Fast, exact, drop-in parts for prototypical contrastive self-supervised learning."""

from __future__ import annotations

from pathlib import Path

# In a checkout the Triton kernels are the folder beside this one; an installed package holds them in this one.
if not (Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

from fastproto._settings import backend as backend
from fastproto._settings import set_debug as set_debug

__version__ = "0.1.0"
__all__ = ["__version__", "backend", "set_debug"]
