"""The exercise checks: each runs the learner's function and names the likely mistake."""

from rlhf_helpers.checks.lesson_01 import (
    check_lora_forward,
    check_lora_parameters,
    check_mask_prompt,
    check_nf4_bytes,
)

__all__ = [
    "check_lora_forward",
    "check_lora_parameters",
    "check_mask_prompt",
    "check_nf4_bytes",
]
