"""What a student can use of what another model writes: always its text, and its tokens where they are the student's."""

import warnings

from ..sampling.sampler import Sampler


def check_teacher(name: str, teacher: Sampler, student: Sampler, log_probs: bool) -> None:
    """
    Says what rows of this teacher will lack.

    Raises:
        ValueError: Its log-probs are wanted, and they are of other tokens than the student's.
    """
    if same_tokens(teacher, student):
        return
    why = "does not say which tokens it writes" if teacher.processing_class is None else "has another tokenizer"
    if log_probs:
        raise ValueError(
            f"You passed teacher_log_probs=True, but the teacher {name!r} ({teacher.name}) {why}, so its log-probs are of other tokens than "
            "those that the student is trained on. Leave it out: its texts are enough, and expert_weighting says what their tokens weigh."
        )
    warnings.warn(
        f"The teacher {name!r} ({teacher.name}) {why}: rows carry its text alone, without completion_ids and behavior_log_probs, so their "
        "tokens have no importance weights (expert_weighting says what they weigh).",
        stacklevel=3,
    )


def same_tokens(teacher: Sampler, student: Sampler) -> bool:
    """Whether a teacher's token ids mean the same to the student, and end a turn there."""
    ours, theirs = student.processing_class, teacher.processing_class
    if ours is None or theirs is None:
        return False
    return ours is theirs or (
        ours.get_vocab() == theirs.get_vocab() and set(student.stop_token_ids) == set(teacher.stop_token_ids)
    )
