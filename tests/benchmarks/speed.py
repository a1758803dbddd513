"""All benchmarks in one run, one after another: the table of docs/speed.md comes from this.

python tests/benchmarks/speed.py [PYTHON_WITH_TRL_1_12]

Run it on a quiet machine; each script may be run by itself, and says what it measures.
"""

import datetime
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    machine = f"{platform.system()} on {platform.machine()}, Python {platform.python_version()}"
    print(f"{machine}, {datetime.date.today()}")
    scripts = [
        ("ppo_update.py", "--updates", "4", "--rounds", "3", *sys.argv[1:]),
        ("ppo_update.py", "--updates", "4", "--work", "random", "--profile", *sys.argv[1:]),
        ("logprobs.py",),
        ("rollout.py",),
        ("gae.py",),
        ("imports.py",),
    ]
    for name, *arguments in scripts:
        print(f"\n== {name} ==", flush=True)
        subprocess.run([sys.executable, HERE / name, *arguments], check=True)


if __name__ == "__main__":
    main()
