"""The configuration reference: every field of every section, from the code that validates it.

``python -m deploy.config_docs > docs/configuration.md``
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from common.config.base import Family, Section
from common.config.draft import section_of
from common.config.effects import RULES
from common.config.model import PRESETS, PalmConfig
from common.config.names import fields
from common.config.rewards import RewardComponent
from common.config.run import RunConfig, SourceConfig

Row = tuple[str, Any, str]
"""Dotted name, default and meaning of a field."""
_HEAD = """\
# Configuration

<!-- Written by `python -m deploy.config_docs > docs/configuration.md`; do not edit. -->

A recipe is a YAML file with one section per component. Everything has a default, so a recipe
holds only what differs:

```yaml recipe
name: first
data:
  demonstrations: [demonstrations.jsonl]
learner: {ranks: 2, zero_stage: 2}
train: {algorithm: ppo, iterations: 20}
```

The command line overrides single fields by their dotted names. Values are YAML, but names, paths
and other texts are taken as they are written (`name=2024-11-28`), in recipes too; `~` at the start
of a path is the home folder:

```sh
talipot train --config recipe.yaml learner.zero_stage=3 train.ppg=null
```

Of two overrides of one field the last counts. One that names a section sets the fields that it
names and leaves the others as they are: `train={lr: 1e-4}` is `train.lr=1e-4`.

A section, list or mapping under which nothing stands, or only comments, means its defaults;
`train.ppg: null` switches the auxiliary phase off, because null is a value of that field. A list
of texts that has one may be written as the text: `prompts: data/*.jsonl`. Refused, all of them at
once, with file and line, are

- a key that is given twice in a section, as YAML would silently forget the first;
- an unknown key, with the nearest valid name, or what we call that which other systems call so
  (`learning_rate` is `lr`);
- a number that is not finite, or is `yes` or `no`;
- **a setting that changes nothing under the others**, as `train.gae_lambda` under
  `train.algorithm: grpo`, with where it would. What is asked for is whether it was written, not
  whether it is the default. Only in a file with every section there is, which was printed or saved
  for you, a default is not taken for a wish.

`talipot config --config recipe.yaml` prints a recipe with every default filled in, and as comments
what its checkpoints say ([generation defaults](models.md#generation-defaults)); the same recipe,
with absolute paths, is saved as `config.yaml` in the run's folder.

Defaults stand on this page and in no other.
"""


_CONDITIONS = """\
A recipe that gives one of these where it has no effect is refused. What counts are kinds and
switches, not sizes: `train.ppg` with fewer `train.iterations` than `train.ppg.n_pi` is taken. A
field of one kind of reward component or model has no effect under another kind.
"""


def reference_page() -> str:
    """Write the whole page, ending in a newline."""
    parts = [_HEAD, "## The run", _table(row for row in fields() if "." not in row[0])]
    for section, info in RunConfig.model_fields.items():
        if inner := section_of(info.annotation):
            parts += [f"## `{section}`", _first_line(inner), *_tables(inner, f"{section}.")]
        if section == "data":
            parts += [
                "### `data.mixture`",
                "Sources of prompts by their names: a file's without its ending, or what "
                "`data.source_column` says.",
                *_tables(SourceConfig, "data.mixture.NAME."),
            ]
        if section == "reward_service":
            parts += [
                "### `reward_service.components`",
                "The score is the weighted sum of named components; `NAME` is yours to choose.",
                *_tables(RewardComponent, "reward_service.components.NAME."),
            ]
    parts += ["## Settings that need others", _CONDITIONS, _conditions()]
    parts += ["## Presets", "`preset: NAME` takes a model's shape from here.", _presets()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(rows: Iterable[Row]) -> str:
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for name, default, description in rows:
        meaning = " ".join(description.split()).replace("``", "`")
        lines.append(f"| `{name}` | {_code(default)} | {_cell(meaning)} |")
    return "\n".join(lines)


def _tables(section: type[Section], prefix: str) -> Iterator[str]:
    """Write the table of a section; of a family, one of what all kinds have and one for each."""
    if not issubclass(section, Family):
        yield _table(fields(section, prefix))
        return
    common = section.model_fields.keys()
    yield _table(_of(fields(section, prefix), prefix, common))
    for name, kind in section.kinds.items():
        yield f"`kind: {name}`: {_first_line(kind)}"
        different = {
            field
            for field, info in kind.model_fields.items()
            if field not in common or _differs(info, section.model_fields[field])
        }
        if own := list(_of(fields(kind, prefix), prefix, different - {"kind"})):
            yield _table(own)


def _differs(info: FieldInfo, other: FieldInfo) -> bool:
    return bool(info.get_default() != other.get_default())


def _of(rows: Iterable[Row], prefix: str, names: Collection[str]) -> Iterator[Row]:
    """Choose the rows of these fields, and of what is inside them."""
    return (row for row in rows if row[0].removeprefix(prefix).split(".")[0] in names)


def _conditions() -> str:
    lines = []
    for rule in RULES:
        names = ", ".join(f"`{name}`" for name in rule.fields)
        lines.append(f"- {names}: {rule.when}")
    return "\n".join(lines)


def _presets() -> str:
    hidden = ("kind", "activation_checkpointing")
    names = [name for name in PalmConfig.model_fields if name not in hidden]
    lines = [f"| preset | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for preset, model in PRESETS.items():
        cells = " | ".join(_code(getattr(model, name)) for name in names)
        lines.append(f"| `{preset}` | {cells} |")
    return "\n".join(lines)


def _code(value: Any) -> str:
    return f"`{_cell(_yaml(value))}`"


def _yaml(value: Any) -> str:
    """Write a default as in a recipe."""
    if value is None:
        return "null"
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, RewardComponent):
        return _yaml({"kind": value.kind, "weight": value.weight})
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return str(value) if value != "" else '""'


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _first_line(annotation: Any) -> str:
    return str(annotation.__doc__).strip().splitlines()[0]


if __name__ == "__main__":
    print(reference_page(), end="")
