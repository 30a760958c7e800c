"""`trl-offpolicy gap`: how far a rewritten dataset is from a model."""

import os
from dataclasses import dataclass, field

from ..data import prompts
from ..data.control_tokens import HELP, MODES
from ..sampling.engine import TEMPLATE_KWARGS_HELP, TEMPLATE_METADATA, check_dtype, read_template
from .arguments import DatasetArguments, check_before_loading, given, load_dataset, parser_for, say_next
from .evaluate import report_command


GAP_EXAMPLES = """\
examples:
  trl-offpolicy gap --model_name_or_path M --dataset_name runs/gsm8k/dataset --output_dir runs/gap
  trl-offpolicy gap --model_name_or_path M --dataset_name demos.jsonl --max_rows 200 --output_dir runs/gap-before    # before a rewrite
  trl-offpolicy gap --model_name_or_path runs/gsm8k-dft --dataset_name runs/gsm8k --forgetting --output_dir runs/kl    # of a trained model
  trl-offpolicy gap --model_name_or_path M --dataset_name runs/gsm8k/dataset --output_dir runs/table3 --concatenate --dtype float16
"""


@dataclass(kw_only=True)
class GapArguments(DatasetArguments):
    """How far which rows are from which model."""

    model_name_or_path: str = field(
        metadata={"help": "Usually the model that will be trained: Hub id or local directory."}
    )
    output_dir: str = field(metadata={"help": "Where policy_gap.json and policy_gap.parquet go."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    dtype: str = field(default="auto", metadata={"help": "Weights' dtype: auto, bfloat16, float16 or float32."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the model's repository."})
    forgetting: bool = field(
        default=False,
        metadata={
            "help": "dataset_name is a rewrite's directory: KL from the policy that drew its attempts to the model."
        },
    )
    batch_tokens: int = field(default=8192, metadata={"help": "Tokens of one forward, padding included."})
    concatenate: bool = field(
        default=False, metadata={"help": "Bare problem + target without template, as the paper's Table 3."}
    )
    chat_template_path: str | None = field(default=None, metadata=TEMPLATE_METADATA)
    chat_template_kwargs: str | None = field(default=None, metadata={"help": TEMPLATE_KWARGS_HELP})
    solve_prompt: str = field(
        default=prompts.SOLVE_PROMPT, metadata={"help": "What a demonstration's problem is asked, before any rewrite."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System turn before it."})
    control_tokens: str = field(default="warn", metadata={"help": HELP, "choices": MODES})


# The options that --forgetting heeds.
OF_FORGETTING = (
    "forgetting", "model_name_or_path", "dataset_name", "output_dir", "model_revision", "dtype", "trust_remote_code", "batch_tokens",
    "chat_template_path",
)  # fmt: skip


def gap(argv: list[str]) -> int:
    description = "Measure how far a dataset's targets are from a model, by source, before and after rewriting."
    (arguments,) = parser_for(GapArguments, "gap", description, GAP_EXAMPLES).parse_args_and_config(argv)
    from ..evaluation.policy_gap import measure_policy_gap
    from ..reporting import tables

    check_dtype(arguments.dtype)
    arguments.output_dir = os.path.expanduser(arguments.output_dir)
    print(f"output_dir: {arguments.output_dir}", flush=True)
    check_before_loading(arguments.output_dir)
    template = arguments.chat_template_path
    init = {
        "dtype": arguments.dtype, "revision": arguments.model_revision, "trust_remote_code": arguments.trust_remote_code,
    }  # fmt: skip
    if arguments.forgetting:
        if idle := [f"--{name}" for name in given(arguments) if name not in OF_FORGETTING]:
            raise ValueError(
                f"You passed {' and '.join(idle)} with --forgetting, which measures the first attempts of the whole rewrite in --dataset_name, as they "
                "were asked. Leave that out."
            )
        return _forgetting(arguments, init)
    result = measure_policy_gap(
        arguments.model_name_or_path,
        load_dataset(arguments),
        batch_tokens=arguments.batch_tokens,
        concatenate=arguments.concatenate,
        chat_template=read_template(template),
        chat_template_kwargs=arguments.chat_template_kwargs,
        solve_prompt=arguments.solve_prompt,
        system_prompt=arguments.system_prompt,
        output_dir=arguments.output_dir,
        control_tokens=arguments.control_tokens,
        model_init_kwargs=init,
    )
    print(tables.markdown(tables.policy_gap(result)) + "\n" + tables.markdown(tables.texts(result)), end="")
    say_next(report_command(arguments.output_dir))
    return 0


def _forgetting(arguments: GapArguments, init: dict) -> int:
    from ..evaluation.forgetting import measure_forgetting
    from ..reporting.tables import number

    found = measure_forgetting(
        arguments.model_name_or_path,
        arguments.dataset_name,
        batch_tokens=arguments.batch_tokens,
        output_dir=arguments.output_dir,
        model_init_kwargs=init,
        chat_template=read_template(arguments.chat_template_path),
    )
    for name, unit in (("kl", "completion"), ("kl_per_token", "token")):
        print(
            f"KL(π_0‖π) on {found['problems']:,} problems: {number(found[name], '.4f', found[f'{name}_ci95'])} nats per {unit}"
        )
    return 0
