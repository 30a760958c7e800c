"""The whole way on real parts: real rows through the command line, the training script on what came out, a lazy import."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from graphlib import TopologicalSorter
from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest
from conftest import POLICY, ROOT
from datasets import load_dataset
from packaging.requirements import Requirement
from packaging.version import Version

from trl_offpolicy.answers.extraction import final_answer
from trl_offpolicy.data.formats import demonstration


DATA = Path(__file__).parent / "data"


def run(*command, **kwargs):
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=600, cwd=ROOT, **kwargs
    )


@pytest.mark.parametrize("name", ["gsm8k_50", "math_50"])
@pytest.mark.slow
def test_real_rows_come_out_once_each(tmp_path, name, command):
    """LaTeX, Asymptote and unicode through a policy that can solve none of it: everything falls back, nothing is lost."""
    result = command(
        "rewrite", "--model_name_or_path", POLICY, "--dataset_name", DATA / f"{name}.jsonl", "--output_dir",
        tmp_path / "run", "--num_generations", 1, "--max_completion_length", 24,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rewritten = load_dataset(str(tmp_path / "run" / "dataset"), split="train")
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").open()]
    assert list(rewritten["input_id"]) == [r["id"] for r in rows] and len(set(rewritten["id"])) == 50
    assert list(rewritten["answer"]) == [r["answer"] for r in rows] and list(rewritten["input_source"]) == [
        r["source"] for r in rows
    ]
    kept = {}
    for line in (tmp_path / "run" / "journal.jsonl").open():
        entry = json.loads(line)
        if entry.get("verdict") == "correct":
            kept[entry["id"]] = entry["stage"]
    assert list(rewritten["source"]) == [kept.get(i, "expert") for i in rewritten["id"]]
    for row, new in zip(rows, rewritten, strict=True):
        assert new["prompt"][0]["content"].startswith(row["problem"])
        if new["source"] == "expert":
            (turn,) = new["completion"]  # in the form that the prompt asks for
            assert (
                demonstration(new) == row["solution"] and turn["role"] == "assistant" and "\\boxed" in turn["content"]
            )
            stated = [final_answer(text).replace(",", "") for text in (turn["content"], row["solution"])]
            assert stated[0] == stated[1]


@pytest.mark.slow
def test_sft_on_a_rewritten_dataset(tmp_path, capsys):
    """The command as it is printed takes the run directory's dataset, LoRA and the importance weights included; so does the example."""
    from quickstart_task import GUIDED_PROMPT, demonstrations, problems

    from trl_offpolicy import DataRewriter, RewriteConfig

    args = RewriteConfig(
        str(tmp_path / "run"), num_generations=2, max_completion_length=100, guided_prompt=GUIDED_PROMPT
    )
    rewritten = DataRewriter(POLICY, args).rewrite(demonstrations(problems(24, 9, (1, 2, 3))))
    assert "self" in rewritten["source"]
    result = run(
        "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 1, "-m", "trl_offpolicy.cli", "sft", "--model_name_or_path", POLICY, "--dataset_name", tmp_path / "run" / "dataset", "--objective", "iw",
        "--output_dir", tmp_path / "out", "--use_cpu", "--bf16", "False", "--dtype", "float32", "--max_steps", 2, "--logging_steps", 1,
        "--per_device_train_batch_size", 8, "--use_peft", "--lora_target_modules", "all-linear", "--disable_tqdm", "True",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "'ess'" in result.stdout and (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_accelerate_configs_load(name):
    """As `accelerate launch --config_file` reads them, and every key is one that it knows."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = str(ROOT / "examples" / "accelerate" / f"{name}.yaml")
    assert load_config_from_file(path).num_processes == 8
    parser = launch_command_parser()
    args, loaded, _ = _validate_launch_command(parser.parse_args(["--config_file", path, "examples/train.py"]))
    assert (args.use_fsdp, args.use_deepspeed) == (
        name == "fsdp2",
        name != "fsdp2",
    ) and loaded.mixed_precision == "bf16"
    assert args.zero_stage == {"zero2": 2, "zero3": 3}.get(name, args.zero_stage)


def test_import_is_lazy_and_help_needs_no_torch():
    code = "import sys, trl_offpolicy.cli as c; c.main(['--help']); assert not {'torch', 'trl', 'datasets'} & set(sys.modules)"
    result = run("-c", code)
    assert result.returncode == 0 and "rewrite" in result.stdout, result.stderr
    code = "import atexit, sys, trl_offpolicy.cli as c; atexit.register(lambda: print('torch' in sys.modules)); c.main(['agent', '--help'])"
    result = run("-c", code)
    assert result.returncode == 0 and "--preset" in result.stdout and result.stdout.endswith("False\n"), result.stderr
    import trl_offpolicy

    for name in trl_offpolicy.__all__:
        assert getattr(trl_offpolicy, name) is not None
    with pytest.raises(AttributeError, match="DataRewriter"):
        trl_offpolicy.DataRewritter  # noqa: B018


ROOMS = [
    "answers", "data", "cards", "sampling", "sandbox", "verification", "runs", "trainer", "reporting", "evaluation", "rewriting", "agent", "online", "loop", "cli",
]  # fmt: skip


def test_no_function_is_long_and_packages_import_only_what_is_below_them():
    """The house plan: functions of at most 90 lines; a package imports those before it in `ROOMS`, and itself without a circle."""
    package = ROOT / "trl_offpolicy"
    assert {path.parent.name for path in package.glob("*/__init__.py")} == set(ROOMS)
    within = {}
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 90, f"{path}:{node.name}"
            if path.parent == package or not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            names = [node.module] if node.module else [alias.name for alias in node.names]
            if node.level == 2 and names != ["__version__"] and names != ["relocated"]:
                for name in names:
                    assert ROOMS.index(name.split(".")[0]) < ROOMS.index(room), f"{path} imports {name}"
            elif node.level == 1:
                within.setdefault(f"{room}.{path.stem}", set()).update(f"{room}.{name}" for name in names)
    TopologicalSorter(within).prepare()  # raises CycleError


def test_what_draws_and_verifies_loads_no_trainer():
    """`trl` and `peft` take longer to import than all else that a rewrite needs, so the rooms below `trainer` do so where they use them."""
    for room in ROOMS[: ROOMS.index("trainer")]:
        for path in (ROOT / "trl_offpolicy" / room).glob("*.py"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
                    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                    assert not {"trl", "peft"} & {name.split(".")[0] for name in names}, path


def test_type_checkers_find_the_public_names_where_they_are():
    import trl_offpolicy

    (block,) = (node for node in ast.parse(Path(trl_offpolicy.__file__).read_text()).body if isinstance(node, ast.If))
    assert {alias.name: node.module for node in block.body for alias in node.names} == trl_offpolicy._HOME


def test_no_test_file_imports_from_another():
    for path in Path(__file__).parent.glob("*.py"):
        assert not re.findall(r"^ *(?:from|import) +test_\w+", path.read_text(), re.MULTILINE), path


@pytest.mark.slow
def test_a_wheel_has_every_file(tmp_path):
    """Built from a copy, installed elsewhere: it has the files of the source, and runs the code verifier and the cards from them."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "trl_offpolicy", source / "trl_offpolicy", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    place = tmp_path / "place"
    result = run("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", place, source)
    assert result.returncode == 0, result.stderr
    files = {path.relative_to(source) for path in (source / "trl_offpolicy").rglob("*") if path.is_file()}
    assert files <= {path.relative_to(place) for path in place.rglob("*")} and len(files) > 70
    code = f"""
import pathlib, trl_offpolicy
assert trl_offpolicy.__file__.startswith({str(place)!r})
from trl_offpolicy.cards import template_path
assert all(pathlib.Path(template_path(name)).exists() for name in ("dataset_card", "model_card", "agent_card"))
from trl_offpolicy.verification.code_verifier import _program
assert all(map(_program, ("code_solution", "code_tests")))
with trl_offpolicy.MathVerifier(num_workers=1) as verifier:
    assert verifier.verify(["so 1/2"], ["0.5"]) == ["correct"]
"""
    env = {**os.environ, "PYTHONPATH": str(place)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("old", "name"),
    [("rows", "load_rows"), ("rows", "Verdict"), ("verification", "MathVerifier"), ("verification", "Verifier"),
     ("verifiers", "all_of"), ("code_verifier", "CodeVerifier"), ("losses", "OBJECTIVES")],
)  # fmt: skip
def test_the_places_of_before_still_import(old, name):
    with pytest.warns(DeprecationWarning, match=rf"trl_offpolicy\.{old}\.{name} has moved to trl_offpolicy\.\w+\.\w+"):
        found = getattr(import_module(f"trl_offpolicy.{old}"), name)
    assert found is getattr(
        sys.modules[found.__module__]
        if hasattr(found, "__module__")
        else import_module("trl_offpolicy.trainer.losses"),
        name,
    )
    with pytest.raises(AttributeError, match="nothing_such"):
        import_module(f"trl_offpolicy.{old}").nothing_such  # noqa: B018


def test_documented_commands_parse(tmp_path):
    """Every full command of the documents, the examples and the command line's own last words takes the flags it is shown with."""
    import re
    import shlex

    from rewrite_ray import RayArguments
    from trl import GRPOConfig, ModelConfig, TrlParser

    from trl_offpolicy import EvaluationConfig, ImportanceWeightedSFTConfig, RewriteConfig
    from trl_offpolicy.cli.agent import AgentArguments
    from trl_offpolicy.cli.evaluate import EvalArguments
    from trl_offpolicy.cli.gap import GapArguments
    from trl_offpolicy.cli.loop import LoopArguments
    from trl_offpolicy.cli.rewrite import RewriteArguments
    from trl_offpolicy.cli.sft import SFTArguments
    from trl_offpolicy.cli.verify import VerifyArguments

    parsers = {
        "trl-offpolicy sft": (SFTArguments, ImportanceWeightedSFTConfig, ModelConfig),
        "accelerate launch -m trl_offpolicy.cli sft": (SFTArguments, ImportanceWeightedSFTConfig, ModelConfig),
        "accelerate launch examples/train.py": (SFTArguments, ImportanceWeightedSFTConfig, ModelConfig),
        "trl-offpolicy rewrite": (RewriteArguments, RewriteConfig),
        "python examples/rewrite_ray.py": (RayArguments, RewriteConfig),
        "trl-offpolicy loop": (LoopArguments, RewriteConfig),
        "trl-offpolicy verify": (VerifyArguments,),
        "trl-offpolicy eval": (EvalArguments, EvaluationConfig),
        "trl-offpolicy gap": (GapArguments,),
        "trl-offpolicy agent": (AgentArguments, GRPOConfig, ModelConfig),
        "accelerate launch examples/train_agent.py": (AgentArguments, GRPOConfig, ModelConfig),
    }
    found = 0
    for name in (
        "README.md", "examples/train.py", "examples/train_agent.py", "examples/quickstart.py", "examples/rewrite_ray.py",
        *(path.relative_to(ROOT) for path in (*(ROOT / "trl_offpolicy" / "cli").glob("*.py"), *(ROOT / "docs").glob("*.md"))),
    ):  # fmt: skip
        text = re.sub(r"\\+\n", " ", (ROOT / name).read_text())
        for command, types in parsers.items():
            flags = r" +--(?:model_name_or_path|dataset_name) (?:[^\n#`\"']|'[^'\n]*')*"
            for line in re.findall(re.escape(command) + flags, text):
                if re.search(r"\{[a-z]", line):  # a field of an f-string
                    continue
                argv = shlex.split(line.removeprefix(command))
                cpu = (
                    ["--use_cpu", "--bf16", "False"] if {ImportanceWeightedSFTConfig, GRPOConfig} & set(types) else []
                )
                TrlParser(types, allow_abbrev=False).parse_args_and_config([*argv, *cpu])
                found += 1
    assert found >= 20


def test_the_versions_of_trl_that_were_tested_are_those_that_install_and_others_warn():
    from trl_offpolicy.trainer import TESTED_TRL, warn_of_untested_trl

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (allowed,) = (Requirement(r).specifier for r in project["dependencies"] if Requirement(r).name == "trl")
    assert [f"1.{minor}" for minor in range(100) if f"1.{minor}.0" in allowed] == list(TESTED_TRL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_untested_trl("1.16.2")
    for other in ("1.15.0", "1.17.0", "2.16.0.dev0"):
        with pytest.warns(UserWarning, match=f"TRL {other} is installed"):
            warn_of_untested_trl(other)


def test_the_lowest_versions_that_are_declared_are_those_that_are_tested():
    """`.ci/lowest.txt`, which the workflow installs, against the bounds in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    elsewhere = ("dev", "docs", "vllm", "embeddings", "inspect")  # not in that environment
    extras = {k: v for k, v in project["optional-dependencies"].items() if k not in elsewhere}
    declared = [Requirement(line) for line in chain(project["dependencies"], *extras.values())]
    lines = [line.partition("#")[0].strip() for line in (ROOT / ".ci" / "lowest.txt").read_text().splitlines()]
    tested = {r.name.replace("_", "-"): next(iter(r.specifier)).version for r in map(Requirement, filter(None, lines))}
    for requirement in declared:
        floors = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
        if floors:
            assert Version(tested[requirement.name.replace("_", "-")]) == Version(floors[0]), requirement
