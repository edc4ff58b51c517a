"""Parallel work with joblib, on this machine or on a cluster."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import joblib

from matfact._text import extra


@contextmanager
def results(n_jobs: int | None, calls: Sequence[Any]) -> Iterator[Iterator[Any]]:
    """Run calls in parallel and yield results as they arrive (with Ray, all at the end).

    An error or a signal that ends the block early stops the workers before it is raised.

    Parameters
    ----------
    n_jobs : int or None
        Number of parallel calls, as in joblib.
    calls : sequence
        Calls made by ``joblib.delayed``.
    """
    if n_jobs is not None and n_jobs > len(calls):
        n_jobs = max(1, len(calls))  # joblib would start all of them
    try:
        parallel = joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered", batch_size=1)
    except ValueError:
        parallel = joblib.Parallel(n_jobs=n_jobs, batch_size=1)
    arriving = iter(parallel(calls))
    try:
        yield arriving
    except BaseException as error:
        if isinstance(arriving, Generator):
            arriving.throw(error)  # closing it would make joblib warn of lost work
        raise


@contextmanager
def on_cluster(scheduler: str | None) -> Iterator[None]:
    """Run parallel work on the Dask cluster of `scheduler`, or locally if it is None.

    Parameters
    ----------
    scheduler : str or None
        Address of the scheduler, such as ``tcp://scheduler:8786``.

    Raises
    ------
    ImportError
        If Dask is not installed.
    OSError
        If no scheduler answers at the address.
    """
    if scheduler is None:
        yield
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError(
            f"A cluster needs Dask, here and on all workers: {extra('distributed')}."
        ) from error
    # On a busy machine, workers may take longer to start than the 10 s that joblib waits.
    pool = {"backend": "dask", "wait_for_workers_timeout": 60}
    with Client(scheduler) as client, joblib.parallel_config(client=client, **pool):
        yield
