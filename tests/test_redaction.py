"""Nothing that is a secret stays in a text that is shown, and nothing else goes."""

import pytest

from trl_offpolicy.data.redaction import redacted


@pytest.mark.parametrize(
    "secret",
    ["hf_" + "aB3" * 10, "sk-" + "proj-4f_9" * 3, "ghp_" + "x1Y2" * 9, "glpat-" + "a1B2" * 5, "AKIA" + "Z7" * 8],
)
def test_tokens_are_found_by_their_form(secret):
    for text in (
        f"Invalid token {secret}.",
        f"{{'authorization': 'Bearer {secret}'}}",
        f"https://h/x?token={secret}&y",
    ):
        assert secret not in redacted(text) and redacted(text).count("***") == 1
    assert redacted(f"Invalid token {secret}.") == "Invalid token ***."


def test_what_the_environment_and_the_caller_know(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "an-odd token")
    monkeypatch.setenv("MY_API_KEY", "an-odd token, longer")
    monkeypatch.setenv("EMPTY_PASSWORD", "")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "no-secret")
    said = redacted("'an-odd token', 'an-odd token, longer', no-secret, given", "given", None, "")
    assert said == "'***', '***', no-secret, ***"


def test_a_password_in_a_url():
    assert redacted("http://me:p@ss@node1:8000/v1 failed") == "http://***@node1:8000/v1 failed"
    assert redacted("Bearer abc.def-123, then") == "Bearer ***, then"


@pytest.mark.parametrize(
    "text",
    [
        "write me@example.org about http://h/a@b",
        "hf_transfer_is_off, sk-1, the key is 7",
        "task-specific-information-here",
        "",
        "half_precision_is_off",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redacted(text) == text
