"""`python -m server` from a checkout that is not installed: the same as `edge-coordinator`."""

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent)]

from edge_server.cli import main  # noqa: E402 - the path comes first

main(prog_name="python -m server")
