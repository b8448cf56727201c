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
    if not _is_ours():
        return
    for i in range(1, len(sys.argv) - 1):
        if sys.argv[i] in ("-m", "--module") and sys.argv[i + 1] == "train":
            arguments = sys.argv[i + 2 :]
            if "--" not in arguments and any(a.partition("=")[0] == _AMBIGUOUS for a in arguments):
                sys.argv.insert(i + 2, "--")
            return


def _is_ours() -> bool:
    """Whether `-m train` finds our program, and not another's of that name, whose arguments are none of ours."""
    for place in (Path.cwd(), *(Path(p) for p in sys.path if p)):
        if (place / "train.py").is_file() or (place / "train" / "__init__.py").is_file():
            return (place / "train" / "openlm" / "flags.py").is_file()
    return False
