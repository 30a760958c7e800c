"""The checkpoints of a training from which it can go on as if nothing had happened."""

import json
from pathlib import Path


# The optimizer's state: of one process or FSDP, and of DeepSpeed, which keeps all it has in a folder of its own.
OPTIMIZER = ("*optimizer*", "global_step*")


def whole_checkpoints(directory: Path) -> list[Path]:
    """
    Those that a training with `transformers.Trainer` has left in its `output_dir`, the newest last.

    Left out is one that a killed process has not written to its end: `trainer_state.json`, which comes last, is
    missing or torn. And one without the optimizer's state (`save_only_model`): from it, `Trainer` would go on with a
    fresh optimizer, schedule and random state, and say nothing.
    """
    found = [path.parent for path in directory.glob("checkpoint-*/trainer_state.json") if _is_whole(path)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _is_whole(state: Path) -> bool:
    try:
        json.loads(state.read_text())
    except ValueError:
        return False
    return any(any(state.parent.glob(pattern)) for pattern in OPTIMIZER)
