"""Lets `torchrun ... -m train --logs DIR` through torchrun's own parser.

torchrun takes an option of the script for a short form of one of its own, also after `-m train`, and ends at `--logs`,
which could be `--logs-specs` or `--logs_specs`. torch calls what is registered as `torch.backends` on being imported,
and so before torchrun parses its command line; there is no other hook before that.
"""

import sys
from pathlib import Path

_AMBIGUOUS = "--logs"


def protect_script_flags() -> None:
    """Put `--` before the arguments of `train` where torchrun would refuse them; change nothing in other programs."""
    before = sys.orig_argv[: -len(sys.argv[1:]) or None]
    if Path(sys.argv[0]).name != "torchrun" and "torch.distributed.run" not in before:
        return
    if not Path("train", "openlm", "flags.py").is_file():  # another's `train`, whose arguments are none of ours
        return
    for i in range(1, len(sys.argv) - 1):
        if sys.argv[i] in ("-m", "--module") and sys.argv[i + 1] == "train":
            arguments = sys.argv[i + 2 :]
            if "--" not in arguments and any(a.partition("=")[0] == _AMBIGUOUS for a in arguments):
                sys.argv.insert(i + 2, "--")
            return
