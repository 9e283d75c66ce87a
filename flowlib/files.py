"""Files that are whole or absent: each is written to a temporary name, then renamed."""

import csv
import json
import os
from pathlib import Path


def write_atomically(path, write):
    """Calls write(temporary_path), then renames it to path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path, rows):
    """Writes a list of dicts with the same keys as a table."""

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def write_json(path, content):
    write_atomically(path, lambda p: p.write_text(json.dumps(content, indent=1) + "\n"))


def write_text(path, text):
    write_atomically(path, lambda p: p.write_text(text + "\n", encoding="utf-8"))
