"""A second real vLLM engine, in a process of its own, on the home of the first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.engine.harness import Answer

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from tests.engine.harness import Engine

engine = Engine(Path(sys.argv[1]), **json.loads(sys.argv[2]))
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    with engine.counted() as gained:
        answer = engine.store(order["prompt"], policy=order["policy"])
    print(json.dumps({"answer": asdict(answer), "gained": gained}), flush=True)
engine.core.engine_core.shutdown()
"""


class Other:
    """An engine in a process of its own. `settings`: as `Engine` takes them."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(home), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *sys.path)))},
        )

    def _line(self, begins: str) -> str:
        assert self.process.stdout is not None
        lines = iter(self.process.stdout.readline, "")
        return next(line for line in lines if line.startswith(begins))

    def wait(self) -> None:
        """Wait until it serves."""
        self._line("ready")

    def store(self, prompt: list[int], policy: str | None = None) -> tuple[Answer, Counter[str]]:
        """Its answer, and what the daemon counted meanwhile."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "policy": policy}) + "\n")
        self.process.stdin.flush()
        said = json.loads(self._line("{"))
        answer = Answer(**said["answer"])
        # JSON has no integer keys
        answer.logprobs = [{int(token): at for token, at in one.items()} for one in answer.logprobs]
        return answer, Counter(said["gained"])

    def close(self) -> None:
        """Kill it, as a crash would: the daemon is not told."""
        self.process.kill()
        self.process.communicate()
