"""`python -m openlm_pipeline` is the `openlm` command."""

from openlm_pipeline.cli.main import main

main()
