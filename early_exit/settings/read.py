"""From a config file's dict, or a run's `config.json`, to checked settings, and back.

The one idea: this is the border. A `ConfigDict` comes as far as `read`, which tells everything that
is wrong with it in one error; behind it, there are only frozen sections.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from early_exit.settings.fields import Section, SettingsError, checked, hints, rules
from early_exit.settings.overrides import ConfigDict, Overrides
from early_exit.settings.sections import Settings

# Section by name, in order; what stands at the top itself is under "".
SECTIONS: dict[str, type[Section]] = {"": Settings} | {
    field.name: hints(Settings)[field.name]
    for field in dataclasses.fields(Settings)
    if not field.metadata
}

# What runs that were saved by earlier versions call differently.
RENAMED = {"tune.states": "tune.hidden_states"}


def offer(name: str, choice: str) -> None:
    """One more choice of the setting at a dotted name, for what another module has added."""
    section, _, key = name.partition(".")
    more = rules(SECTIONS[section])[key].more
    if choice not in more:
        more.append(choice)


def read(config: ConfigDict | Mapping[str, Any]) -> Settings:
    """The settings that a config file gave, with defaults for what it leaves out.

    Raises:
      SettingsError: unknown names, values of another type or out of range, or settings that
        contradict each other; all of them at once.
    """
    if not isinstance(config, ConfigDict | Mapping):
        raise SettingsError(
            [f"a config is a ConfigDict, such as defaults(…) makes, not {config!r}"]
        )
    given = _plain(config)
    problems = _strangers(given)
    top, wrong = checked(Settings, given)
    problems += wrong
    sections = {}
    for name, kind in SECTIONS.items():
        found = given.get(name, {})
        if not name or not isinstance(found, Mapping):
            continue
        try:
            sections[name] = kind(**{key: found[key] for key in rules(kind).keys() & found.keys()})
        except SettingsError as error:
            problems += error.problems
    if problems:
        raise SettingsError(problems)
    return Settings(**top, **sections)


def read_saved(text: str) -> Settings:
    """The settings in a `config.json`, of earlier versions, too.

    Raises:
      SettingsError: as `read`.
      ValueError: not JSON, or no object.
    """
    given = json.loads(text)
    if not isinstance(given, dict):
        raise ValueError("the settings of a run are a JSON object of sections")
    return read(renamed(given))


def renamed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the names of today."""
    given = {name: dict(x) if isinstance(x, Mapping) else x for name, x in given.items()}
    for old, new in RENAMED.items():
        (section, name), (new_section, new_name) = old.split("."), new.split(".")
        if isinstance(given.get(section), dict) and name in given[section]:
            given.setdefault(new_section, {})[new_name] = given[section].pop(name)
    return given


def changed(settings: Settings, overrides: Overrides) -> Settings:
    """The same with others at dotted names, as in `{"tune.steps": 3, "exits.points": (2,)}`.

    Raises:
      SettingsError: as `read`.
    """
    given = as_dict(settings)
    for name, value in overrides.items():
        section, _, key = name.rpartition(".")
        (given.setdefault(section, {}) if section else given)[key] = value
    return read(given)


def as_dict(settings: Settings) -> dict[str, Any]:
    """Section → name → value, as JSON has it but for tuples; `read_saved` reads that."""
    return dataclasses.asdict(settings)


def defaults(**given: Any) -> ConfigDict:
    """A config with every setting: those given, by section, and for the others their default.

    Flags can override only what a config has, so config files are made with this:
    `defaults(model={"source": "org/name"}, data={"source": "texts"}, tune={"steps": 100})`.

    Raises:
      SettingsError: unknown names; all of them at once.
    """
    if problems := _strangers(given):
        raise SettingsError(problems)
    config: dict[str, Any] = {}
    for section, kind in SECTIONS.items():
        values = {name: _default(kind, name) for name in rules(kind)}
        values |= {name: value for name, value in _of(given, section).items() if name in values}
        config |= {section: values} if section else values
    return ConfigDict(config)


def _default(kind: type[Section], name: str) -> Any:
    field = kind.__dataclass_fields__[name]
    if field.default is None:  # without its type, no flag could give it a value
        number, _ = hints(kind)[name].__args__
        return config_dict.placeholder(number)
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def _of(given: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    return given.get(section, {}) if section else given


def _plain(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    return config.to_dict() if isinstance(config, ConfigDict) else dict(config)


def _strangers(given: Mapping[str, Any]) -> list[str]:
    """A sentence for each name that is no setting, with the nearest that is."""
    known = [f"{kind.prefix}{name}" for kind in SECTIONS.values() for name in rules(kind)]
    found, problems = [], []
    for name, value in given.items():
        if name in rules(Settings):
            continue
        if name not in SECTIONS:
            found += [f"{name}.{key}" for key in value] if isinstance(value, Mapping) else [name]
        elif isinstance(value, Mapping):
            found += [f"{name}.{key}" for key in value if key not in rules(SECTIONS[name])]
        else:
            problems.append(f"{name}={value!r} is not a section, a dict of settings")
    for name in found:
        (nearest,) = difflib.get_close_matches(name, known, 1, cutoff=0)
        problems.append(f"there is no setting {name!r}; did you mean {nearest!r}?")
    return problems
