"""How many bytes a kernel may spill: none as compiled by the Triton whose code the tile tables were chosen by."""

from __future__ import annotations

import triton

# The code of older ones needs more registers: right all the same, not as fast. 3.6 comes with torch 2.11.
MOST_SPILLED = {"3.6": 1536, "3.7": 16}.get(triton.__version__[:3], 0)
