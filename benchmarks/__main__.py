"""Run every benchmark and rewrite the table of docs/benchmarks.md from their results."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.common import RESULTS

NAMES = (
    "views",
    "losses",
    "knn",
    "evaluators",
    "ema",
    "end_to_end",
    "overhead",
    "monitors",
    "memory",
    "launches",
    "streaming",
    "serving",
)
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def page() -> str:
    """Return the page: one section a benchmark, with its command, date and machine."""
    parts = [
        "# Benchmarks\n",
        "Written by `make bench` from `benchmarks/results/`. Peers and we ran in turn, in one run.\n",
    ]
    for name in NAMES:
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        machine = record["machine"]
        versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
        parts += [
            f"## {name}\n",
            f"{record['notes']}\n",
            f"`{record['command']}`, {machine['date']}, {machine['processor']}, {machine['threads']} threads\n",
            f"{versions}\n",
        ]
        columns = list(record["rows"][0])
        lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for row in record["rows"]:
            cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    for benchmark in sys.argv[1:] or NAMES:
        subprocess.run([sys.executable, "-m", f"benchmarks.{benchmark}"], check=True)
    PAGE.write_text(page())
