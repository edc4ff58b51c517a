"""Work handed out by joblib: to processes of this machine, or to a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import joblib


def pool(n_jobs: int | None, n_tasks: int) -> joblib.Parallel:
    """Return a pool that yields results as they arrive, or at the end where it cannot (Ray)."""
    if n_jobs is not None and n_jobs > n_tasks:
        n_jobs = max(1, n_tasks)  # joblib would start all of them
    try:
        return joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered", batch_size=1)
    except ValueError:
        return joblib.Parallel(n_jobs=n_jobs, batch_size=1)


@contextmanager
def on_cluster(scheduler: str | None) -> Iterator[None]:
    """Let pools hand their work to the Dask cluster with a scheduler, here if that is None.

    Parameters
    ----------
    scheduler : str or None
        Its address, such as ``tcp://scheduler:8786``.

    Raises
    ------
    ImportError
        If Dask is not installed.
    OSError
        If there is no scheduler at the address.
    """
    if scheduler is None:
        yield
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError(
            "A cluster needs Dask: pip install 'matfact[distributed]', here and on all workers."
        ) from error
    with Client(scheduler) as client, joblib.parallel_config("dask", client=client):
        yield
