"""`torchrun -m train RECIPE [key=value ...] [--until TOKENS]`: train a recipe's run on the shards that are there."""

import argparse
import sys

from openlm_pipeline.errors import OpenLMError
from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.layout import Home
from openlm_pipeline.units import parse_tokens
from train.signals import die_with_parent


def main() -> int:
    die_with_parent()  # before torch is imported, which takes seconds in which torchrun could be killed
    parser = argparse.ArgumentParser(prog="torchrun -m train", description=__doc__)
    parser.add_argument("recipe", help="a recipe's name (`openlm recipes` lists them) or YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.lr=1e-3 or milestones=[1M]")
    parser.add_argument("--until", type=parse_tokens, help="stop after this many tokens; by default the last milestone")
    parser.add_argument("--supersede", action="store_true", help="set another run in the same folder aside")
    arguments = parser.parse_intermixed_args()
    try:
        experiment = load_experiment(arguments.recipe, arguments.overrides)
        from train.distributed import leave_process_group
        from train.loop import run_training

        until = arguments.until or experiment.milestones[-1]
        try:
            run_training(experiment, Home.from_env(), until, supersede=arguments.supersede)
        finally:
            leave_process_group()
    except OpenLMError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
