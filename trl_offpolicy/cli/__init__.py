"""The `trl-offpolicy` command; on several GPUs `accelerate launch -m trl_offpolicy.cli COMMAND`.

Every flag is also a key of `--config file.yaml`. The first line says where the results go, the last one the next
command to run. Exit codes: 0 done, 2 bad input, 3 stopped early and resumable.
"""

import errno
import os
import sys
import warnings
from contextlib import nullcontext
from importlib import import_module

from ..data.redaction import redacted
from ..runs.interrupts import terminable
from ..sampling.sampler import SamplerError


USAGE = """\
usage: trl-offpolicy COMMAND [options]

commands:
  rewrite    rewrite a dataset of demonstrations into what the model could have written itself
  sft        fine-tune on what came out, with importance weights or DFT
  agent      train a rewriting agent: a LoRA adapter that retells demonstrations as the model would put them
  loop       rounds of rewriting with the newest policy and training on what it wrote
  verify     check the answers of a dataset: a table of verdicts, and the rows that are not correct
  eval       accuracy of a model on benchmarks: avg@k, pass@k, maj@k, greedy, with intervals
  gap        how far a rewritten dataset is from a model, before and after rewriting
  report     one page of what rewrites, trainings, evaluations and gaps have written
  rows       the rows so far of an unfinished rewrite
  push       push a finished rewrite to the Hub: rows, attempts and card

  trl-offpolicy rewrite --model_name_or_path Qwen/Qwen2.5-Math-1.5B --dataset_name openai/gsm8k --dataset_config main \\
      --output_dir runs/gsm8k --num_generations 8 --dry_run          # first prompts and the estimate, nothing is sampled
  trl-offpolicy rewrite --config rewrite.yaml                        # the same keys in a file; run again to resume
  trl-offpolicy sft --model_name_or_path M --dataset_name runs/gsm8k/dataset --objective dft --output_dir runs/gsm8k-dft
  trl-offpolicy agent --model_name_or_path M --dataset_name D --output_dir runs/agent --use_vllm
  trl-offpolicy loop --model_name_or_path M --dataset_name D --output_dir runs/loop --rounds 3 --train_config train.yaml
  trl-offpolicy verify --dataset_name runs/gsm8k/dataset             # what is not correct goes to gsm8k.not_correct.jsonl
  trl-offpolicy rows runs/gsm8k --so_far                             # what is settled while the run goes on
  trl-offpolicy push runs/gsm8k --hub_dataset_id me/gsm8k-on-policy   # or --push_to_hub --hub_dataset_id … when rewriting
  trl-offpolicy eval --model_name_or_path M --benchmarks math500 aime24 --preset paper --output_dir runs/eval
  trl-offpolicy gap --model_name_or_path M --dataset_name runs/gsm8k/dataset --output_dir runs/gap
  trl-offpolicy report runs --output_dir runs/report
  trl-offpolicy COMMAND --help                                       # every option
"""

# command → (module, function); loaded when it is called, so that --help needs neither torch nor trl
COMMANDS = {
    "rewrite": ("rewrite", "rewrite"),
    "sft": ("sft", "sft"),
    "agent": ("agent", "agent"),
    "loop": ("loop", "loop"),
    "verify": ("verify", "verify"),
    "rows": ("rows", "rows"),
    "push": ("push", "push"),
    "eval": ("evaluate", "evaluate"),
    "gap": ("gap", "gap"),
    "report": ("report", "report"),
}


# Commands that resume, and whose engines are processes that would go on without them: SIGTERM is ctrl-C to them.
WITH_ENGINES = ("rewrite", "eval")

# Errors that mean that the machine ran out of something; what was written so far is kept.
RESUMABLE = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EFBIG}


def main(argv: list[str] | None = None) -> int:
    if argv is None:
        warnings.showwarning = _tell
        argv = sys.argv[1:] = _hide_token(sys.argv[1:])
        sys.argv[1:] = map(redacted, argv)  # W&B logs the command line, which may hold a server's password
    else:
        argv = _hide_token(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from .. import __version__

        print(f"trl-offpolicy {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"trl-offpolicy: there is no command {argv[0]!r}; use one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        module, function = COMMANDS[argv[0]]
        with terminable() if argv[0] in WITH_ENGINES else nullcontext():
            return getattr(import_module(f".{module}", __package__), function)(argv[1:])
    except (ValueError, ModuleNotFoundError) as error:
        print(f"trl-offpolicy {argv[0]}: {redacted(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"trl-offpolicy {argv[0]}: {redacted(str(error))}", file=sys.stderr)
        if error.errno not in RESUMABLE:
            return 2
        print(
            "What was written so far is kept: mend that, then run the same command again to resume.", file=sys.stderr
        )
        return 3
    except KeyboardInterrupt:
        print("\nstopped before it began to sample; run the same command again.", file=sys.stderr)
        return 3
    except SamplerError as error:  # no server answers
        print(f"trl-offpolicy {argv[0]}: {redacted(str(error))}", file=sys.stderr)
        return 3


def _tell(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning as a sentence, without the line of code that gave it."""
    print(redacted(f"{'' if category is UserWarning else category.__name__ + ': '}{message}"), file=file or sys.stderr)


def _hide_token(argv: list[str]) -> list[str]:
    """
    The arguments without `--hub_token X`, which moves to the environment: W&B logs a command line, and we print the
    next one.
    """
    parts = iter(argv)
    kept = []
    for part in parts:
        name, equals, value = part.partition("=")
        if name in ("--hub_token", "--hub-token"):
            os.environ["HF_TOKEN"] = value if equals else next(parts, "")
        else:
            kept.append(part)
    return kept
