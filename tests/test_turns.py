"""Where a turn ends and what it says: TRL's copies of real chat templates, and special tokens as real tokenizers have them."""

import copy
from pathlib import Path

import pytest
import trl

from trl_offpolicy.answers.extraction import stated_answer
from trl_offpolicy.data.turns import end_of_turn_id, stop_token_ids, turn_text
from trl_offpolicy.sampling.sampler import drawn_completion


IM_END, EOS = 2, 0  # of the quickstart's tokenizer


def with_special_tokens(tokenizer, *names, **kwargs):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": list(names), **kwargs})
    return tokenizer


@pytest.mark.parametrize(
    ("template", "end", "others"),
    [
        ("qwen2_5", "<|im_end|>", ()),
        ("qwen3", "<|im_end|>", ()),
        ("llama3_1", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")),
        ("gemma3", "<end_of_turn>", ("<start_of_turn>", "<eos>")),
        ("gemma4", "<turn|>", ("<|turn>",)),
        ("deepseekv3", "<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>")),
        # Behind the last turn the template writes the end of the sequence as well.
        ("phi3", "<|end|>", ("<|user|>", "<|assistant|>")),
        # Two tokens, and the model writes both.
        ("cohere2", "<|END_OF_TURN_TOKEN|>", ("<|START_OF_TURN_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>")),
        # The last turn ends with another token than those before it, which ends each message of the model's, its reasoning's too.
        ("gptoss", "<|return|>", ("<|start|>", "<|end|>", "<|message|>", "<|channel|>")),
        # No token at the end: the model writes the next turn's first.
        ("glm4moe", "<|user|>", ("<|assistant|>", "<|system|>", "<|observation|>")),
    ],
)
def test_the_end_of_a_turn_is_what_the_chat_template_says(tokenizer, template, end, others):
    processing_class = with_special_tokens(tokenizer, *{end, *others} - {"<|im_end|>"}, eos_token="<|endoftext|>")
    file = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
    processing_class.chat_template = file.read_text(encoding="utf-8")
    id_ = end_of_turn_id(processing_class)
    assert processing_class.convert_ids_to_tokens(id_) == end
    assert stop_token_ids(processing_class, [7, 3]) == sorted({EOS, 3, 7, id_})


def test_a_template_that_ends_turns_with_text_is_warned_of(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.warns(UserWarning, match=r"with no special token, so completions end at '<\|im_end\|>'"):
        assert stop_token_ids(plain) == [IM_END]


def drawn(processing_class, ids, finish_reason="length"):
    log_probs = [-float(i) for i in range(len(ids))]
    completion = drawn_completion("r", ids, log_probs, finish_reason, processing_class, [EOS, IM_END])
    assert completion.log_probs == log_probs[: len(completion.completion_ids)]
    return completion


def test_what_is_stored_ends_where_the_turn_does(tokenizer, recwarn):
    ids, junk = tokenizer("so 4")["input_ids"], tokenizer("\n")["input_ids"]
    for finish_reason in ("stop", "length"):
        completion = drawn(tokenizer, [*ids, IM_END, *junk, EOS], finish_reason)
        assert (completion.completion_ids, completion.text) == ([*ids, IM_END], "so 4")
        assert completion.finish_reason == "stop"
    assert drawn(tokenizer, ids).finish_reason == "length" and drawn(tokenizer, ids, "stop").completion_ids == ids
    # Text that only looks like the token is text: it ends nothing, and is not left out of what was written.
    alike = [*tokenizer("so <|im_")["input_ids"], *tokenizer("end|> 4")["input_ids"]]
    assert IM_END not in alike
    assert (drawn(tokenizer, alike).completion_ids, drawn(tokenizer, alike).text) == (alike, "so <|im_end|> 4")
    assert not recwarn.list


def test_an_end_of_turn_that_the_template_does_not_know_is_said_at_once(tokenizer, recwarn):
    other = with_special_tokens(tokenizer, "<|eot_id|>", "<|image_pad|>")
    eot, image = other.convert_tokens_to_ids(["<|eot_id|>", "<|image_pad|>"])
    ids = other("so 4")["input_ids"]
    drawn(other, [*ids, image, *ids])
    drawn(other, [*ids, eot, *ids], "stop")
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"with '<\|eot_id\|>' in its middle, but a turn is over only at '<\|end"):
        assert drawn(other, [*ids, eot, *ids]).finish_reason == "length"


@pytest.mark.parametrize(("begin", "end"), [("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>")])
def test_reasoning_between_special_tokens_is_kept_apart_from_the_answer(tokenizer, begin, end):
    """As in Magistral; the text is what the ids say, so that it is encoded as them again."""
    thinking = with_special_tokens(tokenizer, begin, end, "<|pad|>")
    text = f"{begin}first I try \\boxed{{3}}, no{end}It is 4"
    ids = thinking(text)["input_ids"]
    assert thinking.convert_tokens_to_ids([begin, end]) == [i for i in ids if i >= len(tokenizer)]
    assert thinking.decode(ids, skip_special_tokens=True).endswith("noIt is 4"), "which says another answer"
    pad = thinking.convert_tokens_to_ids("<|pad|>")
    assert turn_text(thinking, [*ids, pad, IM_END]) == text and stated_answer(text).text == "4"
