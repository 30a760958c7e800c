"""`trl-offpolicy rewrite`, `rows` and `push`."""

import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from ..data.redaction import redacted
from ..rewriting.rewrite_config import RewriteConfig
from ..rewriting.strategies import STRATEGIES
from ..runs.run_counts import summary
from ..sampling.engine import EngineArguments, check_model, make_sampler, make_teachers, read_teachers
from ..sampling.sampler import SamplerError, cannot_draw_hinted
from .arguments import (
    CommandParser,
    DemonstrationArguments,
    VerifierArguments,
    check_before_loading,
    load_demonstrations,
    make_verifier,
    parser_for,
    say_next,
)
from .push import pushed


REWRITE_EXAMPLES = """\
examples:
  trl-offpolicy rewrite --model_name_or_path M --dataset_name demos.jsonl --output_dir runs/demos
  trl-offpolicy rewrite --model_name_or_path M --dataset_name demos.parquet --output_dir runs/ablation --stages self
  trl-offpolicy rewrite --config rewrite.yaml --dry_run --probe 32      # prompts; lengths, yield and cost from 32 rows
  trl-offpolicy rewrite --config rewrite.yaml --max_rows 100
  trl-offpolicy rewrite --config rewrite.yaml --verifier numeric --verifier_kwargs '{"rel_tol": 0.05}' --rejudge   # of an old run
  trl-offpolicy rewrite --config rewrite.yaml --push_to_hub --hub_dataset_id me/demos-on-policy --private --push_every 1000
  trl-offpolicy rewrite --config rewrite.yaml --shard 0/4     # on the first of four machines, 1/4 on the second, …
  trl-offpolicy rewrite --model_name_or_path M --dataset_name D --output_dir runs/d --sampler vllm --tensor_parallel_size 2
  trl-offpolicy rewrite --model_name_or_path M --dataset_name D --output_dir runs/d --sampler openai \\
      --base_url http://node1:8000/v1 http://node2:8000/v1          # two `vllm serve M`; the key is OPENAI_API_KEY, if they want one
  trl-offpolicy rewrite --model_name_or_path M --dataset_name D --output_dir runs/agent-d --stages guided \\
      --rewriter_adapter runs/agent                # every row is retold by a trained agent (`trl-offpolicy agent`)
  trl-offpolicy rewrite --model_name_or_path M --dataset_name D --output_dir runs/grape --strategy grape \\
      --teacher big=http://node3:8000/v1           # of all that is right, what M finds likeliest; --dry_run shows the preset

An interrupted run resumes: run the same command again.
"""


@dataclass(kw_only=True)
class RewriteArguments(DemonstrationArguments, EngineArguments, VerifierArguments):
    """What is rewritten by what."""

    rewriter_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Rewriting agent that draws in the guided stage: LoRA adapter of the model, Hub id or local directory; openai: the name "
            "under which it is served."
        },
    )
    teacher: list[str] | None = field(
        default=None,
        metadata={
            "help": "Other models that draw in the stage `teacher`: NAME=MODEL (with --sampler transformers), or NAME=URL of a server that "
            "calls it NAME; several: one after another."
        },
    )


def rewrite_parser() -> CommandParser:
    description = "Rewrite demonstrations: the model's own correct solution, else its retelling of the reference, else the demonstration."
    return parser_for((RewriteArguments, RewriteConfig), "rewrite", description, REWRITE_EXAMPLES, STRATEGIES)


def rewrite(argv: list[str]) -> int:
    from ..rewriting.push import refusals
    from ..rewriting.rewriter import DataRewriter

    parser = rewrite_parser()
    arguments, config = parser.parse_args_and_config(argv)
    print(f"output_dir: {config.output_dir}", flush=True)
    samples = not config.dry_run or config.probe > 0
    if samples:
        check_before_loading(config.output_dir, config.report_to)
    dataset, named = _checked_dataset(arguments, config), read_teachers(arguments.teacher)
    verifier, adapter = make_verifier(arguments), arguments.rewriter_adapter
    teachers: dict = {name: SimpleNamespace(name=model) for name, model in named.items()}  # enough for a dry run
    sampler = make_sampler(arguments, adapter) if samples else None
    if samples:
        teachers = make_teachers(arguments, named, config.teacher_log_probs)
    agent = sampler.with_adapter(adapter) if sampler is not None and adapter is not None else None
    tokenizer = None if samples else check_model(arguments)
    rewriter = DataRewriter(arguments.model_name_or_path, config, sampler, verifier, tokenizer, agent, teachers)
    try:
        # The servers' addresses are private: they may name machines and hold passwords.
        given = {k: v for k, v in vars(arguments).items() if v is not None and k != "base_url"}
        if named:
            given["teacher"] = [name if "://" in model else f"{name}={model}" for name, model in named.items()]
        rewritten = rewriter.rewrite(dataset, given)
    except (KeyboardInterrupt, SamplerError) as error:
        journal = rewriter.shard.file(rewriter.output_dir, "journal.jsonl")
        print(f"\nstopped; every finished attempt is in {journal}. {error}".rstrip())
        print("Run the same command again to resume.")
        return 3
    except refusals() as error:  # a repository cannot be opened, which is tried before anything is sampled
        status = getattr(getattr(error, "response", None), "status_code", None)
        print(
            redacted(f"trl-offpolicy rewrite: {config.hub_dataset_id} cannot be pushed to: {error}", config.hub_token),
            file=sys.stderr,
        )
        print(
            "Nothing was sampled. Run the same command again when that is settled, or without --push_to_hub, and push later."
        )
        return 2 if status in (400, 401, 403, 404) else 3
    finally:
        for engine in (agent, sampler, *(teachers.values() if samples else ())):
            if engine is not None:
                engine.close()
    if rewritten is None:
        print("drop --dry_run and --probe to start" if samples else "nothing was sampled; drop --dry_run to start")
        return 0
    print(*summary(rewriter.metrics, config.max_completion_length, rewriter.advice), sep="\n")
    if (undrawn := rewriter.metrics["undrawn"]) and not config.accept_failed:
        print(
            f"The engine failed at {undrawn:,} attempts, so rows may have fallen back to their demonstration that need not have"
            f"{', or replay rows are missing' if config.replay_share else ''}. "
            "Run the same command again to try them again, or with --accept_failed True to be done with the rows as they are."
        )
        return 3
    if missing := rewriter.missing_shards:
        shown = ", ".join(map(str, missing[:10])) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        print(
            f"shard {rewriter.shard} is done; still missing: {shown}. {config.output_dir}/dataset appears with the last of them."
        )
        print(_command_for(argv, missing[0]))
        return 0
    trained_on = f"{config.output_dir}/{'with_replay' if config.replay_share else 'dataset'}"
    if config.push_to_hub:
        trained_on = pushed(rewriter.push_to_hub, config.output_dir, config.hub_dataset_id, config.hub_token)
        if trained_on is None:
            return 3
    model, template = arguments.model_name_or_path, arguments.chat_template_path
    say_next(_train_command(model, template, config, rewriter.metrics, trained_on))
    return 0


def _checked_dataset(arguments: RewriteArguments, config: RewriteConfig):
    """The rows; wrong ones, and options that do not go together, are reported before minutes go into loading a model."""
    from ..data.formats import read_rows, text_columns
    from ..data.loading import plain_rows
    from ..rewriting.problems import check_stages

    template, adapter = arguments.chat_template_path, arguments.rewriter_adapter
    if template is not None and not template.endswith((".jinja", ".j2")):
        raise ValueError(
            f"You passed chat_template_path={template!r}; training takes a file for a template only if its name ends in .jinja or .j2. Rename it."
        )
    dataset = load_demonstrations(arguments, config.answer_column)
    check_stages(dataset.column_names, config)
    if not arguments.skip_incomplete:  # which has read them all
        for _ in read_rows(text_columns(plain_rows(dataset), config.answer_column), config.answer_column):
            pass  # it raises for rows that lack a part
    if adapter is not None and "guided" not in config.stages:
        raise ValueError(
            f"You passed rewriter_adapter={adapter!r} with stages={config.stages}: it draws in the stage `guided`."
        )
    if config.hinted and arguments.sampler != "transformers":
        raise cannot_draw_hinted(f"--sampler {arguments.sampler}")
    return dataset


def _train_command(model: str, template: str | None, config: RewriteConfig, metrics: dict, trained_on: str) -> str:
    """What trains on the rows, on all GPUs of a machine, or on its CPU where it has drawn them there."""
    counts = metrics["yield"]
    if metrics.get("unsolved") == counts["total"]:
        return "There is no row to train on."
    objective = "nll" if counts["expert"] == counts["total"] else "dft"  # what did best in docs/results.md
    torch = sys.modules.get("torch")  # an API's client has not loaded it, and trains elsewhere
    on_cpu = torch is not None and not torch.cuda.is_available()
    command = ["trl-offpolicy"] if on_cpu else ["accelerate", "launch", "-m", "trl_offpolicy.cli"]
    command += ["sft", "--model_name_or_path", model]
    command += ["--dataset_name", trained_on, "--objective", objective, "--output_dir", f"{config.output_dir}-sft"]
    command += ["--chat_template_path", template] if template else []
    command += ["--use_cpu", "--bf16", "False"] if on_cpu else []
    command += ["--report_to", "wandb"] if config.report_to == "wandb" else []
    return _wandb_environment(config) + shlex.join(command)


def _wandb_environment(config) -> str:
    """What ties the training to this run on W&B."""
    if config.report_to != "wandb":
        return ""
    from ..runs.run_log import wandb_group

    log_model = "WANDB_LOG_MODEL=end " if config.wandb_log_artifacts else ""
    return f"WANDB_RUN_GROUP={shlex.quote(wandb_group(Path(config.output_dir)))} {log_model}"


def _command_for(argv: list[str], shard) -> str:
    """The same command for another shard."""
    same = re.sub(r"--shard(=| )\S+ ?", "", shlex.join(map(redacted, argv))).strip()
    return f"trl-offpolicy rewrite {same} --shard {shard}"
