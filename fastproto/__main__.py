"""``python -m fastproto``: the ``fastproto`` command."""

from __future__ import annotations

import sys

from fastproto.cli import main

sys.exit(main())
