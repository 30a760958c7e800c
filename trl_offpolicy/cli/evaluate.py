"""`trl-offpolicy eval`: accuracy of a model on benchmarks."""

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from ..sampling.engine import EngineArguments, check_model, make_sampler
from ..sampling.sampler import SamplerError
from .arguments import CommandParser, VerifierArguments, check_before_loading, make_verifier, parser_for, say_next


MOST_UNPARSABLE = 0.25  # share of a benchmark's samples above which an evaluation says so
EVAL_EXAMPLES = """\
examples:
  trl-offpolicy eval --model_name_or_path M --benchmarks test.jsonl --output_dir runs/eval --dry_run    # what is asked, as the model reads it
  trl-offpolicy eval --model_name_or_path M --benchmarks math500 minerva_math olympiadbench aime24 amc23 --preset paper \\
      --output_dir runs/eval-paper --dtype bfloat16
  trl-offpolicy eval --model_name_or_path M --benchmarks math500 test.jsonl openai/gsm8k:main:test --output_dir runs/eval-base
  trl-offpolicy eval --model_name_or_path runs/sft --benchmarks math500 --output_dir runs/eval-sft --baseline runs/eval-base \\
      --train_dataset runs/gsm8k/dataset                                # paired test; another prompt than in training is refused
  trl-offpolicy eval --model_name_or_path M --benchmarks math500 --num_generations 1 --temperature 0 --output_dir runs/greedy
  trl-offpolicy eval --config eval.yaml --greedy --shard 0/4            # on the first of four machines, 1/4 on the second, …

Benchmarks: a name, a file with problem (or question) and answer, or a Hub dataset as id:config:split. Rows with messages or
a prompt of their own are asked in their words. An interrupted evaluation resumes: run the same command again.

Preset `paper` (arXiv 2509.15157, as its code evaluates Qwen2.5-Math; `paper_llama` for Llama-3.1): T = 1, top_p 1, 16 samples,
4096 tokens, seed 0, its prompt. What is not copied: a grader that lets 900 pass for 9, accuracies rounded to 0.1 for each
run, a second BOS for Llama, and another prompt in training than here.

What was forgotten, by lm-eval, in an environment of its own (lm_eval[math] needs another antlr than math-verify); for both models:
  lm_eval --model hf --model_args pretrained=runs/sft,dtype=bfloat16 --tasks mmlu,ifeval --apply_chat_template --batch_size auto \\
      --output_path runs/lm-eval-sft
  trl-offpolicy eval --retention runs/lm-eval-base runs/lm-eval-sft --output_dir runs/eval-sft    # beside the gain in runs/eval-sft
"""


@dataclass(kw_only=True)
class EvalArguments(EngineArguments, VerifierArguments):
    """What is evaluated, and on what."""

    benchmarks: list[str] = field(
        metadata={"help": "Names, files, or Hub datasets as id, id:split or id:config:split."}
    )
    preset: str | None = field(
        default=None,
        metadata={"help": "Settings of a paper; flags beside it win.", "choices": ["paper", "paper_llama"]},
    )
    max_problems: int | None = field(default=None, metadata={"help": "Only the first problems of each benchmark."})
    train_dataset: str | None = field(default=None, metadata={"help": "Rows in training; another prompt is refused."})


@dataclass(kw_only=True)
class RetentionArguments:
    """What lm-eval has measured, and where the gain on the target is."""

    retention: list[str] = field(
        metadata={"help": "lm-eval's result files, or --output_path, of the base and the tuned model."}
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Evaluation of the tuned model with --baseline, whose gain is shown; retention.json goes there."
        },
    )


def eval_parser() -> CommandParser:
    from ..evaluation.evaluation_config import EvaluationConfig

    description = "Measure a model: sample k completions of each problem, verify them, report accuracies with intervals over problems."
    return parser_for((EvalArguments, EvaluationConfig), "eval", description, EVAL_EXAMPLES)


def evaluate(argv: list[str]) -> int:
    if any(arg.partition("=")[0] == "--retention" for arg in argv):
        return _retention(argv)
    from ..data.loading import load_rows
    from ..evaluation.benchmarks import PRESETS, load_benchmarks
    from ..evaluation.evaluate import evaluate as run
    from ..reporting import tables

    parser = eval_parser()
    arguments, config = parser.parse_args_and_config(argv)
    if arguments.preset:
        parser.set_defaults(**PRESETS[arguments.preset])  # a flag or a key of the config file wins over the preset
        arguments, config = parser.parse_args_and_config(argv)
    if config.output_dir is None:
        parser.error("the following arguments are required: --output_dir")
    print(f"output_dir: {config.output_dir}", flush=True)
    if not config.dry_run:
        check_before_loading(config.output_dir, config.report_to)
    rows = load_benchmarks(arguments.benchmarks)
    if arguments.max_problems is not None:
        if arguments.max_problems < 1:
            raise ValueError(f"You passed max_problems={arguments.max_problems}; it must be at least 1.")
        rows = {name: each.select(range(min(arguments.max_problems, len(each)))) for name, each in rows.items()}
    trained_on = arguments.train_dataset and load_rows(arguments.train_dataset, named="train_dataset")
    if config.dry_run:
        return _show_questions(arguments, config, rows, trained_on)
    sampler = make_sampler(arguments)
    try:
        with make_verifier(arguments) as verifier:
            results = run(
                arguments.model_name_or_path,
                rows,
                config,
                sampler=sampler,
                verifier=verifier,
                train_dataset=trained_on,
            )
    except (KeyboardInterrupt, SamplerError) as error:
        print(f"\nstopped; every finished sample is in {config.output_dir}. {error}".rstrip())
        print("Run the same command again to resume.")
        return 3
    finally:
        sampler.close()
    if results:  # a shard of several may have no problem
        print(tables.markdown(tables.accuracy(results)), end="")
    if config.baseline:
        print(tables.markdown(tables.comparison(results)), end="")
    for sentence in _unread(results, arguments.verifier):
        print(sentence)
    if not (Path(config.output_dir) / "results.json").exists():
        print(f"shard {config.shard} is done; results.json appears with the last of them")
        return 0
    say_next(report_command(config.output_dir))
    return 0


def _retention(argv: list[str]) -> int:
    """What the tuned model has lost elsewhere, beside what it has gained."""
    from ..evaluation.retention import mean_drop, measure_retention
    from ..reporting import tables

    description = "The change of lm-eval's metrics from the base to the tuned model, beside the gain on the target."
    (given,) = parser_for(RetentionArguments, "eval", description, EVAL_EXAMPLES).parse_args_and_config(argv)
    if len(given.retention) != 2:
        raise ValueError(
            f"You passed retention={given.retention}; it takes two: lm-eval's results of the base and of the tuned model."
        )
    results = {}
    if given.output_dir is not None:
        print(f"output_dir: {given.output_dir}", flush=True)
        if (file := Path(given.output_dir).expanduser() / "results.json").exists():
            found = json.loads(file.read_text())
            if isinstance(found, dict) and isinstance(found.get("benchmarks"), dict):  # else another program's
                results = found["benchmarks"]
    base, tuned = given.retention
    changes = measure_retention(base, tuned, given.output_dir)
    print(tables.markdown(tables.retention(changes, results)), end="")
    gains = [r["vs_baseline"]["difference"] for r in results.values() if "vs_baseline" in r]
    if given.output_dir is not None and not gains:
        print(f"{given.output_dir} has no evaluation with --baseline, so there is no gain beside it.")
    drop = mean_drop(changes)
    if drop is not None:
        gain = f"; mean gain on the target {sum(gains) / len(gains):+.1%}" if gains else ""
        print(f"mean drop over the tasks: {tables.number(drop[0], '+.1%', drop[1])}{gain}")
    return 0


def _unread(results: dict[str, dict], verifier: str) -> list[str]:
    """
    A sentence on each benchmark with gold answers that cannot be compared with, and on each of which many samples
    state no answer: more often than the model, its prompt is at fault.
    """
    left_out = [
        f"{name}: {result['gold_unparsable']:,} of {result['num_problems']:,} problems have a gold answer that `--verifier {verifier}` cannot compare "
        "with, and are left out of the accuracies (`not told`)."
        for name, result in results.items()
        if result["gold_unparsable"]
    ]
    return left_out + [
        f"{name}: {result['unparsable']:.0%} of the samples end without an answer that `--verifier {verifier}` reads, and count as wrong. "
        "--dry_run shows what was asked; does it ask for the form that the verifier reads, and as the model was trained?"
        for name, result in results.items()
        if result["unparsable"] > MOST_UNPARSABLE
    ]


def _show_questions(arguments: EvalArguments, config, rows: dict, train_dataset) -> int:
    """What each benchmark's first problem is asked, as the model reads it."""
    from ..evaluation.benchmarks import check_format, read_questions, without_control_tokens
    from ..rewriting.dry_run import shown_prompt

    tokenizer, given = check_model(arguments), config.chat_template_kwargs
    asked = config.solve_prompt, config.system_prompt
    questions = {name: read_questions(name, each, *asked) for name, each in rows.items()}
    if tokenizer is not None:
        check_format(tokenizer, questions, config.train_tokenizer, train_dataset, given)
        questions = without_control_tokens(tokenizer, questions, config.control_tokens)
    with make_verifier(arguments) as verifier:
        for name, (first, *others) in questions.items():
            print(shown_prompt(f"first prompt of {name}", first.prompt, tokenizer, given, verifier))
            print(
                f"gold answer: {first.answer!r}\n{name}: {1 + len(others):,} problems x {config.num_generations} samples"
            )
    print("nothing was sampled; drop --dry_run to start")
    return 0


def report_command(output_dir: str) -> str:
    return shlex.join(["trl-offpolicy", "report", output_dir, "--output_dir", f"{output_dir}/report"])
