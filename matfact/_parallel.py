"""Work handed out by joblib: to processes of this machine, or to a cluster."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import joblib


@contextmanager
def results(n_jobs: int | None, calls: Sequence[Any]) -> Iterator[Iterator[Any]]:
    """Hand out calls, and give what they return as it arrives, or at the end where it cannot (Ray).

    Whatever ends the block early, an error or a signal, ends the workers before it is raised.

    Parameters
    ----------
    n_jobs : int or None
        Calls at a time, as joblib counts them.
    calls : sequence
        What ``joblib.delayed`` makes.
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
            arriving.throw(error)  # were it closed, joblib would warn of work that is lost
        raise


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
    # Workers of a busy machine take longer to appear than the 10 s that joblib waits.
    pool = {"backend": "dask", "wait_for_workers_timeout": 60}
    with Client(scheduler) as client, joblib.parallel_config(client=client, **pool):
        yield
