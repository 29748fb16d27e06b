"""The published pages are what the runner makes of the numbers beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from studies.page import page

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "model_cards").glob("*/summary.json")), ids=lambda path: path.parent.name
)
def test_a_page_has_the_numbers_of_its_summary(path: Path) -> None:
    text = (path.parent / "README.md").read_text()
    pictures = {name: shown for shown, name in re.findall(r"^!\[(.*)\]\((.*\.png)\)$", text, re.MULTILINE)}
    assert all((path.parent / name).is_file() for name in pictures)
    assert text == page(json.loads(path.read_text()), pictures)
