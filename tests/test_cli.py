"""The commands as people type them: config files, misspelt flags, what is wrong with a machine; in this process, where a process is not the point."""

import json
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import POLICY

from trl_offpolicy import OpenAISampler, RewriteConfig, TransformersSampler
from trl_offpolicy.cli import COMMANDS, main
from trl_offpolicy.cli.arguments import parser_for
from trl_offpolicy.cli.evaluate import EvalArguments
from trl_offpolicy.cli.rewrite import RewriteArguments, _train_command
from trl_offpolicy.evaluation.evaluation_config import EvaluationConfig


GIVEN = ["--model_name_or_path", "M", "--dataset_name", "D", "--output_dir", "O"]


def parsed(text, tmp_path, *argv, types=(RewriteArguments, RewriteConfig)):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return parser_for(types, "rewrite", "", "").parse_args_and_config(["--config", str(file), *argv])


def test_a_config_file_means_what_the_command_line_means(tmp_path):
    """Every value as a flag, read by argparse; and as a line of YAML, whatever YAML takes it for."""
    values = {
        "num_generations": "2", "temperature": "1e-1", "stages": "self", "model_revision": "007", "dataset_config": "2015-03-01",
        "keep_rejected": "no", "max_rows": "10", "answer_column": "no", "selection": "random", "shard": "0/3", "top_p": "1",
        "verifier_kwargs": '{"timeout": 3}', "batch_size": "8", "dataset_split": "train[:10]",
    }  # fmt: skip
    flags = [part for name, value in values.items() for part in (f"--{name}", value)]
    expected = parser_for((RewriteArguments, RewriteConfig), "rewrite", "", "").parse_args_and_config([*GIVEN, *flags])
    lines = (
        "".join(f"{k}: {v}\n" for k, v in values.items() if k != "verifier_kwargs")
        + "verifier_kwargs: '{\"timeout\": 3}'\n"
    )
    assert parsed(lines, tmp_path, *GIVEN) == expected
    assert (
        parsed(lines.replace(": 2\n", ": 2.0\n").replace("stages: self", "stages: [self]"), tmp_path, *GIVEN)
        == expected
    )
    arguments, config = parsed(
        "max_rows: null\nverifier_kwargs: {timeout: 3}\nkeep_rejected: true\n", tmp_path, *GIVEN, "--top_p", "0.5"
    )
    assert (arguments.max_rows, arguments.verifier_kwargs, config.keep_rejected, config.top_p) == (
        None,
        {"timeout": 3},
        True,
        0.5,
    )
    types = (EvalArguments, EvaluationConfig)
    arguments, _ = parsed(
        "benchmarks: gsm8k\n", tmp_path, "--model_name_or_path", "M", "--output_dir", "O", types=types
    )
    assert arguments.benchmarks == ["gsm8k"]


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("a: 1\nnum_generations: 2.5", [], "line 2: `num_generations` must be a whole number, but is '2.5'"),
        ("num_generations: true", [], "line 1: `num_generations` must be a whole number, but is 'true'"),
        ("num_generations: [1, 2]", [], "line 1: `num_generations` must be a whole number, but is the list [1, 2]"),
        ("num_generations: {x: 1}", [], "`num_generations` must be a whole number, but is the mapping {'x': 1}"),
        ("max_rows: 1.5", [], "line 1: `max_rows` must be a whole number, but is '1.5'"),
        ("max_rows: true", [], "line 1: `max_rows` must be a whole number, but is 'true'"),
        ("request_timeout: yes", [], "line 1: `request_timeout` must be a number, but is 'yes'"),
        ("a: 1\nanswer_column: [x]", [], "line 2: `answer_column` must be a text, but is the list ['x']"),
        ("keep_rejected: [no]", [], "`keep_rejected` must be true or false, but is the list [False]"),
        ("stages: {self: 1}", [], "`stages` must be a text, but is the mapping {'self': 1}"),
        ("stages: [[self]]", [], "`stages` must be a text, but is the list ['self']"),
        ("seed: 1\nmax_rows: 2\nseed: 3", [], "'seed' stands in line 1 and in line 3."),
        ("a: 1\nenv:\n  A: 1\n  A: 2", [], "'A' stands in line 3 and in line 4."),
        ("env: {1: 2}", [], "line 1: `env` must hold variables as `NAME: value`, and 1 is no name of one"),
        ("env: {'': 1}", [], "and '' is no name of one"),
        ("env: {A=B: 1}", [], "and 'A=B' is no name of one"),
        ("env: {A: [1]}", [], "the variable A in `env` must be a text or a number, but is [1]"),
        ("env: {A: }", [], "the variable A in `env` must be a text or a number, but is None"),
        ("num_generations:", [], "line 1: `num_generations` is empty (null)"),
        ("temperature: warm", [], "`temperature` must be a number, but is 'warm'"),
        ("selection: firs", [], "`selection` must be one of first, random, max_log_prob, but is 'firs'"),
        ("keep_rejected: perhaps", [], "`keep_rejected` must be true or false, but is 'perhaps'"),
        ("\nnum_generation: 2", [], "line 2: there is no option 'num_generation' (did you mean num_generations?)"),
        ("a: [b", [], "is not YAML: while parsing a flow sequence"),
        ("- a", [], "must hold options as `key: value`"),
        ("", [], "must hold options as `key: value`"),
        ("env: 3", [], "`env` must hold variables"),
        ("config: other.yaml", [], "line 1: there is no option 'config'"),
        ("help: true", [], "line 1: there is no option 'help'"),
        ("mention_phrases: [x, 'a?']", [], "You passed 'a?' in mention_phrases, which is found in every text"),
        (None, ["--output_dir", " "], "You passed output_dir=' '; name a directory"),
        (None, ["--num_generation", "2"], "there is no option --num_generation (did you mean --num_generations?)"),
        (None, ["--selection", "firs"], "argument --selection: invalid choice: 'firs'"),
        (None, ["--k=2", "--model", "m"], "there is no option --k (did you mean --num_generations?) and no --model (did you mean --model_name_or_path?)"),
        (None, ["stray"], "stray belongs to no option"),
        (None, ["--config"], "--config: it needs the path"),
        (None, ["--config", "none.yaml"], "You passed --config none.yaml, which cannot be read: No such file or directory."),
        (None, ["--config", "/"], "You passed --config /, which cannot be read: Is a directory."),
    ],
)  # fmt: skip
def test_what_is_mistyped_is_one_sentence(tmp_path, capsys, text, argv, message):
    if text is not None:
        (tmp_path / "c.yaml").write_text(text.replace("a: 1", "seed: 1"))
        argv = ["--config", str(tmp_path / "c.yaml")]
    assert main(["rewrite", *GIVEN, *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error


def test_options_that_take_a_list_a_mapping_or_a_truth_value_of_yaml_keep_it(tmp_path):
    from trl import SFTConfig

    text = (
        "output_dir: O\nuse_cpu: true\nbf16: no\nsave_strategy: no\nmodel_init_kwargs: {dtype: float32}\nreport_to: [none]\n"
        "include_num_input_tokens_seen: true\nmax_length: none\n"
    )
    for written in ("null", "~", "none"):
        (args,) = parsed(text.replace("max_length: none", f"max_length: {written}"), tmp_path, types=SFTConfig)
        assert args.max_length is None
    with pytest.raises(ValueError, match="`max_length` is empty"):
        parsed("max_length:\n", tmp_path, types=SFTConfig)
    assert (args.save_strategy, args.model_init_kwargs, args.report_to) == ("no", {"dtype": "float32"}, [])
    assert args.include_num_input_tokens_seen in (True, "all")


def test_a_schema_that_is_none_is_one_sentence(demonstrations, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl_offpolicy.cli.rewrite.make_sampler", lambda *_: None)
    for schema in ({"type": 5}, 5):
        argv = ["--verifier", "json", "--verifier_kwargs", json.dumps({"schema": schema})]
        assert main([*rewrite_argv(demonstrations, tmp_path / "run"), *argv]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"trl-offpolicy rewrite: You passed schema={schema}, which is no JSON Schema: "), said


def test_required_options_are_named_once(capsys):
    assert main(["rewrite", "--dataset_name", "D"]) == 2
    assert "required: --model_name_or_path, --output_dir. `trl-offpolicy rewrite --help`" in capsys.readouterr().err


@pytest.mark.slow
def test_help_needs_no_torch_and_shows_defaults_and_config():
    code = (
        "import sys\nfrom trl_offpolicy.cli import COMMANDS, main\n"
        "for command in sorted({*COMMANDS} - {'sft'}):\n    try:\n        main([command, '--help'])\n    except SystemExit as end:\n        assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n  --config FILE") == len(COMMANDS) - 1
    assert "The opposite of --keep_rejected." in " ".join(result.stdout.split())
    assert "(default: 8)" in result.stdout and "(default: None)" not in result.stdout


def test_help_of_sft_shows_its_options_and_those_of_trl(capsys):
    assert main(["sft", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(
        f"  --{name} " in out for name in ("config", "objective", "dataset_train_split", "lora_r", "learning_rate")
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--objectiv", "iw"], "there is no option --objectiv (did you mean --objective?)"),
        (["--lr", "1e-5"], "there is no option --lr (did you mean --learning_rate?)"),
        (["--objective", "iv"], "objective='iv'"),
        ([], "Pass --model_name_or_path, --dataset_name and --output_dir"),
        (
            ["--model_name_or_path", "M", "--dataset_name", "D", "--resume_from_checkpoint", "last"],
            "there is no checkpoint in ",
        ),
        (["--model_name_or_path", "/no/such", "--dataset_name", "D"], "model='/no/such', which cannot be loaded"),
        (["--model_name_or_path", "M", "--dataset_name", "D", "--chat_template", "/no/such.jinja"], "No such file"),
    ],
)
def test_sft_says_what_is_wrong_before_a_model_is_loaded(tmp_path, capsys, argv, message):
    assert main(["sft", "--use_cpu", "--bf16", "False", "--output_dir", str(tmp_path), *argv]) == 2
    assert message in capsys.readouterr().err


def test_sft_says_which_flag_a_machine_without_a_gpu_needs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    argv = [
        "sft",
        "--model_name_or_path",
        POLICY,
        "--dataset_name",
        "D",
        "--output_dir",
        str(tmp_path),
        "--bf16",
        "True",
    ]
    assert main(argv) == 2 and "add --use_cpu" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("problem", "solution"), ("question", "answer"), ("instruction", "output")])
def test_sft_takes_demonstrations_as_a_rewrite_keeps_them(tmp_path, names):
    """The formats that a rewrite reads, against the rows of one that solves nothing."""
    from datasets import Dataset
    from scripted import ScriptedSampler, verify

    from trl_offpolicy import DataRewriter
    from trl_offpolicy.cli.sft import _as_expert_rows

    rows = [dict(zip(names, (f"gold:{i} ?", f"{i} + 0 = <<{i}+0={i}>>{i}\n#### {i}"), strict=True)) for i in range(4)]
    args = RewriteConfig(str(tmp_path), num_generations=1)
    expected = DataRewriter("scripted", args, ScriptedSampler(p_self=0, p_guided=0), verify).rewrite(rows)
    with pytest.warns(UserWarning, match=" and ".join(names)):
        given = _as_expert_rows(Dataset.from_list(rows), "text")
    assert set(expected["source"]) == {"expert"} and "boxed" in given[0]["completion"][0]["content"]
    assert given.to_list() == expected.select_columns(["prompt", "completion"]).to_list()
    with pytest.raises(ValueError, match="'colour'.*SFT takes.*problem . solution"):
        _as_expert_rows(Dataset.from_list([{"colour": "red"}]), "text")


@pytest.fixture
def demonstrations(tmp_path):
    file = tmp_path / "demos.jsonl"
    row = {"problem": "Start with 2. Add 2.", "solution": "2 + 2 = 4, so \\boxed{4}"}
    file.write_text("".join(json.dumps(row | {"n": n}) + "\n" for n in range(24)))
    return file


def rewrite_argv(demonstrations, output_dir, *more):
    return [
        "rewrite", "--model_name_or_path", POLICY, "--dataset_name", str(demonstrations), "--output_dir", str(output_dir),
        "--num_generations", "1", "--max_completion_length", "16", "--verifier", "exact", *more,
    ]  # fmt: skip


def test_columns_are_mapped(tmp_path):
    from trl_offpolicy.cli.arguments import DatasetArguments, load_dataset

    file = tmp_path / "a.jsonl"
    file.write_text('{"instruction": "1+1?", "output": "2", "problem": "other"}\n')
    given = {"problem": "instruction", "answer": "output", "note": "problem"}
    for mapping in ("problem=instruction, answer=output,note=problem", given):
        dataset = load_dataset(DatasetArguments(dataset_name=str(file), column_mapping=mapping))
        assert dataset[0] == {"problem": "1+1?", "answer": "2", "note": "other"}
    for mapping, message in (
        ("problem", "write our columns by yours"),
        ("problem=output,answer=output", "each once"),
        ("problem=question", "no question"),
        ("problem=instruction", "two columns problem.*problem_before=problem"),
    ):
        with pytest.raises(ValueError, match=message):
            load_dataset(DatasetArguments(dataset_name=str(file), column_mapping=mapping))


def test_data_files_of_a_directory(tmp_path):
    from trl_offpolicy.cli.arguments import DatasetArguments, load_dataset

    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"name": name}) + "\n")
    for where in (
        {"dataset_name": str(tmp_path), "data_files": ["b.jsonl"]},
        {"dataset_name": "json", "data_files": [str(tmp_path / "b.jsonl")]},
    ):
        assert load_dataset(DatasetArguments(**where))["name"][:] == ["b"]
    with pytest.raises(ValueError, match="data_files.*no files to choose from"):
        load_dataset(DatasetArguments(dataset_name=str(tmp_path / "a.jsonl"), data_files=["b.jsonl"]))


def test_what_is_no_demonstration_is_said_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl_offpolicy.cli.rewrite.make_sampler", None)
    file = tmp_path / "problems.jsonl"
    file.write_text('{"problem": "1+1?", "answer": "2"}\n')
    assert main(rewrite_argv(file, tmp_path / "run")) == 2
    assert "no demonstrations, which the stage `guided` retells. Write stages=['self']" in capsys.readouterr().err
    assert main(["verify", "--dataset_name", str(file), "--output_file", str(tmp_path / "odd.jsonl")]) == 2
    assert "--completion_column" in capsys.readouterr().err


def test_rows_that_lack_a_part_are_all_said_as_a_person_counts_and_can_be_left_out(tmp_path, capsys, monkeypatch):
    file = tmp_path / "rows.csv"
    cells = [f"p{i},\\boxed{{{i}}}" for i in range(5)]
    cells[1], cells[3] = "p1,", "p3,  "
    file.write_text("problem,solution\n" + "\n".join(cells))
    more = ("--model_name_or_path", POLICY, "--dry_run")
    with monkeypatch.context() as patched:
        patched.setattr("trl_offpolicy.cli.rewrite.make_sampler", None)  # it is said before a model is loaded
        assert main(rewrite_argv(file, tmp_path / "run")) == 2
    told = capsys.readouterr().err
    assert "2 of 5 rows (1, 3; counted from 0) have no demonstration: `solution` is None" in told
    assert "--skip_incomplete" in told
    with pytest.warns(
        UserWarning, match=r"2 of 5 rows .1, 3; counted from 0. have no problem or nothing to fall back"
    ):
        assert main(rewrite_argv(file, tmp_path / "run", *more, "--skip_incomplete")) == 0
    assert "p0" in capsys.readouterr().out
    odd = tmp_path / "odd.jsonl"
    more = ["--verifier", "exact", "--skip_incomplete"]
    with pytest.warns(UserWarning, match="left out"):
        assert main(["verify", "--dataset_name", str(file), "--output_file", str(odd), *more]) == 0
    assert "every row is correct" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["rewrite", "eval", "gap"])
@pytest.mark.parametrize("model", ["./none", "/none/there", "me/none"])
def test_commands_say_in_the_same_words_that_there_is_no_such_model(demonstrations, tmp_path, capsys, command, model):
    rows = ["--benchmarks"] if command == "eval" else ["--dataset_name"]
    if command == "gap":
        features = ("prompt", "completion", "source", "completion_ids", "solution")
        demonstrations = tmp_path / "rewritten.jsonl"
        turns = [{"role": "user", "content": "1?"}], [{"role": "assistant", "content": "1"}]
        demonstrations.write_text(json.dumps(dict(zip(features, (*turns, "expert", [], "1"), strict=True))) + "\n")
    argv = [command, "--model_name_or_path", model, *rows, str(demonstrations), "--output_dir", str(tmp_path / "out")]
    assert main(argv) == 2
    assert f"You passed model={model!r}, which cannot be loaded: " in capsys.readouterr().err


def test_an_engines_numbers_are_above_zero(demonstrations, tmp_path, capsys, tiny_model, tokenizer):
    openai = ("--sampler", "openai", "--base_url", "http://127.0.0.1:9")
    for more, told in (
        (("--batch_size", "0"), "batch_size=0"),
        (("--batch_size", "-3"), "batch_size=-3"),
        ((*openai, "--give_up_after", "-1"), "give_up_after=-1.0"),
        (("--sampler", "vllm", "--max_model_len", "0"), "max_model_len=0"),
    ):
        assert main(rewrite_argv(demonstrations, tmp_path / "run", *more)) == 2
        assert f"You passed {told}; it must be above 0." in capsys.readouterr().err
    with pytest.raises(ValueError, match="batch_size=0"):
        TransformersSampler(tiny_model, tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="request_timeout=0"):
        OpenAISampler(POLICY, "http://127.0.0.1:9", request_timeout=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size", "0"], "batch_size=0"),
        (["--base_url", "http://x"], "it is an option of --sampler openai"),
        (["--sampler", "openai"], "needs --base_url"),
        (["--sampler", "vllm", "--engine_kwargs", "{x"], "write a JSON object"),
        (["--chat_template_path", "none.jinja"], "'none.jinja', which cannot be read: No such file"),
    ],
)
def test_a_dry_run_refuses_what_the_engine_would(demonstrations, tmp_path, capsys, options, message):
    assert main(rewrite_argv(demonstrations, tmp_path / "run", "--dry_run", *options)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("says", ["{{ raise_exception('no such turn') }}", "{{ messages[0]['content'] + 1 }}"])
def test_a_template_that_refuses_every_prompt_is_bad_input(demonstrations, tmp_path, capsys, says):
    """Whatever its code raises; of other prompts the run goes on."""
    own = (Path(POLICY) / "chat_template.jinja").read_text()
    for condition, code in (("'Start' in messages[0]['content']", 2), ("messages[0]['content'] == 'another'", 0)):
        template = tmp_path / f"{code}.jinja"
        template.write_text(f"{{% if {condition} %}}{says}{{% endif %}}{own}")
        argv = rewrite_argv(demonstrations, tmp_path / f"run{code}", "--chat_template_path", str(template))
        assert main([*argv, "--max_rows", "2"]) == code
        assert ("the chat template refuses the prompt" in capsys.readouterr().err) == bool(code)
        assert main([*argv, "--dry_run"]) == 0
        assert ("This prompt cannot be asked: the chat template refuses" in capsys.readouterr().out) == bool(code)


def test_where_nothing_can_be_written_no_model_is_loaded(demonstrations, capsys, monkeypatch):
    monkeypatch.setattr(
        "trl_offpolicy.cli.rewrite.make_sampler", None
    )  # called, it would end the test with a TypeError
    for directory in (demonstrations / "run", "/proc/run"):
        assert main(rewrite_argv(demonstrations, directory)) == 2
        assert "where nothing can be written" in capsys.readouterr().err


def test_wandb_without_a_key_and_a_terminal_is_refused_before_a_model_is_loaded(
    demonstrations, tmp_path, capsys, monkeypatch
):
    import wandb

    monkeypatch.setattr("trl_offpolicy.cli.rewrite.make_sampler", None)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: SIM115
    wandb.teardown()  # it reads its environment once
    try:
        assert main(rewrite_argv(demonstrations, tmp_path / "run", "--report_to", "wandb")) == 2
        assert "no API key and there is no terminal" in capsys.readouterr().err
        monkeypatch.setenv("WANDB_API_KEY", "short")
        wandb.teardown()
        assert main(rewrite_argv(demonstrations, tmp_path / "run", "--report_to", "wandb")) == 2
        assert "W&B" in capsys.readouterr().err
    finally:
        wandb.teardown()


def test_a_full_disk_stops_a_run_that_resumes(demonstrations, tmp_path, capsys, monkeypatch):
    """Files may not grow beyond 8 KB (`RLIMIT_FSIZE`), as on a disk with so much left: exit code 3, and the same command goes on."""
    run = tmp_path / "a run with spaces"
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a module's would be cut, too
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
    try:
        code = main(rewrite_argv(demonstrations, run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    out, err = capsys.readouterr()
    assert code == 3 and "run the same command again" in out + err, err
    assert main(rewrite_argv(demonstrations, run)) == 0
    last = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert last[last.index("--dataset_name") + 1] == f"{run}/dataset"
    assert yaml.safe_load((run / "run_config.yaml").read_text())["dataset_name"] == str(demonstrations)


def test_an_adapter_without_peft_names_the_command(demonstrations, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(rewrite_argv(demonstrations, tmp_path / "run", "--rewriter_adapter", str(tmp_path))) == 2
    assert "pip install 'trl-offpolicy[peft]'" in capsys.readouterr().err


@pytest.mark.slow
def test_every_public_name_is_there_without_any_extra(monkeypatch):
    extras = ("openai", "peft", "wandb", "vllm", "ray", "matplotlib", "pint", "jsonschema", "sentence_transformers")
    code = (
        f"import sys\nsys.modules |= dict.fromkeys({extras!r})\nfrom trl_offpolicy import *\nimport trl_offpolicy\n"
        "assert set(trl_offpolicy.__all__) <= set(globals())\n"
        "try:\n    OpenAISampler('m', 'http://127.0.0.1:1/v1')\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'trl-offpolicy[openai]'" in result.stdout, result.stderr


def test_a_chat_template_s_file_is_read_before_a_model(tmp_path):
    from trl_offpolicy.sampling.engine import EngineArguments, make_sampler

    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}>")
    sampler = make_sampler(EngineArguments(model_name_or_path=POLICY, chat_template_path=str(file)))
    text = sampler.processing_class.apply_chat_template([{"role": "user", "content": "2+2?"}], tokenize=False)
    assert text == "2+2?>"
    file.write_text("a\n{% for m in messages %}")
    with pytest.raises(ValueError, match="template.jinja, line 2: this is no Jinja template"):
        make_sampler(EngineArguments(model_name_or_path="none/such", chat_template_path=str(file)))


def test_sft_takes_the_same_flag_for_a_template_and_rewrite_only_a_file_that_it_takes(
    tmp_path, demonstrations, capsys
):
    argv = [
        "--model_name_or_path",
        "none/such",
        "--dataset_name",
        str(demonstrations),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    assert main(["rewrite", *argv, "--chat_template", "template.txt"]) == 2
    assert "chat_template_path='template.txt'; training takes a file" in capsys.readouterr().err
    from trl_offpolicy.cli.arguments import parser_for
    from trl_offpolicy.trainer.importance_weighted_sft_config import ImportanceWeightedSFTConfig

    parser = parser_for(ImportanceWeightedSFTConfig, "sft", "", "")
    (args,) = parser.parse_args_and_config(["--output_dir", "o", "--chat_template", "t.jinja", "--bf16", "False"])
    assert args.chat_template_path == "t.jinja"


def test_sft_renders_with_the_same_variables(tmp_path):
    from datasets import Dataset

    from trl_offpolicy.cli.sft import _with_template_kwargs

    rows = Dataset.from_list([{"chat_template_kwargs": {"a": 1, "b": 2}}])
    assert _with_template_kwargs(rows, {"a": 0, "c": 3})[0]["chat_template_kwargs"] == {"a": 1, "b": 2, "c": 3}
    assert _with_template_kwargs(Dataset.from_dict({"text": ["t"]}), {"a": 0})[0]["chat_template_kwargs"] == {"a": 0}


def test_the_trainers_have_the_signature_of_sft_trainer():
    """Names, order, defaults: what an IDE completes, and what a script may pass by position."""
    import inspect

    from trl import SFTTrainer

    from trl_offpolicy import DFTTrainer, ImportanceWeightedSFTTrainer

    expected = [(p.name, p.kind, p.default) for p in inspect.signature(SFTTrainer).parameters.values()]
    for trainer in (ImportanceWeightedSFTTrainer, DFTTrainer):
        parameters = inspect.signature(trainer).parameters.values()
        assert [(p.name, p.kind, p.default) for p in parameters] == expected
        assert all(p.annotation is not p.empty for p in parameters)


def test_a_dict_for_a_config_names_the_class(tmp_path):
    from trl_offpolicy import DataRewriter, DFTTrainer, ImportanceWeightedSFTTrainer

    with pytest.raises(ValueError, match="write args=ImportanceWeightedSFTConfig"):
        ImportanceWeightedSFTTrainer("M", {"learning_rate": 1e-5}, train_dataset=[])
    with pytest.raises(ValueError, match="write args=DFTConfig"):
        DFTTrainer("M", {"learning_rate": 1e-5}, train_dataset=[])
    with pytest.raises(ValueError, match="write args=RewriteConfig"):
        DataRewriter("M", {"output_dir": "O"})


def test_reprs_say_what_it_is():
    from trl_offpolicy import DataRewriter, MathVerifier, TransformersSampler
    from trl_offpolicy.verification.verifiers import ExactMatchVerifier, all_of

    assert repr(DataRewriter("M", RewriteConfig("O"))) == (
        "DataRewriter('M', output_dir='O', stages=['self', 'guided'], num_generations=8)"
    )
    assert repr(TransformersSampler(POLICY)).startswith(f"TransformersSampler({POLICY!r}, revision=")
    assert repr(MathVerifier()) == "MathVerifier()"
    both = all_of(ExactMatchVerifier(ignore_case=False), MathVerifier())
    assert repr(both) == "all_of(ExactMatchVerifier(ignore_case=False), MathVerifier())"


def test_verify_takes_several_gold_answers_where_the_verifier_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"problem": "Who?", "solution": "The answer is Paris.", "answer": gold} for gold in (["Paris", "P"], ["R"])
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["verify", "--dataset_name", "a.jsonl", "--verifier", "exact"]) == 0
    assert "correct               1  50.0%" in capsys.readouterr().out


def test_verify_replaces_what_it_wrote_and_nothing_else(demonstrations, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    demonstrations.write_text(demonstrations.read_text().replace('"n":', '"answer": "5", "n":'))
    argv = ["verify", "--dataset_name", str(demonstrations), "--verifier", "exact"]
    for _ in range(2):
        assert main(argv) == 0
        assert len((tmp_path / "demos.not_correct.jsonl").read_text().splitlines()) == 24
    for text in ('{"index": 3}\n', "notes\n", "7\n"):
        (tmp_path / "demos.not_correct.jsonl").write_text(text)
        assert main(argv) == 2 and "not what an earlier `verify` wrote" in capsys.readouterr().err
        assert (tmp_path / "demos.not_correct.jsonl").read_text() == text


def test_sentences_name_what_was_typed(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"guided_prompt.*no \{solution\}: the reference would not be shown"):
        RewriteConfig("O", guided_prompt="Retell {problem}")
    with pytest.raises(ValueError, match=r"solve_prompt.*no \{problem\}: every problem would get the same prompt"):
        RewriteConfig("O", solve_prompt="Solve it")
    run = str(tmp_path / "run")
    assert main(["eval", "--model_name_or_path", "M", "--benchmarks", "none.jsonl", "--output_dir", run]) == 2
    captured = capsys.readouterr()
    assert "You passed benchmarks='none.jsonl'" in captured.err and captured.out == f"output_dir: {run}\n"


def test_rows_so_far_are_those_of_the_finished_run(demonstrations, tmp_path, capsys):
    """Of a run that was killed (its journal, cut in the middle of a line): every settled row, as the whole run has it, and no other."""
    from datasets import Dataset

    rows = [json.loads(line) for line in demonstrations.open()]
    for n, row in enumerate(rows):
        row["problem"] = f"A jar holds {n} coins. A adds 4. How many coins?"
    demonstrations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    assert main(rewrite_argv(demonstrations, run, "--control_tokens", "escape")) == 0
    whole = Dataset.from_parquet(str(run / "dataset" / "*.parquet"))
    assert main(["rows", str(run)]) == 0 and "finished" in capsys.readouterr().out
    shutil.rmtree(run / "dataset")
    lines = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (run / "journal.jsonl").write_bytes(b"".join(lines[:30]) + lines[30][:-9])
    known = {(entry["id"], entry["stage"]): entry["verdict"] for entry in map(json.loads, lines[1:30])}
    kept = {row for row, stage in known if (row, "guided") in known or known[row, stage] == "correct"}
    assert main(["rows", str(run)]) == 2 and "add --so_far" in capsys.readouterr().err
    assert main(["rows", str(tmp_path / "none")]) == 2 and "There is no run" in capsys.readouterr().err
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert main(["rows", str(run), "--so_far"]) == 0
    assert f"\n{len(kept)} of 24 rows are settled" in capsys.readouterr().out and 0 < len(kept) < 24
    found = Dataset.from_parquet(str(run / "rows_so_far" / "*.parquet"))
    assert found.to_list() == [row for row in whole if row["id"] in kept] and found.features == whole.features
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_an_option_that_is_called_otherwise_elsewhere_is_known(capsys):
    """Each other name by an option that some command has, and where it is none of a command's, nothing is made up."""
    from trl_offpolicy.cli.arguments import SYNONYMS, _closest

    for argv, meant in [
        (["eval", "--num_samples", "4"], "--num_generations"), (["eval", "--limit=9"], "--max_problems"), (["rewrite", "--limit", "9"], "--max_rows"),
        (["rewrite", "--max-new-tokens", "9"], "--max_completion_length"), (["verify", "--out", "o"], "--output_file"),
    ]:  # fmt: skip
        assert main(argv) == 2 and f"(did you mean {meant}?)" in capsys.readouterr().err
    assert _closest("--num_samples", ["--sampler"]) == " (did you mean --sampler?)"
    assert all(SYNONYMS.values())


def test_verify_names_its_file_after_the_dataset(tmp_path, monkeypatch):
    from trl_offpolicy.cli.verify import _file_for

    monkeypatch.chdir(tmp_path)
    names = {
        "demos.jsonl": "demos",
        "a/b.parquet": "b",
        "openai/gsm8k": "gsm8k",
        "runs/x-1.5/dataset": "x-1.5",
        "me/Qwen2.5": "Qwen2.5",
    }
    assert {name: _file_for(name) for name in names} == {name: f"{of}.not_correct.jsonl" for name, of in names.items()}
    assert _file_for("dataset") == f"{tmp_path.name}.not_correct.jsonl"


@pytest.mark.filterwarnings("ignore:Benchmark 'p'. The prompts are plain texts")
def test_a_dry_evaluation_shows_what_is_asked(tmp_path, capsys):
    """As the model reads it, and without loading it: another tokenizer's output would differ in each special token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    (tmp_path / "m.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Own words"}], "problem": "1+1?", "answer": "2"}\n' * 3
    )
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    argv = [
        "eval",
        "--model_name_or_path",
        POLICY,
        "--benchmarks",
        str(tmp_path / "m.jsonl"),
        str(tmp_path / "p.jsonl"),
    ]
    assert main([*argv, "--output_dir", str(tmp_path / "out"), "--num_generations", "5", "--dry_run"]) == 0
    out = capsys.readouterr().out
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Own words"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert f"{len(ids)} tokens ----\n{tokenizer.decode(ids)}\n---- careful ----\nThere is no \\boxed" in out
    assert (
        f"[plain text]\n1+1=\n---- the same as the model reads it, {len(tokenizer('1+1=')['input_ids'])} tokens ----\n1+1=\n"
        in out
    )
    assert "gold answer: '2'\nm: 3 problems x 5 samples" in out and not (tmp_path / "out").exists()


def test_an_evaluation_without_readable_answers_says_where_to_look():
    from trl_offpolicy.cli.evaluate import _unread

    (told,) = _unread(
        {name: {"unparsable": share, "gold_unparsable": 0} for name, share in (("a", 0.5), ("b", 0.1))}, "exact"
    )
    assert (
        told.startswith("a: 50% of the samples end without an answer that `--verifier exact` reads")
        and "--dry_run" in told
    )


def test_a_dry_run_counts_rows_without_gold_answers(tmp_path, capsys):
    file = tmp_path / "demos.jsonl"
    rows = [{"problem": f"{n}?", "solution": "It is two." if n % 3 else "\\boxed{2}"} for n in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*rewrite_argv(file, tmp_path / "run"), "--dry_run"]) == 0
    assert "6 of 9 rows have no gold answer, neither in `answer` nor as the last box" in capsys.readouterr().out


@pytest.mark.parametrize("expert, objective", [(1, "dft"), (2, "nll")])
def test_the_training_that_comes_next_is_sft_where_nothing_was_rewritten(expert, objective):
    config = RewriteConfig("O", num_generations=1)
    counts = {"yield": {"self": 2 - expert, "guided": 0, "expert": expert, "total": 2}}
    assert f"--objective {objective}" in _train_command("M", None, config, counts, "O/dataset")
