"""`torchrun -m train RECIPE [key=value ...] [--until TOKENS]`: train a recipe's run on the shards that are there.

With OpenLM's flags (`torchrun -m train --model open_lm_1b --train-data ...`) the run is what they stand for; `--allow`
stands behind the first of them.
"""

import argparse
import gc
import os
import sys

from openlm_pipeline.errors import OpenLMError, disk_trouble
from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.result import CONSENTS, parse_allow
from openlm_pipeline.storage.home import Home
from openlm_pipeline.units import parse_tokens
from train.signals import die_with_parent

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Variables that torch reads as it first allocates on a GPU."""
_RECIPE_FLAGS = ("--until", "--steps", "--allow", "--supersede")


def _recipe_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="torchrun -m train", description=__doc__)
    parser.add_argument("recipe", help="a recipe's name (`openlm recipes` lists them) or YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.lr=1e-3 or milestones=[1M]")
    parser.add_argument("--until", type=parse_tokens, help="stop after this many tokens; by default the last milestone")
    parser.add_argument("--steps", type=int, help="as --until, in steps")
    parser.add_argument(
        "--allow", action="append", metavar="NAME", help=f"what is otherwise refused: {', '.join(CONSENTS)}"
    )
    parser.add_argument("--supersede", dest="allow", action="append_const", const="supersede", help=argparse.SUPPRESS)
    return parser


def _train_recipe(argv: list[str]) -> None:
    arguments = _recipe_parser().parse_intermixed_args(argv)
    experiment = load_experiment(arguments.recipe, arguments.overrides)
    from train.run import run_training

    until = experiment.limit(arguments.until, arguments.steps)
    run_training(experiment, Home.from_env(), until, allow=parse_allow(arguments.allow))


def _train_openlm(argv: list[str]) -> None:
    from train.openlm.run import train_openlm

    consents = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    consents.add_argument("--allow", action="append")
    arguments, flags = consents.parse_known_args(argv)
    train_openlm(flags, parse_allow(arguments.allow))


def _print_help() -> None:
    from train.openlm.parser import make_parser

    _recipe_parser().print_help()
    print()
    make_parser().print_help()


def main() -> int:
    die_with_parent()  # before torch is imported, which takes seconds in which torchrun could be killed
    if not any(name in os.environ for name in _ALLOCATOR):  # pieces of memory too small for the next tensor are joined
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    argv = sys.argv[1:]
    if argv[:1] == ["--"]:  # what keeps torchrun from taking our flags for its own
        argv = argv[1:]
    if argv in (["-h"], ["--help"]):
        _print_help()
        return 0
    is_openlm = argv[:1] and argv[0].startswith("--") and argv[0].partition("=")[0] not in _RECIPE_FLAGS
    try:
        try:
            (_train_openlm if is_openlm else _train_recipe)(argv)
        finally:
            if "train.distributed" in sys.modules:
                from train.distributed import leave_process_group

                leave_process_group()
            gc.freeze()  # or the interpreter looks through all of torch for cycles as it ends, a second or two
    except OpenLMError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except OSError as e:
        if (said := disk_trouble(e)) is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return OpenLMError.exit_code
    except KeyboardInterrupt:  # from the loop's beginning on it asks for a checkpoint
        print("stopped before the first step: nothing was trained", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
