"""The page of a study, from its summary: tables, pictures, what is missing, and the command."""

from collections.abc import Mapping
from typing import Any

from .measures import MEASURES
from .records import runs_of
from .tables import accuracy_table, adversaries_table, bits_table, loss_table, search_table

THE_SCRIPT_S = "the script's"
ELSEWHERE = ("learning_rate", "learning_rates", "weight_decay", "workers", "seeds", "use_cpu", "torch_compile")
"""Options of a method that tables or notes have, or that change nothing."""
BITS = """## Bits per parameter and step (the paper's Table 1)

The paper counts between a worker and the server. Here the workers are the server together: each one sends its part of
the votes up to the others, and its part of the decision down to them. "Predicted" are the bits of that code; "counted"
is what a worker's ledger has, of which the parts of gradients that do not fill a block, and sizes, are the rest.

"""


def page(summary: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """Markdown. `pictures` are file names beside the page, with what they show."""
    study = summary["study"]
    bits = bits_table(runs_of(summary, "ordinary"))
    parts = [
        f"# {summary['title']}",
        study["findings"].strip(),
        study["note"].strip(),
        _absent(summary),
        _results(summary),
        *(f"{shown}:\n\n![{shown}]({name})" for name, shown in pictures.items()),
        _adversaries(summary),
        bits and BITS + bits,
        _scores(summary),
        _search(summary),
        _how(summary),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _results(summary: Mapping[str, Any]) -> str:
    title = MEASURES[summary["study"]["measure"]].title
    table = accuracy_table(summary) if summary["study"]["measure"] == "accuracy" else loss_table(summary)
    return (
        f"## {title[0].upper()}{title[1:]}\n\nMean (min to max) over the seeds; number of seeds. One learning rate and "
        f"weight decay for all runs of a method.\n\n{table}{_options(summary)}"
    )


def _options(summary: Mapping[str, Any]) -> str:
    """What else the study sets of each method."""
    labels: dict[str, list[str]] = {}
    for label, given in summary["study"]["methods"].items():
        chosen = {name: value for name, value in given.items() if name not in ELSEWHERE and value != label}
        if chosen:
            text = ", ".join(f"`{name}={value}`" for name, value in chosen.items())
            labels.setdefault(text, []).append(f"`{label}`")
    given = [f"{', '.join(names)} with {text}" for text, names in labels.items()]
    return f"\n\nOther than by default: {'; '.join(given)}." if given else ""


def _adversaries(summary: Mapping[str, Any]) -> str:
    wanted = summary["study"]["adversaries"]
    if wanted is None:
        return ""
    title, _, unit = MEASURES[summary["study"]["measure"]].title.partition(", ")
    return (
        f"## With adversaries\n\n{title.capitalize()}{', ' * bool(unit)}{unit} (and seeds, as above), with so many of "
        f"{wanted['workers']} workers that negate their gradient (`flip`) or draw its signs at random (`random`).\n\n"
        f"{adversaries_table(summary)}"
    )


def _scores(summary: Mapping[str, Any]) -> str:
    tables = summary["scores"]
    if not tables:
        return ""
    return "## Benchmarks\n\nThe run of each method with its first seed.\n\n" + "\n\n".join(map(str.strip, tables))


def _search(summary: Mapping[str, Any]) -> str:
    study, tune = summary["study"], summary["study"]["tune"]
    if summary["search"] is None:
        return "## Learning rates\n\nThose of the first table are the study's; none was searched in it."
    measure = MEASURES[study["measure"]]
    if tune["factors"]:
        factors = ", ".join(f"{factor:g}" for factor in sorted(tune["factors"]))
        grid = f"Each method's usual one (the paper's, if the study gives no other) times {factors}"
    else:
        grid = "A grid for each method"
    where = [] if tune["workers"] is None else [f"{tune['workers']} workers"]
    where += [_length(study), f"seed {tune['seed']}"]
    chosen = "; of equals, the lower loss" if measure.name == "accuracy" else ""
    split = "test set" if measure.name == "accuracy" else "validation split that the tables report"
    no_other = ": there is no validation split" if measure.name == "accuracy" else ""
    text = (
        f"## Learning rates searched\n\n{grid}; {', '.join(where)}. Bold: {measure.best}"
        f"{chosen}. It was **chosen on the {split}**, equally for all{no_other}.\n\n{search_table(summary)}"
    )
    if edges := [f"`{label}`" for label, found in summary["search"].items() if found["at_edge"]]:
        text += f"\n\nBest at the edge of their grid, so that another may be better still: {', '.join(edges)}."
    return text


def _length(study: Mapping[str, Any]) -> str:
    """Of a run of the search."""
    arguments, epochs = study["arguments"], study["tune"]["epochs"]
    if epochs is None and "max_steps" in arguments:
        return f"{arguments['max_steps']} steps"
    return f"{epochs or arguments.get('num_train_epochs', THE_SCRIPT_S)} epochs"


def _absent(summary: Mapping[str, Any]) -> str:
    without = [label for label in summary["study"]["methods"] if label not in summary["learning_rates"]]
    lines = [
        f"- `{folder}`{', failed: see its `log.txt`' if folder in summary['failed'] else ''}"
        for folder in summary["missing"]
    ]
    lines += [f"- all of `{label}`: no run of its search is finished" for label in without]
    if not lines:
        return ""
    return "**Incomplete.** These runs are missing:\n\n" + "\n".join(lines)


def _how(summary: Mapping[str, Any]) -> str:
    where = {
        f"{run['machine']}, with {', '.join(f'{name} {number}' for name, number in run['versions'].items())}": None
        for run in summary["runs"]
        if run["machine"] and run["versions"]
    }
    return "\n\n".join(["## How", f"```bash\n{summary['command']}\n```", *(f"On {one}." for one in where)])
