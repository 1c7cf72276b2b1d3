"""The scripts' own parts. What they share with `python -m overlay bench` is imported from overlay/cli/bench.

An engine's process may see neither the overlay's package nor its sitecustomize, so it finds bench_engine, and nothing
else of it, by the folder that is put on sys.path here. A controlling script has the repository on its path, too.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
OUTSIDE = REPOSITORY / "overlay" / "cli" / "bench" / "outside"
sys.path.append(str(OUTSIDE))
