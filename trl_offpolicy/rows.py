"""Moved; see [`~trl_offpolicy.relocated`]."""

from . import relocated


__getattr__ = relocated(
    __name__, "data.rows", "data.formats", "data.loading", "data.tokenization", "answers.extraction"
)
