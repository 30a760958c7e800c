"""What several commands share: flags and config files, which rows, and which verifier."""

import argparse
import difflib
import os
import re
import shlex
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from trl import TrlParser

from ..data.tokenization import json_mapping
from ..runs.checkpoints import whole_checkpoints
from ..runs.run_config import STEP, default_of


@dataclass(kw_only=True)
class DatasetArguments:
    """Which rows."""

    dataset_name: str = field(metadata={"help": "Rows: Hub id, directory, or JSONL, JSON, CSV or Parquet file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    data_files: list[str] | None = field(
        default=None,
        metadata={"help": "Only these files of the Hub dataset or directory; with dataset_name json, also URLs."},
    )
    column_mapping: dict | str | None = field(
        default=None, metadata={"help": "Our columns by yours, for example problem=instruction,answer=output."}
    )
    max_rows: int | None = field(
        default=None, metadata={"help": "Only the first rows; a later run may take more of them."}
    )


@dataclass(kw_only=True)
class DemonstrationArguments(DatasetArguments):
    """Which rows, each of which is a problem with its demonstration or gold answer."""

    skip_incomplete: bool = field(
        default=False,
        metadata={"help": "Leave out rows without a problem, or with nothing to fall back to, and say which."},
    )


# Name on the command line → (module, class).
VERIFIERS = {
    "math": ("verification.math_verifier", "MathVerifier"),
    "choice": ("verification.verifiers", "MultipleChoiceVerifier"),
    "exact": ("verification.verifiers", "ExactMatchVerifier"),
    "numeric": ("verification.verifiers", "NumericVerifier"),
    "json": ("verification.verifiers", "JsonSchemaVerifier"),
    "code": ("verification.code_verifier", "CodeVerifier"),
}


@dataclass(kw_only=True)
class VerifierArguments:
    """What tells right answers from wrong ones."""

    verifier: str = field(default="math", metadata={"help": "Which verifier.", "choices": list(VERIFIERS)})
    verifier_kwargs: dict | str | None = (
        field(  # with None, because TRL's parser reads a field annotated `dict | str` as a dict
            default="{}",
            metadata={"help": """Its arguments as JSON, for example '{"timeout": 10, "num_workers": 4}'."""},
        )
    )


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Examples as they are written, and the default behind each option that has one worth a line."""

    def _get_help_string(self, action):
        shown = action.default not in (None, False, argparse.SUPPRESS, "") and len(str(action.default)) < 60
        return super()._get_help_string(action) if shown and "default" not in (action.help or "") else action.help


class CommandParser(TrlParser):
    """
    TRL's parser of flags and `--config`, with each value of the file converted as if it stood on the command line.

    Raises `ValueError` with one sentence, where argparse prints the usage of every option and ends the process, for a
    flag or key that is no option (with the closest one) and for a value of the wrong type (with file and line).
    """

    def __init__(self, *args, presets: Mapping[str, dict] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.presets = presets or {}
        self.add_argument(
            "--config",
            metavar="FILE",
            default=argparse.SUPPRESS,
            help="YAML file with any of these options as keys; a flag beside it wins.",
        )
        for action in self._actions:
            if (
                action.option_strings and action.option_strings[0] == f"--no_{action.dest}"
            ):  # transformers repeats the text of `--x`
                action.help = f"The opposite of --{action.dest}."

    def error(self, message: str):
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)  # each option once, not with a hyphen again
        raise ValueError(f"{message.rstrip('.')}. `{self.prog} --help` explains every option.")

    def parse_args_and_config(self, args: list[str], return_remaining_strings: bool = False):
        args, path = list(args), None
        for index, arg in enumerate(args):
            if arg == "--config" or arg.startswith("--config="):
                if arg == "--config" and index + 1 == len(args):
                    self.error("argument --config: it needs the path of a YAML file")
                path = args[index + 1] if arg == "--config" else arg.partition("=")[2]
                del args[index : index + 1 + (arg == "--config")]
                break
        if not return_remaining_strings:
            known = self._option_string_actions
            names = dict.fromkeys(arg.partition("=")[0] for arg in args if arg.startswith("--") and arg != "--")
            if wrong := [f"{name}{_closest(name, known)}" for name in names if name not in known]:
                self.error(f"there is no option {' and no '.join(wrong)}")
        self._take_preset(args, path)
        if path is not None:
            os.environ.update(self.read_config(Path(path).expanduser(), ignore_unknown=return_remaining_strings))
        try:
            *parsed, rest = self.parse_args_into_dataclasses(args, return_remaining_strings=True)
        except ValueError as error:
            if "use_cpu" not in str(error):
                raise
            self.error("training uses bfloat16, which needs a GPU here: add --use_cpu to train on the CPU")
        if rest and not return_remaining_strings:
            self.error(f"{shlex.join(rest)} belongs to no option")
        return (*parsed, rest) if return_remaining_strings else tuple(parsed)

    def _take_preset(self, args: list[str], path: str | None) -> None:
        """Makes the settings of the preset that `strategy` names the defaults of their options; all else wins over them."""
        import yaml

        given = " ".join(args).replace("--strategy=", "--strategy ").split()
        named = [given[i + 1] for i, arg in enumerate(given[:-1]) if arg == "--strategy"]
        if path is not None and not named and self.presets:
            with suppress(OSError, ValueError, yaml.YAMLError):  # `read_config` says what is wrong with the file
                values = yaml.safe_load(Path(path).expanduser().read_text())
                named = [values["strategy"]] if isinstance(values, dict) and "strategy" in values else []
        preset = self.presets.get(named[-1], {}) if named else {}
        known = {action.dest for action in self._actions}
        self.set_defaults_with_config(**{name: value for name, value in preset.items() if name in known})

    def read_config(self, path: Path, ignore_unknown: bool = False) -> dict[str, str]:
        """
        Makes what the file holds the default of its options; returns the environment variables that it sets, or raises
        `ValueError` for what is no option or no value of one.
        """
        import yaml

        try:
            text = path.read_text()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a text file: {error}") from error
        except OSError as error:
            raise ValueError(f"You passed --config {path}, which cannot be read: {error.strerror}.") from error
        try:
            root, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold options as `key: value`, but holds {values!r:.100}.")
        for mapping in (root, *(node for _, node in root.value if isinstance(node, yaml.MappingNode))):
            _refuse_repeated_keys(mapping, path)
        # `--x` before its complement `--no_x`; `--help` and `--config` are no options of a file.
        actions = {a.dest: a for a in reversed(self._actions) if a.default is not argparse.SUPPRESS}
        hints = {name: hint for cls in self.dataclass_types for name, hint in get_type_hints(cls).items()}
        environment = {}
        for key, node in root.value:
            where = f"{path}, line {key.start_mark.line + 1}"
            if key.value == "env":
                environment = _environment(values["env"], where)
            elif key.value in actions:
                default = _from_yaml(actions[key.value], hints.get(key.value), node, values[key.value], where)
                self.set_defaults_with_config(**{key.value: default})
            elif not ignore_unknown:
                raise ValueError(f"{where}: there is no option {key.value!r}{_closest(key.value, actions)}.")
        return environment


# What options are called elsewhere → the names that some command here has for it, the first that it has.
SYNONYMS = {
    **dict.fromkeys(("n", "k", "num_samples", "n_samples", "num_return_sequences", "samples"), ("num_generations",)),
    **dict.fromkeys(("max_tokens", "max_new_tokens", "max_length"), ("max_completion_length",)),
    **dict.fromkeys(("model", "model_name", "model_path", "pretrained"), ("model_name_or_path",)),
    **dict.fromkeys(("dataset", "data", "dataset_path"), ("dataset_name", "benchmarks")),
    **dict.fromkeys(("benchmark", "tasks", "task"), ("benchmarks",)),
    **dict.fromkeys(("engine", "backend"), ("sampler",)),
    **dict.fromkeys(("limit", "num_rows", "max_samples", "num_examples"), ("max_rows", "max_problems")),
    **dict.fromkeys(("split",), ("dataset_split", "dataset_train_split")),
    **dict.fromkeys(("epochs", "num_epochs"), ("num_train_epochs",)),
    **dict.fromkeys(("lr",), ("learning_rate",)),
    **dict.fromkeys(("output", "out", "save_dir"), ("output_dir", "output_file")),
}


def _closest(name: str, known: Iterable[str]) -> str:
    bare = name.lstrip("-")
    meant = (name.removesuffix(bare) + other for other in SYNONYMS.get(bare.replace("-", "_"), ()))
    close = [other for other in meant if other in known] or difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _refuse_repeated_keys(mapping, path: Path) -> None:
    """Of a mapping (`yaml.MappingNode`) that holds a key twice, YAML would keep the last value and say nothing."""
    lines: dict[str, int] = {}
    for key, _ in mapping.value:
        line = key.start_mark.line + 1
        if key.value in lines:
            raise ValueError(
                f"{path}: {key.value!r} stands in line {lines[key.value]} and in line {line}. Keep one of them."
            )
        lines[key.value] = line


def _environment(variables, where: str) -> dict[str, str]:
    """What `env` holds, as environment variables."""
    if not isinstance(variables, dict):
        raise ValueError(f"{where}: `env` must hold variables as `NAME: value`, but is {variables!r:.100}.")
    for name, value in variables.items():
        if not isinstance(name, str) or not name or {"=", "\0"} & set(name):
            raise ValueError(
                f"{where}: `env` must hold variables as `NAME: value`, and {name!r:.100} is no name of one."
            )
        if value is None or isinstance(value, (dict, list)) or "\0" in str(value):
            raise ValueError(
                f"{where}: the variable {name} in `env` must be a text or a number, but is {value!r:.100}."
            )
    return {name: str(value) for name, value in variables.items()}


def _from_yaml(action: argparse.Action, hint, node, value, where: str):
    """
    A value of a config file as its option's type.

    Args:
        hint: How the option's field is annotated. A list, a mapping or a truth value stays one where that is among its
            types.
        node (`yaml.Node`): The value as it is written: `007`, `no` and `1e-4` are a text, a text and a number where
            the option is one, whatever YAML takes them for.
        value: The value as YAML reads it.
        where (`str`): File and line, for the error.
    """
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None:
        if (action.default is None and not action.required) or (type(None) in members and node.value):
            return None  # a `null` that is written, where the option may be none at all, such as max_length
        raise ValueError(
            f"{where}: `{action.dest}` is empty (null). Give it a value, or leave the key out for its default."
        )
    if action.nargs in ("+", "*"):
        items = list(zip(node.value, value, strict=True)) if isinstance(value, list) else [(node, value)]
        return [_scalar(action, n.value, v, where) for n, v in items]
    taken = type(value) in {get_origin(member) or member for member in members}
    if taken and (isinstance(value, (dict, list)) or node.value.lower() in ("true", "false")):
        return value
    return _scalar(action, node.value, value, where)


def _scalar(action: argparse.Action, written: str, value, where: str):
    """One value, as argparse would read it on the command line."""
    # TRL's parser wraps the type of an option that may be None, and keeps its name.
    name = getattr(action.type, "__name__", "")
    kind = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false", "str": "a text"}.get(name)
    if isinstance(value, (dict, list)):
        what = "list" if isinstance(value, list) else "mapping"
        raise ValueError(f"{where}: `{action.dest}` must be {kind or 'one value'}, but is the {what} {value!r:.100}.")
    if name == "int" and isinstance(value, float) and value.is_integer():
        written = str(int(value))
    try:
        converted = action.type(written) if callable(action.type) else written
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{where}: `{action.dest}` must be {kind or error}, but is {written!r}.") from error
    if action.choices is not None and converted not in action.choices:
        raise ValueError(
            f"{where}: `{action.dest}` must be one of {', '.join(map(str, action.choices))}, but is {written!r}."
        )
    return converted


def parser_for(
    types, command: str, description: str, examples: str, presets: Mapping[str, dict] | None = None
) -> CommandParser:
    return CommandParser(
        types,
        presets=presets,
        prog=f"trl-offpolicy {command}",
        description=description,
        epilog=examples,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,  # a misspelt flag must not pass for another one
    )


def load_dataset(arguments: DatasetArguments):
    from ..data.loading import load_rows

    dataset = load_rows(
        arguments.dataset_name,
        arguments.dataset_config,
        arguments.dataset_split,
        arguments.dataset_revision,
        data_files=arguments.data_files,
    )
    if arguments.column_mapping:
        dataset = dataset.rename_columns(_column_mapping(arguments.column_mapping, dataset.column_names))
    if arguments.max_rows is not None:
        if arguments.max_rows < 1:
            raise ValueError(f"You passed max_rows={arguments.max_rows}; it must be at least 1.")
        dataset = dataset.select(range(min(arguments.max_rows, len(dataset))))
    return dataset


def load_demonstrations(arguments: DemonstrationArguments, answer_column: str):
    from ..data.formats import complete_rows

    dataset = load_dataset(arguments)
    return complete_rows(dataset, answer_column) if arguments.skip_incomplete else dataset


def _column_mapping(mapping: str | dict, columns: list[str]) -> dict[str, str]:
    """
    Column of the dataset → the name that it gets, from `ours=theirs,…` (from a config file it may come as a mapping).
    """
    pairs = mapping.items() if isinstance(mapping, dict) else [part.partition("=")[::2] for part in mapping.split(",")]
    pairs = [(str(ours).strip(), str(theirs).strip()) for ours, theirs in pairs]
    message = f"You passed column_mapping={mapping!r}"
    names = {theirs: ours for ours, theirs in pairs}
    if not all(part for pair in pairs for part in pair) or len(names) < len(pairs):
        raise ValueError(
            f"{message}; write our columns by yours, each once, such as problem=instruction,answer=output."
        )
    if missing := [theirs for theirs in names if theirs not in columns]:
        raise ValueError(f"{message}, but the dataset has the columns {columns} and no {' and no '.join(missing)}.")
    renamed = [names.get(column, column) for column in columns]
    if twice := {name for name in renamed if renamed.count(name) > 1}:
        raise ValueError(
            f"{message}, after which there would be two columns {' and '.join(sorted(twice))}: the dataset has one of that name. Map that one too, "
            f"for example {min(twice)}_before={min(twice)}."
        )
    return names


def check_before_loading(output_dir: str, report_to: str = "none") -> None:
    """
    Proves that files can be written where the run's directory is or will be, and that W&B has a key, before minutes go
    into loading a model.
    """
    from ..runs.run_log import check_wandb

    if not output_dir.strip():
        raise ValueError(f"You passed output_dir={output_dir!r}; name a directory, or . for the one you are in.")
    path = Path(output_dir).absolute()
    try:
        with tempfile.TemporaryFile(dir=next(p for p in (path, *path.parents) if p.exists())) as file:
            file.write(b"0")
    except OSError as error:
        raise ValueError(f"You passed output_dir={output_dir!r}, where nothing can be written: {error}.") from error
    check_wandb(report_to)


def say_next(command: str) -> None:
    """Prints the command that usually follows this one, unless this is a step of a loop or an experiment."""
    if STEP not in os.environ:
        print(command)


def last_checkpoint(resume: str | None, output_dir: str) -> str | None:
    """
    `resume_from_checkpoint`, with `last` as the newest whole checkpoint in `output_dir`; `ValueError` if there is none.
    """
    if resume != "last":
        return resume
    if not (whole := whole_checkpoints(Path(output_dir))):
        raise ValueError(
            f"You passed resume_from_checkpoint='last', but there is no checkpoint in {output_dir!r} that is whole and has the optimizer's state (which "
            "save_only_model leaves out). Leave it out to begin, or name a checkpoint to go on from its weights alone."
        )
    return str(whole[-1])


def given(*configs) -> dict[str, Any]:
    """The fields of dataclasses that differ from their defaults, as a config file of the command has them."""
    values = {}
    for config in configs:
        for f in fields(config):
            value = getattr(config, f.name)
            if value != default_of(f) and f.repr:  # not a token
                values[f.name] = value
    return values


def model_init_kwargs(model_args, args) -> dict[str, Any]:
    """
    What a trainer of TRL loads the model with: what its own `model_init_kwargs` say over the options of TRL's
    `ModelConfig`.
    """
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }


def make_verifier(arguments: VerifierArguments):
    module, name = VERIFIERS[arguments.verifier]
    kwargs = json_mapping("verifier_kwargs", arguments.verifier_kwargs, '{"timeout": 10}')
    try:
        return getattr(import_module(f"..{module}", __package__), name)(**kwargs)
    except TypeError as error:
        raise ValueError(f"You passed verifier_kwargs={arguments.verifier_kwargs!r} to {name}: {error}") from error
    except ImportError as error:  # an extra that is not installed
        raise ValueError(str(error)) from error
