"""A study's YAML: read, checked against the schema and for what cannot be run, and handed out section by section.

The Snakefile imports this, so nothing heavy is imported: no torch, and yaml and jsonschema only when a config is read.
`python -m sla2.config config/tiny.yaml` checks a file and prints what follows from it.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from sla2.config_checks import check_combinations, check_paths
from sla2.errors import UserError, run_main
from sla2.study import Study
from sla2.variant import kept_blocks

SCHEMA = Path(__file__).resolve().parents[1] / "workflow/schemas/config.schema.yaml"


def load_study(path: str | Path) -> Study:
    """Read and check one file.

    Raises:
        UserError: one line per failure, naming file and line, key, value and remedy.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the YAML file of a study") from None
    import yaml

    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)}); mend the line") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds no keys; start from config/tiny.yaml")
    return check_study(config, [path])


def check_study(config: dict, files: Iterable[str | Path]) -> Study:
    """Check a merged config and fill in the schema's defaults.

    Args:
        config: the values; left as it is.
        files: the YAML files that they come from, in the order in which they were merged; named in messages.

    Raises:
        UserError: one line per failure.
    """
    import yaml

    schema = yaml.load(SCHEMA.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    places = _Places([_shown(Path(file)) for file in files])
    config = _with_defaults(json.loads(json.dumps(config)), schema)
    _refuse((failure for error in _validator(schema).iter_errors(config) for failure in _explain(error)), places)
    study = Study.of(config, places.of)
    _refuse(check_combinations(study), places)
    return study


def _refuse(failures: Iterable[tuple[str, str]], places: "_Places") -> None:
    lines = [f"{places.of(key)}: {key}: {message}" for key, message in failures]
    if lines:
        raise UserError("\n".join(lines))


def as_argument(settings: dict) -> str:
    """Settings as JSON that is equal for equal settings, for a command line."""
    return json.dumps(settings, sort_keys=True, ensure_ascii=False)


class _Places:
    """`file:line` of each dotted key; of a key that is absent, the line of the section that it belongs to."""

    def __init__(self, files: list[Path]) -> None:
        import yaml

        self.lines: dict[str, str] = {"": ", ".join(map(str, files))}
        for file in files:
            seen: set[str] = set()
            self._walk(file, yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader), "", seen)

    def _walk(self, file: Path, node: object, key: str, seen: set[str]) -> None:
        children = node.value if node.id == "mapping" else enumerate(node.value) if node.id == "sequence" else ()
        for name, value in children:
            child = f"{key}.{getattr(name, 'value', name)}".lstrip(".")
            line = f"{file}:{getattr(name, 'start_mark', value.start_mark).line + 1}"
            if child in seen:
                raise UserError(f"{line}: {child}: stands twice, first at {self.lines[child]}; remove one")
            seen.add(child)
            self.lines[child] = line
            self._walk(file, value, child, seen)

    def of(self, key: str) -> str:
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return self.lines[key]


def _shown(file: Path) -> Path:
    """A path below the working directory is shown from there."""
    absolute, here = file.absolute(), Path.cwd()
    return absolute.relative_to(here) if absolute.is_relative_to(here) else file


def _with_defaults(value: object, schema: dict) -> object:
    """Fill in `default` of absent keys, from the outside in; wrong types are left for the validator.

    `1e-4` becomes a number here: PyYAML reads YAML 1.1, where a number needs a point, so it takes that for text.
    """
    if schema.get("type") == "number" and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, dict):
        for name, child in schema.get("properties", {}).items():
            if name not in value and "default" in child:
                value[name] = json.loads(json.dumps(child["default"]))
            if name in value:
                value[name] = _with_defaults(value[name], child)
        if isinstance(free := schema.get("additionalProperties"), dict):  # of names that the user chooses
            for name in value.keys() - schema.get("properties", {}).keys():
                value[name] = _with_defaults(value[name], free)
    return value


def _validator(schema: dict):
    # jsonschema's URI format check, which no key here uses, parses a grammar on import: 1.1 s of a core at every start.
    absent = "rfc3987_syntax" not in sys.modules
    if absent:
        sys.modules["rfc3987_syntax"] = None
    try:
        from jsonschema import Draft202012Validator
    finally:
        if absent:
            del sys.modules["rfc3987_syntax"]
    return Draft202012Validator(schema)


def _explain(error: object) -> list[tuple[str, str]]:
    """`(dotted key, "value and problem; remedy")` of one failure of the schema."""
    key, value, rule, limit = (
        ".".join(map(str, error.absolute_path)),
        error.instance,
        error.validator,
        error.validator_value,
    )
    known = error.schema.get("properties", {})
    if rule == "additionalProperties":
        extra = [name for name in value if name not in known]
        return [(_join(key, name), f"unknown key; remove it or use one of {', '.join(known)}") for name in extra]
    if rule == "required":
        absent = [name for name in limit if name not in value]
        return [(_join(key, name), f"missing; add it: {_about(known[name])}") for name in absent]
    problem = {
        "type": f"is not of type {limit}",
        "enum": f"is not one of {limit}",
        "minimum": f"is less than {limit}",
        "maximum": f"is more than {limit}",
        "exclusiveMinimum": f"is not more than {limit}",
        "exclusiveMaximum": f"is not less than {limit}",
        "multipleOf": f"is not a multiple of {limit}",
        "minItems": f"has fewer than {limit} entries",
        "maxItems": f"has more than {limit} entries",
        "uniqueItems": "holds an entry twice",
        "pattern": "may hold only letters, digits, '.', '_' and '-'",
    }.get(rule, "does not fit")
    return [(key, f"{json.dumps(value, ensure_ascii=False)} {problem}; give: {_about(error.schema)}")]


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _about(schema: dict) -> str:
    """Description and unit of a key, without the full stop."""
    unit = f", in {schema['unit']}" if schema.get("unit", "1") != "1" else ""
    return schema.get("description", "one of its entries is wrong").rstrip(".") + unit


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the config of a study and print what follows from it.")
    parser.add_argument("config", type=Path, help="YAML file of a study")
    parser.add_argument(
        "--paths", action="store_true", help="also check that the weights and videos that it names exist"
    )
    arguments = parser.parse_args()
    study = load_study(arguments.config)
    if arguments.paths:
        check_paths(study)
    space, video = study.geometry, study.config["data"]["video"]
    print(f"{arguments.config}: study {study.config['study']}, {len(study.variants)} variants")
    print(
        f"  video {video['frames']} x {video['height']} x {video['width']}, tokens {' x '.join(map(str, space.grid))} = {space.tokens}"
    )
    print(f"  {space.query_blocks} query blocks, {space.key_blocks} key blocks")
    for sparsity in sorted({row.sparsity for row in study.variants.values() if row.sparsity}):
        print(
            f"  sparsity {sparsity:g} keeps {kept_blocks(sparsity, space.key_blocks)} of {space.key_blocks} key blocks"
        )


if __name__ == "__main__":
    run_main(main)
