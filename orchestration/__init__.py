"""The graph as Dagster sees it: definitions, jobs, and running a job in this process."""
