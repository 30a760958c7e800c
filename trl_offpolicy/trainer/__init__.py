"""
Drop-in replacements for `SFTTrainer`: configs, collator, token weights, log-probs. Reads columns and knows nothing of
rewriting.
"""

import warnings
from importlib.metadata import version


TESTED_TRL = (
    "1.16",
)  # minor versions; the trainers override private methods of TRL's, which another one may have changed


def warn_of_untested_trl(installed: str) -> None:
    """Warns if TRL's version `installed` is not of one of the minor versions with which the trainers were tested."""
    if ".".join(installed.split(".")[:2]) not in TESTED_TRL:
        warnings.warn(
            f"trl_offpolicy's trainers were tested with TRL {' and '.join(TESTED_TRL)}, and TRL {installed} is installed. They override private methods of "
            f"SFTTrainer, which may have changed: pip install 'trl=={TESTED_TRL[-1]}.*', or check the first losses against SFTTrainer's.",
            stacklevel=2,
        )


warn_of_untested_trl(version("trl"))
