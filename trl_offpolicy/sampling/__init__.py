"""
Engines that draw completions: in this process (transformers, vLLM) or on servers. They know no mathematics and no
stages.
"""

from .sampler import Completion, Request, Sampler, SamplerError, SamplingParams


__all__ = ["Completion", "Request", "Sampler", "SamplerError", "SamplingParams"]
