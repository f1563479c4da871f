"""Installs a wheel into an environment of its own and uses it there: ``python tests/try_wheel.py dist/*.whl``.

The environment borrows this one's packages (torch alone is gigabytes) but not its fastproto.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

USE = """
import torch, fastproto.kernels
from fastproto import _native
from fastproto.losses import NTXentLoss
from fastproto.ops.crop_resize import crop_resize
from fastproto.train.config import Config
from fastproto.train.recipes import default_recipe
assert default_recipe("pauc", "digits") is not None and Config().method == "pauc"
assert default_recipe("byol", "tiny-imagenet").stem == "byol_tiny-imagenet"
assert "site-packages" in fastproto.__file__ and "site-packages" in fastproto.kernels.__file__, fastproto.__file__
assert _native.cpp is not None, _native.cpp_error
assert "site-packages" in _native.cpp.__file__, _native.cpp.__file__
z = torch.randn(8, 16, requires_grad=True)
NTXentLoss()(z, torch.randn(8, 16)).backward()
assert z.grad.isfinite().all()
"""


def environment(folder: Path) -> Path:
    """A virtual environment that sees this one's packages, pip among them, but for fastproto; returns its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    borrowed = folder / "borrowed"
    borrowed.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "fastproto" not in path.name:
            (borrowed / path.name).symlink_to(path)
    Path(site.strip(), "borrowed.pth").write_text(f"{borrowed}\n")
    return python


def main(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        python = environment(Path(folder) / "venv")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel.resolve()], check=True)
        subprocess.run([python, "-c", USE], check=True, cwd=folder)
        info = subprocess.check_output([python, "-m", "fastproto", "info"], cwd=folder, text=True)
        assert "crop_resize" in info and "cpu: cpp" in info, info
        options = subprocess.check_output([python, "-m", "fastproto", "train", "--help"], cwd=folder, text=True)
        assert "--method" in options, options
    print(f"{wheel.name}: installs, imports, computes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
