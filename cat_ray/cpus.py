"""How many CPUs this process may use."""


def usable_cpus() -> int:
    """CPUs that `taskset`, Slurm or a container leave to this process; a part counts as one."""
    # Not above: it takes most of a second.
    import joblib

    return joblib.cpu_count()
