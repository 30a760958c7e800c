"""The `trl-offpolicy` command. Training stays `accelerate launch examples/train.py`.

Every flag is also a key of `--config file.yaml`. The first line printed is where the results go, the last one the next
command to run. Exit codes: 0 done, 2 bad input, 3 stopped early and resumable.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from tqdm.auto import tqdm

from .rows import Source, Verdict
from .sampling import SamplerError


USAGE = """\
usage: trl-offpolicy COMMAND [options]

commands:
  rewrite    rewrite a dataset of demonstrations into what the model could have written itself
  verify     check the answers of a dataset: a table of verdicts, and the rows that are not correct
  push       push a finished rewrite to the Hub: rows, attempts and card

  trl-offpolicy rewrite --model_name_or_path Qwen/Qwen2.5-Math-1.5B --dataset_name openai/gsm8k --dataset_config main \\
      --output_dir runs/gsm8k --num_generations 8 --dry_run          # first prompts and the estimate, nothing is sampled
  trl-offpolicy rewrite --config rewrite.yaml                        # the same keys in a file; run again to resume
  trl-offpolicy verify --dataset_name runs/gsm8k/dataset             # what is not correct goes to not_correct.jsonl
  trl-offpolicy push runs/gsm8k --hub_dataset_id me/gsm8k-on-policy   # or --push_to_hub --hub_dataset_id … when rewriting
  trl-offpolicy COMMAND --help                                       # every option
"""

REWRITE_EXAMPLES = """\
examples:
  trl-offpolicy rewrite --model_name_or_path M --dataset_name demos.jsonl --output_dir runs/demos
  trl-offpolicy rewrite --model_name_or_path M --dataset_name demos.parquet --output_dir runs/ablation --stages self
  trl-offpolicy rewrite --config rewrite.yaml --max_rows 100
  trl-offpolicy rewrite --config rewrite.yaml --push_to_hub --hub_dataset_id me/demos-on-policy --private --push_every 1000
  trl-offpolicy rewrite --config rewrite.yaml --shard 0/4     # on the first of four machines, 1/4 on the second, …
  trl-offpolicy rewrite --model_name_or_path M --dataset_name D --output_dir runs/d --sampler vllm --tensor_parallel_size 2
  trl-offpolicy rewrite --model_name_or_path M --dataset_name D --output_dir runs/d --sampler openai \\
      --base_url http://node1:8000/v1 http://node2:8000/v1          # two `vllm serve M`; the key is OPENAI_API_KEY, if they want one

An interrupted run resumes: run the same command again.
"""

PUSH_EXAMPLES = """\
examples:
  trl-offpolicy push runs/demos --hub_dataset_id me/demos-on-policy --private
  trl-offpolicy push runs/demos --hub_dataset_id me/demos-on-policy --push_attempts False --hub_revision v2

The token is HF_TOKEN's, or that of `hf auth login`. A push is one commit: one that failed has changed nothing, run it again.
"""


VERIFY_EXAMPLES = """\
examples:
  trl-offpolicy verify --dataset_name runs/gsm8k/dataset                                    # what a rewrite wrote
  trl-offpolicy verify --dataset_name demos.jsonl --answer_column final --output_file odd.jsonl   # demonstrations
  trl-offpolicy verify --dataset_name outputs.jsonl --completion_column prediction --answer_column gold
  trl-offpolicy verify --dataset_name physics.jsonl --verifier numeric --verifier_kwargs '{"rel_tol": 0.05}'
  trl-offpolicy verify --dataset_name code.jsonl --completion_column completion --answer_column tests --verifier code

Columns are those of `rewrite` (the demonstration is what is checked), or the two that you name. Exit code 0 says that all
rows were checked, not that they are correct.
"""

# Name on the command line → (module, class).
VERIFIERS = {
    "math": ("verification", "MathVerifier"),
    "choice": ("verifiers", "MultipleChoiceVerifier"),
    "exact": ("verifiers", "ExactMatchVerifier"),
    "numeric": ("verifiers", "NumericVerifier"),
    "json": ("verifiers", "JsonSchemaVerifier"),
    "code": ("code_verifier", "CodeVerifier"),
}


@dataclass
class RewriteArguments:
    """What is rewritten by what."""

    model_name_or_path: str = field(metadata={"help": "Model that will be trained: Hub id or local directory."})
    dataset_name: str = field(
        metadata={"help": "Demonstrations: Hub id, directory, or JSONL, JSON, CSV or Parquet file."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    dtype: str = field(default="auto", metadata={"help": "Weights' dtype: auto, bfloat16, float16 or float32."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the model's repository."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub dataset."})
    max_rows: int | None = field(
        default=None, metadata={"help": "Only the first rows; a later run may take more of them."}
    )
    sampler: str = field(
        default="transformers",
        metadata={"help": "Engine that samples.", "choices": ["transformers", "vllm", "openai"]},
    )
    batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions drawn at a time: 64 with transformers, 128 at each server with openai, by default what vLLM chooses."
        },
    )
    base_url: list[str] | None = field(
        default=None,
        metadata={"help": "openai: where the model is served, one or many, e.g. http://127.0.0.1:8000/v1."},
    )
    served_model_name: str | None = field(
        default=None, metadata={"help": "openai: what the servers call the model, if not model_name_or_path."}
    )
    request_timeout: float | None = field(
        default=None, metadata={"help": "openai: seconds for one completion (default: 600)."}
    )
    give_up_after: float | None = field(
        default=None,
        metadata={"help": "openai: stop, resumably, after so many seconds without any answer (default: 300)."},
    )
    adapter: str | None = field(
        default=None, metadata={"help": "vllm: LoRA adapter to sample with, Hub id or local directory."}
    )
    tensor_parallel_size: int | None = field(default=None, metadata={"help": "vllm: GPUs that share the model."})
    gpu_memory_utilization: float | None = field(
        default=None, metadata={"help": "vllm: share of the GPU's memory it may take."}
    )
    max_model_len: int | None = field(default=None, metadata={"help": "vllm: context, if less than the model's."})
    engine_kwargs: str | None = field(
        default=None, metadata={"help": """vllm: further engine arguments as JSON, e.g. '{"quantization": "fp8"}'."""}
    )


@dataclass
class VerifyArguments:
    """What is verified by what."""

    dataset_name: str = field(metadata={"help": "Rows: Hub id, directory, or JSONL, JSON, CSV or Parquet file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split."})
    max_rows: int | None = field(default=None, metadata={"help": "Only the first rows."})
    completion_column: str | None = field(
        default=None,
        metadata={"help": "Text or messages to check; by default what `rewrite` takes for the demonstration."},
    )
    answer_column: str = field(
        default="answer",
        metadata={"help": "Gold answers (for code: the tests); where a row has none, its demonstration's box."},
    )
    verifier: str = field(default="math", metadata={"help": "Which verifier.", "choices": list(VERIFIERS)})
    verifier_kwargs: str = field(
        default="{}", metadata={"help": """Its arguments as JSON, for example '{"timeout": 10, "num_workers": 4}'."""}
    )
    output_file: str = field(
        default="not_correct.jsonl",
        metadata={"help": "Where the rows that are not correct go, with verdict and reason."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace output_file if there is one."})


def _parser(types, command: str, description: str, examples: str):
    import argparse

    from trl import TrlParser

    return TrlParser(
        types,
        prog=f"trl-offpolicy {command}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a misspelt flag must not pass for another one
    )


def _load(arguments):
    from .rows import load_rows

    revision = getattr(arguments, "dataset_revision", None)
    dataset = load_rows(arguments.dataset_name, arguments.dataset_config, arguments.dataset_split, revision)
    if arguments.max_rows is not None:
        if arguments.max_rows < 1:
            raise ValueError(f"You passed max_rows={arguments.max_rows}; it must be at least 1.")
        dataset = dataset.select(range(min(arguments.max_rows, len(dataset))))
    return dataset


def rewrite(argv: list[str]) -> int:
    from .rewrite_config import RewriteConfig
    from .rewriter import DataRewriter

    parser = _parser(
        (RewriteArguments, RewriteConfig),
        "rewrite",
        "Rewrite demonstrations: the model's own correct solution, else its retelling of the reference, else the demonstration.",
        REWRITE_EXAMPLES,
    )
    arguments, config = parser.parse_args_and_config(argv)
    print(config.output_dir, flush=True)
    dataset = _load(arguments)
    sampler = None if config.dry_run else _sampler(arguments)
    rewriter = DataRewriter(arguments.model_name_or_path, config, sampler=sampler)
    try:
        # Where a model is served is nobody else's address.
        given = {k: v for k, v in vars(arguments).items() if v is not None and k != "base_url"}
        rewritten = rewriter.rewrite(dataset, given)
    except (KeyboardInterrupt, SamplerError) as error:
        journal = rewriter.shard.file(rewriter.output_dir, "journal.jsonl")
        print(f"\nstopped; every finished attempt is in {journal}. {error}".rstrip())
        print("Run the same command again to resume.")
        return 3
    finally:
        if sampler is not None:
            sampler.close()
    if rewritten is None:
        print("nothing was sampled; drop --dry_run to start")
        return 0
    _print_summary(rewriter.metrics)
    if missing := rewriter.missing_shards:
        shown = ", ".join(map(str, missing[:10])) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        print(
            f"shard {rewriter.shard} is done; still missing: {shown}. {config.output_dir}/dataset appears with the last of them."
        )
        print(_command_for(argv, missing[0]))
        return 0
    trained_on = f"{config.output_dir}/dataset"
    if config.push_to_hub:
        if not _pushed(rewriter.push_to_hub, config.output_dir, config.hub_dataset_id):
            return 3
        trained_on = config.hub_dataset_id
    print(
        _wandb_environment(config)
        + f"accelerate launch examples/train.py --model_name_or_path {arguments.model_name_or_path} "
        f"--dataset_name {trained_on} --objective iw --output_dir {config.output_dir}-sft"
        + " --report_to wandb"
        * (config.report_to == "wandb")
    )
    return 0


@dataclass
class PushArguments:
    """Which run goes where."""

    run_dir: str = field(
        metadata={"help": "Output directory of a finished rewrite; also the first word after `push`."}
    )
    hub_dataset_id: str = field(metadata={"help": "Dataset repository: owner/name."})
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Whether a new repository is private.", "aliases": ["--private"]}
    )
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "Hub token; better in HF_TOKEN, where no process list shows it."}
    )
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to push to, made if there is none."})
    push_attempts: bool = field(default=True, metadata={"help": "Push every attempt too, as config `attempts`."})


def push(argv: list[str]) -> int:
    import argparse

    from trl import TrlParser

    from .hub import push_run

    parser = TrlParser(
        PushArguments,
        prog="trl-offpolicy push",
        description="Push a finished rewrite to the Hub: its rows, its attempts and a card made from its journal.",
        epilog=PUSH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    named = ["--run_dir"] if argv and not argv[0].startswith("-") else []
    (given,) = parser.parse_args_and_config([*named, *argv])
    print(given.run_dir, flush=True)

    def commit():
        return push_run(
            given.run_dir,
            given.hub_dataset_id,
            given.hub_private_repo,
            given.hub_token,
            given.hub_revision,
            given.push_attempts,
        )

    if not _pushed(commit, given.run_dir, given.hub_dataset_id):
        return 3
    print(
        f"""python -c "from datasets import load_dataset; print(load_dataset('{given.hub_dataset_id}', split='train'))\""""
    )
    return 0


def _pushed(push, run_dir: str, repo_id: str) -> bool:
    """Whether a push went through; if not, says why and how to go on."""
    try:
        print(f"pushed: {push().commit_url}")
    except ValueError:
        raise
    except (Exception, KeyboardInterrupt) as error:  # whatever a network can do to it: the rows are on the disk
        print(f"the push failed, and nothing has changed on the Hub: {type(error).__name__}: {error}", file=sys.stderr)
        print(f"trl-offpolicy push {run_dir} --hub_dataset_id {repo_id}")
        return False
    return True


def _wandb_environment(config) -> str:
    """What ties the training to this run on W&B."""
    if config.report_to != "wandb":
        return ""
    from pathlib import Path

    from .run_log import wandb_group

    log_model = "WANDB_LOG_MODEL=end " if config.wandb_log_artifacts else ""
    return f"WANDB_RUN_GROUP={wandb_group(Path(config.output_dir))} {log_model}"


_ENGINE_OF = {
    **dict.fromkeys(("base_url", "served_model_name", "request_timeout", "give_up_after"), "openai"),
    **dict.fromkeys(
        ("adapter", "tensor_parallel_size", "gpu_memory_utilization", "max_model_len", "engine_kwargs"), "vllm"
    ),
}


def _sampler(arguments: RewriteArguments):
    given = {name: value for name in _ENGINE_OF if (value := getattr(arguments, name)) is not None}
    for name, value in given.items():
        if _ENGINE_OF[name] != arguments.sampler:
            raise ValueError(
                f"You passed {name}={value!r} with sampler={arguments.sampler!r}; it is an option of --sampler {_ENGINE_OF[name]}."
            )
    model, init = arguments.model_name_or_path, {"revision": arguments.model_revision}
    try:
        if arguments.sampler == "openai":
            from .sampling.openai_sampler import OpenAISampler

            if not arguments.base_url:
                raise ValueError("--sampler openai needs --base_url, for example http://127.0.0.1:8000/v1.")
            return OpenAISampler(model, batch_size=arguments.batch_size or 128, **given, **init)
        init |= {"dtype": arguments.dtype, "trust_remote_code": arguments.trust_remote_code}
        if arguments.sampler == "vllm":
            from .sampling.vllm_sampler import VLLMSampler

            given |= _mapping(given.pop("engine_kwargs", {}))
            if arguments.batch_size is not None:
                given["max_num_seqs"] = arguments.batch_size
            return VLLMSampler(model, **given, **init)
        from .sampling.transformers_sampler import TransformersSampler

        return TransformersSampler(model, batch_size=arguments.batch_size or 64, model_init_kwargs=init)
    except OSError as error:  # how transformers says that there is no such model, or none that may be read
        raise ValueError(f"You passed model_name_or_path={model!r}, which cannot be loaded: {error}") from error


def _mapping(engine_kwargs: dict | str) -> dict:
    """From a config file it comes as a mapping, from the command line as JSON."""
    try:
        return dict(json.loads(engine_kwargs) if isinstance(engine_kwargs, str) else engine_kwargs)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"""You passed engine_kwargs={engine_kwargs!r}; write a JSON object such as '{{"max_num_seqs": 256}}'."""
        ) from error


def _command_for(argv: list[str], shard) -> str:
    """The same command for another shard."""
    import re
    import shlex

    same = re.sub(r"--shard(=| )\S+ ?", "", shlex.join(argv)).strip()
    return f"trl-offpolicy rewrite {same} --shard {shard}"


def _print_summary(metrics: dict) -> None:
    counts = dict(metrics["yield"])
    total = counts.pop("total")
    print(f"{total:,} rows: " + ", ".join(f"{n:,} {source} ({n / max(1, total):.1%})" for source, n in counts.items()))
    sampling, unused = metrics["sampling"], metrics["speculation"]
    print(
        f"{sampling['sampled']:,} attempts, {sampling['tokens']:,} tokens; fixed K would have drawn {sampling['fixed_k_equivalent']:,}"
        + (
            f"; {unused['unused']:,} more on speculation, {unused['unused_tokens']:,} tokens"
            if unused["unused"]
            else ""
        )
    )
    if metrics["gold_unparsable"]:
        print(
            f"{metrics['gold_unparsable']:,} rows have no gold answer that can be compared with: kept as expert, not sampled"
        )
    trouble = {name: metrics["verdicts"][name] for name in ("timeout", "error") if metrics["verdicts"][name]}
    if trouble:
        print(
            "attempts that could not be judged: "
            + ", ".join(f"{n:,} {name}" for name, n in trouble.items())
            + " (reasons in the journal)"
        )


def verify(argv: list[str]) -> int:
    from .rewriter import batched

    description = "Verify the answers of a dataset, print the verdicts, and write the rows that are not correct."
    (arguments,) = _parser(VerifyArguments, "verify", description, VERIFY_EXAMPLES).parse_args_and_config(argv)
    print(arguments.output_file, flush=True)
    output = Path(arguments.output_file)
    if output.exists() and not arguments.overwrite:
        raise ValueError(f"{output} exists; pass --overwrite to replace it, or another --output_file.")
    dataset = _load(arguments)
    rows = _to_verify(dataset, arguments)
    counts: Counter = Counter()
    with _verifier(arguments) as verifier, tqdm(total=len(dataset), unit="row") as bar:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("w") as file:
            try:
                for chunk in batched(rows, 1024):
                    told = verifier.explain([c for _, _, c, _ in chunk], [a for _, _, _, a in chunk])
                    for (index, row, _, answer), (verdict, reason) in zip(chunk, told, strict=True):
                        source = row.get("source")
                        counts[source if source in set(Source) else "", verdict] += 1
                        if verdict is not Verdict.CORRECT:
                            odd = {"index": index, "verdict": verdict, "reason": reason, "gold": answer}
                            file.write(json.dumps({**row, **odd}, default=str) + "\n")
                    bar.update(len(chunk))
            except KeyboardInterrupt:
                print(f"\nstopped; {output} has what was found so far.", file=sys.stderr)
                return 3
    _print_verdicts(counts)
    bad = sum(n for (_, verdict), n in counts.items() if verdict is not Verdict.CORRECT)
    print(f"{bad:,} rows that are not correct: {output}" if bad else "every row is correct")
    return 0


def _verifier(arguments: VerifyArguments):
    module, name = VERIFIERS[arguments.verifier]
    kwargs = arguments.verifier_kwargs
    try:
        kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs  # a mapping in YAML
        return getattr(import_module(f".{module}", __package__), name)(**kwargs)
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"You passed verifier_kwargs={arguments.verifier_kwargs!r} to {name}: {error}") from error
    except ImportError as error:  # an extra that is not installed
        raise ValueError(str(error)) from error


def _to_verify(dataset, arguments: VerifyArguments):
    """(index, row, completion, gold answer) of each row; `ValueError` at once if a column is missing."""
    from .rows import find_format, read_row

    named = [arguments.completion_column, arguments.answer_column] if arguments.completion_column else []
    if missing := [column for column in named if column not in dataset.column_names]:
        raise ValueError(f"The dataset has the columns {dataset.column_names}, but no {' and no '.join(missing)}.")
    if not named:
        find_format(dataset.column_names)

    def read(index: int, row: dict):
        answer = row.get(arguments.answer_column)
        if named:
            value = row[arguments.completion_column] or ""
            return index, row, value if isinstance(value, str) else value[-1]["content"], answer
        problem = read_row(row, index, arguments.answer_column, "{problem}")
        return index, row, problem.demonstration, answer if isinstance(answer, (list, dict)) else problem.answer

    return (read(index, row) for index, row in enumerate(dataset))


def _print_verdicts(counts: Counter) -> None:
    sources = sorted({source for source, _ in counts})
    print(f"{'':12}" + "".join(f"{source or 'rows':>18}" for source in sources))
    for verdict in Verdict:
        line = ""
        for source in sources:
            total = sum(n for (s, _), n in counts.items() if s == source)
            line += f"{counts[source, verdict]:>11,}{counts[source, verdict] / total:>7.1%}"
        print(f"{verdict:<12}{line}")


def _hide_token(argv: list[str]) -> list[str]:
    """The arguments without `--hub_token X`, which moves to the environment: W&B logs a command line, and we print the next one."""
    import os

    parts = iter(argv)
    kept = []
    for part in parts:
        name, equals, value = part.partition("=")
        if name == "--hub_token":
            os.environ["HF_TOKEN"] = value if equals else next(parts, "")
        else:
            kept.append(part)
    return kept


def main(argv: list[str] | None = None) -> int:
    if argv is None:
        sys.argv[1:] = _hide_token(sys.argv[1:])
    argv = sys.argv[1:] if argv is None else _hide_token(argv)
    commands = {"rewrite": rewrite, "verify": verify, "push": push}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from . import __version__

        print(f"trl-offpolicy {__version__}")
        return 0
    if argv[0] not in commands:
        print(f"trl-offpolicy: there is no command {argv[0]!r}; use one of {', '.join(commands)}.", file=sys.stderr)
        return 2
    try:
        return commands[argv[0]](argv[1:])
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"trl-offpolicy {argv[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped before anything was sampled.", file=sys.stderr)
        return 3
    except SamplerError as error:  # no server answers yet
        print(f"trl-offpolicy {argv[0]}: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
