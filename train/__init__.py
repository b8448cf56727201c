"""The training program: `torchrun -m train RECIPE [key=value ...]`. It knows no Dagster."""
