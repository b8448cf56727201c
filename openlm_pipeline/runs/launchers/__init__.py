"""Ways to start the trainer of a run, each a `Job`: on this machine, under Slurm, in Kubernetes.

A launcher starts and stops processes, and says whether they are there. What training does is read from the run folder.
"""
