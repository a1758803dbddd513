"""Helpers of the RLHF course: what the notebooks import once a lesson has derived it.

Modules, each importing only from those before it: `presets`, `pocket`, `data`, `validation`,
`logprobs`, `kl`, `checkpoints`, `roles`, `training`, `sft`, `rollout`, `reward`, `ppo`, `memory`,
`plots`, `checks`. Importing this package loads none of them.
"""

import logging

# bitsandbytes announces an optional kernel package at import; the course does not use it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
