"""Functions that the YAMLs here name."""

from typing import Any

from datasets import Dataset


def process_hellaswag(rows: Dataset) -> Dataset:
    """What lm-eval makes of HellaSwag's own fields; rows with `query`, `choices` and `gold` have it behind them."""
    # Not above: lm-eval loads that module anew with its YAML, and datasets cannot hash the old one's functions.
    from lm_eval.tasks.hellaswag.utils import process_docs

    if "ctx_a" in rows.column_names:
        return process_docs(rows)

    def label(row: dict[str, Any]) -> dict[str, str]:
        return {"label": str(row["gold"])}  # the prompt's template reads the dataset's own field

    return rows.map(label)
