"""Helpers of the RLHF course: what the notebooks import once a lesson has derived it.

The core is any model and any data: `guards`, `kinds`, `validation`, `presets`, `hub`, `stats`,
`ranks`, `plots`, `notebook`, `text`, `logprobs`, `kl`, `diversity`, `files`, `data`, `base`,
`checkpoints`, `roles`, `memory`, `training`, `sft`, `reward`, `dpo`, `rollout`, `losses`, `ppo`,
`examine`, `preflight`, `clinic`, `parallel`, `trl_rewards`, `clicks_file`, `clicks_questions`,
`clicks`, `clicks_panel`, and `checks` of the exercises. `pocket` is the world that comes with the
course, one user of the core. `sources` knows both, and says which data and which gold a preset
means. Each module imports only from those before it; docs/contributors.md has the table.
Importing this package loads none of them.
"""

import logging

# bitsandbytes announces an optional kernel package at import; the course does not use it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0"
