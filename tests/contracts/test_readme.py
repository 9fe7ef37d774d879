"""What the README promises about flags is what the code has."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from toka.config import Config

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_flag_table_is_that_of_the_code() -> None:
    expected = []
    for spec in dataclasses.fields(Config):
        default = {True: "T", False: "F"}[spec.default] if isinstance(spec.default, bool) else spec.default
        names = " or ".join(f"`{name}`" for name in (spec.name, *spec.metadata["aliases"]))
        choices = f" ({', '.join(spec.metadata['choices'])})" if spec.metadata["choices"] else ""
        expected.append(f"| {names} | `{default}` | {spec.metadata['unit']} | {spec.metadata['help']}{choices} |")
    table = README[README.index("| flag |") :].split("\n\n")[0].splitlines()[2:]
    assert table == expected
