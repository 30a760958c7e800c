"""Moved; see [`~trl_offpolicy.relocated`]."""

from . import relocated


__getattr__ = relocated(__name__, "trainer.losses")
