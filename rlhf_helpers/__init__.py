"""Helpers of the RLHF course: what the notebooks import once a lesson has derived it.

Modules, each importing only from those before it: `presets`, `pocket`, `data`, `validation`,
`logprobs`, `kl`, `roles`, `rollout`, `plots`. Importing this package loads none of them.
"""

__version__ = "0.1.0"
