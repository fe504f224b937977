"""The configuration's JSON schema, for editors: ``python -m paceline.config.schema [FILE]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from paceline.config.model import Config


def schema() -> str:
    """The published schema of the configuration file."""
    found = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> None:
    """Write the schema to a file, or to standard output."""
    if arguments:
        Path(arguments[0]).write_text(schema(), encoding="utf-8")
    else:
        sys.stdout.write(schema())


if __name__ == "__main__":
    main(sys.argv[1:])
