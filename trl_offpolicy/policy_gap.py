"""How far a dataset is from a policy: the log-probability of its targets, by source, before and after rewriting.

"Mind the Gap", Table 3, reports the mean over rows of Σ_t log π(y_t|x, y_<t): that is `sequence_log_prob` here. It favours
short targets, so the mean per token and the length stand beside it, and the prompt is rendered as in training.
"""

import torch
from trl.data_utils import common_prefix_length

from .rows import Source, demonstration, encode_prompt
from .scoring import target_log_probs


def measure_policy_gap(model, dataset, processing_class=None, batch_tokens: int = 8192) -> dict:
    """
    The policy gap of a rewritten dataset under `model`.

    Args:
        model (`str` or `PreTrainedModel`): Usually the model that will be trained, before training.
        dataset (`datasets.Dataset` or `list[dict]`): Rows written by `DataRewriter`.
        processing_class (`PreTrainedTokenizerBase`, *optional*): By default the model's.
        batch_tokens (`int`, *optional*, defaults to `8192`): Tokens of one forward, padding included.

    Returns:
        `dict`: `{source: {"rows", "before", "after"}}` for each source there is and for `"total"`. `before` (the demonstrations) and
        `after` (the rows' completions) hold `sequence_log_prob` (mean over rows of the sum, nats) with its standard error
        `sequence_log_prob_se`, `token_log_prob` (mean over all tokens) and `num_tokens` (mean length).

    Raises:
        ValueError: The dataset is empty, or its demonstrations were not carried through.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if isinstance(model, str):
        processing_class = processing_class or AutoTokenizer.from_pretrained(model)
        model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    processing_class = processing_class or AutoTokenizer.from_pretrained(model.config._name_or_path)
    rows = list(dataset)
    if not rows:
        raise ValueError("The dataset has no rows: there is no gap to measure.")
    pairs, before, after = [], [], []  # what to score, and for each row its places there
    for row in rows:
        expert = demonstration(row)
        if expert is None:
            raise ValueError(
                f"Row {row.get('id')} does not carry its demonstration; pass the dataset as DataRewriter wrote it. Its columns: {list(row)}"
            )
        prompt = encode_prompt(processing_class, row["prompt"])
        pairs.append((prompt, _target_ids(processing_class, row["prompt"], expert, prompt)))
        before.append(len(pairs) - 1)
        if row["completion_ids"]:
            pairs.append((prompt, row["completion_ids"]))
        after.append(len(pairs) - 1)  # an expert's row is its demonstration, scored once
    log_probs = target_log_probs(model, pairs, batch_tokens)
    groups = {str(source): [i for i, row in enumerate(rows) if row["source"] == source] for source in Source}
    groups["total"] = list(range(len(rows)))
    return {
        name: {
            "rows": len(members),
            "before": _summary([log_probs[before[i]] for i in members]),
            "after": _summary([log_probs[after[i]] for i in members]),
        }
        for name, members in groups.items()
        if members
    }


def _target_ids(processing_class, prompt: list[dict], text: str, prompt_ids: list[int]) -> list[int]:
    """What the chat template makes of an assistant turn after the prompt, end-of-turn token included."""
    whole = processing_class.apply_chat_template(
        [*prompt, {"role": "assistant", "content": text}], tokenize=True, return_dict=True
    )["input_ids"]
    return whole[common_prefix_length(prompt_ids, whole) :]  # where TRL says that the completion starts


def _summary(log_probs: list[torch.Tensor]) -> dict:
    sums = torch.stack([x.double().sum() for x in log_probs])
    tokens = sum(len(x) for x in log_probs)
    error = (sums.std() / len(sums) ** 0.5).item() if len(sums) > 1 else 0.0
    return {
        "sequence_log_prob": sums.mean().item(),
        "sequence_log_prob_se": error,
        "token_log_prob": sums.sum().item() / tokens,
        "num_tokens": tokens / len(log_probs),
    }
