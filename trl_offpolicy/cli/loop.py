"""`trl-offpolicy loop`: rounds of rewriting with the newest policy and training on what it wrote."""

import json
import shlex
import shutil
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from ..data.whole_file import write_whole
from ..loop.loop_config import LoopConfig
from ..rewriting.dry_run import shown_strategy
from ..rewriting.rewrite_config import RewriteConfig
from ..rewriting.strategies import STRATEGIES
from ..sampling.engine import EngineArguments
from .arguments import VerifierArguments, check_before_loading, given, load_demonstrations, parser_for
from .evaluate import eval_parser
from .rewrite import RewriteArguments


LOOP_EXAMPLES = """\
examples:
  trl-offpolicy loop --model_name_or_path M --dataset_name demos.jsonl --output_dir runs/loop --train_config train.yaml
  trl-offpolicy loop --model_name_or_path M --dataset_name D --output_dir runs/loop --rounds 3 --train_from last --refresh unsolved \\
      --sampler vllm --num_generations 8 --train_command 'accelerate launch -m trl_offpolicy.cli sft' --train_config train.yaml \\
      --benchmarks math500 dev.jsonl --max_kl 0.05
  trl-offpolicy loop --config loop.yaml --dry_run                      # the steps, and which of them are done

It takes every option of `trl-offpolicy rewrite` for its rewrites; what trains has its options in --train_config. Run the same command
again to go on after it was stopped or killed, with more --rounds too.
"""


@dataclass(kw_only=True)
class LoopArguments(LoopConfig, RewriteArguments):
    """The rounds, and what is rewritten by what."""


def loop(argv: list[str]) -> int:
    from ..loop.rounds import Loop, StepFailed, measures_forgetting
    from ..runs.interrupts import terminable
    from ..runs.run_log import wandb_run

    description = "Rewrite with the newest policy, train on the rows, measure, and again: each step is a command in a process of its own."
    parser = parser_for((LoopArguments, RewriteConfig), "loop", description, LOOP_EXAMPLES, STRATEGIES)
    arguments, config = parser.parse_args_and_config(argv)
    print(f"output_dir: {config.output_dir}", flush=True)
    _check(arguments, config)
    # A round's command would else take the strategy's value of what was given as its default.
    preset = STRATEGIES.get(config.strategy or "", {})
    rewriting = given(arguments, config) | {name: getattr(config, name) for name in preset if hasattr(config, name)}
    for name in ("output_dir", "dry_run", *(f.name for f in fields(LoopConfig))):
        rewriting.pop(name, None)
    if arguments.max_kl is not None and not measures_forgetting(rewriting):
        raise ValueError(
            f"You passed max_kl={arguments.max_kl:g}, but KL(π_0‖π) is measured on attempts of stage `self` that were drawn at temperature 1 without "
            "top_p, top_k, min_p, a repetition penalty or stop texts, and with keep_rejected. Leave max_kl out, or draw so."
        )
    shared = {f.name for cls in (EngineArguments, VerifierArguments) for f in fields(cls)} - {"model_name_or_path"}
    engine = {name: value for name, value in rewriting.items() if name in shared}
    rounds = Loop(
        Path(config.output_dir),
        arguments,
        rewriting,
        engine,
        lambda: load_demonstrations(arguments, config.answer_column),
    )
    if config.dry_run:
        if config.strategy is not None:
            print(shown_strategy(config, arguments))
        for step in rounds.steps(0):
            print(f"round 0, {step.name}{' (done)' if step.done else ''}: {shlex.join(step.command)}")
        print(
            f"and so in each of {arguments.rounds} rounds, with the policy that the round before has trained; nothing was run"
        )
        return 0
    check_before_loading(config.output_dir, config.report_to)
    try:
        with rounds.alone(), terminable():
            rounds.open()
            settings = rounds.header["config"]
            with wandb_run(config.report_to, rounds.output_dir, "loop", settings) as logged:
                return _run(rounds, arguments.rounds, logged)
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on.")
        return 3
    except StepFailed as error:
        print(
            f"trl-offpolicy loop: {error} Mend that, then run the same command again to go on there.", file=sys.stderr
        )
        return 3 if error.code == 3 else 2


def _run(rounds, wanted: int, logged) -> int:
    """All rounds that are wanted, or until one gives a reason to stop; each is logged to the W&B run, if there is one."""
    summaries: list[dict] = []
    for number in range(wanted):
        reason, summary = None, {}
        for step in rounds.steps(number):
            if not step.done:
                print(f"round {number}, {step.name}: {shlex.join(step.command)}", flush=True)
                rounds.run(step)
            if step.name == "rewrite":
                summary = rounds.summary(number)
                if reason := rounds.collapse([*summaries, summary]):
                    break
        summaries.append(summary | rounds.measured(number))
        write_whole(rounds.output_dir / "rounds.json", json.dumps({"rounds": summaries}, indent=1) + "\n")
        print(_sentence(summaries[-1]), flush=True)
        if logged is not None and number >= logged.step:  # below it are the rounds that were logged before a restart
            logged.log(_numbers(summaries[-1]), step=number)
        where = "before the training of" if reason else "after"
        if number + 1 < wanted:
            reason = reason or rounds.reason_to_stop(summaries[-1])
        if reason:
            print(f"stopped {where} round {number}: {reason}.")
            if logged is not None:
                logged.summary["stopped"] = reason
            break
    print(
        shlex.join(["trl-offpolicy", "report", str(rounds.output_dir), "--output_dir", f"{rounds.output_dir}/report"])
    )
    return 0


def _sentence(summary: dict) -> str:
    from ..reporting.tables import number

    total = sum(summary["sources"].values())
    parts = [f"{source} {count / total:.1%}" for source, count in summary["sources"].items()]
    if "improved" in summary:
        parts.append(f"{summary['improved']:,} rows improved")
    if "forgetting" in summary:
        parts.append(f"KL(π_0‖π) {summary['forgetting']['kl_per_token']:.4f} nats per token")
    for name, scores in summary.get("accuracy", {}).items():
        best = next(key for key in scores if key.startswith("avg@"))
        parts.append(f"{name} {best} {number(scores[best], '.1%') or 'not told'}")
    return f"round {summary['round']}: " + " · ".join(parts)


def _numbers(summary: dict) -> dict[str, float]:
    """What a round came to, as W&B shows it: one number a name."""
    total = sum(summary["sources"].values())
    numbers = {f"share/{source}": count / total for source, count in summary["sources"].items()}
    measured = {"forgetting": summary.get("forgetting", {}), **summary.get("accuracy", {})}
    numbers |= summary | {f"{of}/{name}": x for of, found in measured.items() for name, x in found.items()}
    return {name: x for name, x in numbers.items() if isinstance(x, int | float)}


def _check_training(arguments: LoopArguments, replay: bool) -> None:
    """Raises `ValueError` for what would fail only after a rewrite: a program that is missing, an option that is none."""
    from ..loop.rounds import SECOND_ADAPTER, options_in
    from .sft import sft_parser

    words = shlex.split(arguments.train_command or "")
    if words and shutil.which(words[0]) is None:
        raise ValueError(
            f"You passed train_command={arguments.train_command!r}, but there is no program {words[0]!r} here."
        )
    draws_what_it_trains = arguments.train_from == "last" and arguments.refresh == "all" and not replay
    for file in arguments.train_config:
        if not words or words[-1] == "sft":
            sft_parser().read_config(Path(file).expanduser())
        options = options_in(file)
        if arguments.train_from == "last" and options.get("use_peft"):
            raise ValueError(f"{file} has use_peft: a round's model is an adapter, {SECOND_ADAPTER}")
        if options.get("precompute_behavior_log_probs") and not draws_what_it_trains:
            raise ValueError(
                f"{file} has precompute_behavior_log_probs: it would take the log-probs of the model that a round's training begins with for those of "
                "the policies that drew its rows, which are others. Leave it out: the rows have theirs. (With train_from='last', refresh='all' and no "
                "replay, both are the same.)"
            )
        if (revision := options.get("model_revision", arguments.model_revision)) != arguments.model_revision:
            raise ValueError(
                f"{file} has model_revision={revision!r}, but the rows would be drawn with {arguments.model_revision or 'the newest'!r}. Pass "
                "--model_revision to the loop, which hands it on."
            )


def _check(arguments: LoopArguments, config: RewriteConfig) -> None:
    """Raises `ValueError` or `FileNotFoundError` for options that no loop can have."""
    from ..evaluation.benchmarks import load_benchmarks

    if arguments.sampler == "openai":
        raise ValueError(
            "You passed --sampler openai: such a server goes on serving the initial policy. Use vllm or transformers."
        )
    if not arguments.train_config and arguments.train_command is None:
        raise ValueError(
            "You passed neither --train_config nor --train_command: write the options of `trl-offpolicy sft` (objective, learning_rate, ...) into a YAML "
            "file and pass it as --train_config."
        )
    if missing := [
        file
        for file in (*arguments.train_config, arguments.eval_config)
        if file and not Path(file).expanduser().is_file()
    ]:
        raise ValueError(
            f"You passed {' and '.join(map(repr, missing))} as train_config or eval_config, but there is no such file."
        )
    if arguments.adapter is not None:
        raise ValueError(
            f"You passed adapter={arguments.adapter!r}: round 0 would be drawn with it, but the training would begin without it. Merge it into the model "
            "(`merge_and_unload()` of peft, then `save_pretrained` of model and tokenizer), and pass that directory as model_name_or_path."
        )
    _check_training(arguments, replay=bool(config.replay_share))
    load_benchmarks(arguments.benchmarks or [])  # one that is missing would end the first round after its training
    if arguments.eval_config:
        eval_parser().read_config(Path(arguments.eval_config).expanduser())
    if config.keep == "all" and arguments.refresh == "unsolved":
        raise ValueError(
            "You passed keep='all' with refresh='unsolved', which carries one row of each solved problem over. Pass refresh='all'."
        )
    unwanted = {
        name: getattr(config, name)
        for name, default in (
            ("shard", "0/1"),
            ("push_to_hub", False),
            ("probe", 0),
            ("rejudge", False),
            ("overwrite", False),
        )
        if getattr(config, name) != default
    }
    if unwanted or arguments.rewriter_adapter:
        raise ValueError(
            f"You passed {unwanted or {'rewriter_adapter': arguments.rewriter_adapter}}, which a loop does not take: push a round with `trl-offpolicy push "
            f"{config.output_dir}/round-0/rewrite`, and begin anew in another output_dir."
        )
