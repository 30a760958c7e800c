"""Three rounds of rewriting and training on the embedded policy, on a CPU: `make rounds`.

What it runs is one command, `trl-offpolicy loop`, which is printed first; `docs/rounds.md` explains it.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from quickstart_task import GUIDED_PROMPT, demonstrations, problems

from trl_offpolicy.cli import main


POLICY = Path(__file__).parent / "quickstart_policy"
REWRITING = {
    "num_generations": 4,
    "max_completion_length": 192,
    "guided_prompt": GUIDED_PROMPT,
    "solve_prompt": "{problem}",
}
TRAINING = {
    "objective": "iw", "learning_rate": 3e-4, "num_train_epochs": 1, "per_device_train_batch_size": 16, "use_cpu": True, "bf16": False,
    "dtype": "float32", "report_to": "none", "disable_tqdm": True, "logging_steps": 10,
}  # fmt: skip
EVALUATING = {"num_generations": 4, "max_completion_length": 192, "solve_prompt": "{problem}"}


def write(path: Path, values: dict) -> Path:
    path.write_text(json.dumps(values, indent=1))  # JSON is YAML
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/rounds", help="Where the rounds go.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num_problems", type=int, default=200)
    parser.add_argument("--train_from", choices=["base", "last"], default="last")
    args = parser.parse_args()
    directory = Path(args.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    rows = demonstrations(problems(args.num_problems, 1, (1, 2, 3, 4, 5)))
    test = [
        {"prompt": row["prompt"], "answer": row["answer"]} for row in demonstrations(problems(100, 2, (1, 2, 3, 4, 5)))
    ]
    for name, content in (("demonstrations", rows), ("test", test)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    command = [
        "loop", "--config", write(directory / "rewriting.yaml", REWRITING), "--train_config", write(directory / "training.yaml", TRAINING),
        "--eval_config", write(directory / "evaluating.yaml", EVALUATING), "--model_name_or_path", POLICY,
        "--dataset_name", directory / "demonstrations.jsonl", "--benchmarks", directory / "test.jsonl",
        "--min_entropy", 0.1,  # a policy this small is soon sure of what it writes
        "--rounds", args.rounds, "--train_from", args.train_from, "--output_dir", directory / "loop",
    ]  # fmt: skip
    command = list(map(str, command))
    print(shlex.join(["trl-offpolicy", *command]), flush=True)
    sys.exit(main(command))
