"""Tables and records on disk, whole or absent."""

import csv
import json

from flowlib.files import write_atomically


def write_csv(path, rows):
    """Writes a list of dicts with the same keys as a table."""

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def write_json(path, content):
    write_atomically(
        path, lambda p: p.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    )


def write_text(path, text):
    write_atomically(path, lambda p: p.write_text(text + "\n", encoding="utf-8"))
