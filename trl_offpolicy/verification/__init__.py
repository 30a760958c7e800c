"""
Verdicts on completions: mathematics, choices, texts, numbers with units, JSON, code, a judge. They know no models and
no stages.
"""

from .. import relocated


__getattr__ = relocated(__name__, "verification.math_verifier", "verification.verifier", "verification.worker")
