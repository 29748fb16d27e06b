"""What runs are compared by: how it is called, which is better, how it is shown."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """A number at the end of a run.

    Attributes:
        name: `loss` or `accuracy`.
        final: the key of a record that has it.
        title: as a table or an axis has it, with the unit.
        best: as a sentence has it.
        scale: from the record's unit to the shown one.
        sign: 1 if larger is better, else -1.
        digits: behind the point, in tables.
        form: of one number among many.
    """

    name: str
    final: str
    title: str
    best: str
    scale: float
    sign: int
    digits: int
    form: str

    def of(self, record: Mapping[str, Any]) -> float | None:
        """In the shown unit; None if the run ended without a finite one."""
        value = record[self.final]
        return None if value is None else self.scale * value

    def shown(self, value: float) -> str:
        return format(value, self.form)


MEASURES = {
    "loss": Measure(
        "loss", "final_loss", "final validation loss", "the lowest validation loss at the end", 1, -1, 4, ".3f"
    ),
    "accuracy": Measure(
        "accuracy",
        "final_accuracy",
        "final test accuracy, %",
        "the highest accuracy at the end, in %",
        100,
        1,
        2,
        ".2f",
    ),
}
