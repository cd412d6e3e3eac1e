"""The fake model of the loop's tests serves these too, and so do the recordings of the demo's."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("runtime", "demo"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
