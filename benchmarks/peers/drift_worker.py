"""How the drift benchmark talks to a peer in its own environment: a JSON line asks, a JSON line answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any


def serve(**calls: Callable[..., Any]) -> None:
    """Answer until standard input ends. What the peer prints goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            found = {"result": calls[asked.pop("call")](**asked)}
        except Exception as error:  # noqa: BLE001 - the benchmark shall say what the peer said
            found = {"error": repr(error)}
        print(json.dumps(found), file=answers, flush=True)
