"""The distributed half of preparing: every case that the shared store does not hold yet, as Ray tasks."""

from concurrent.futures import ThreadPoolExecutor

import ray

from segcloud import storage
from segcloud.config import Config
from segcloud.data.cases import Case, Verdict
from segcloud.data.nifti import BadScan
from segcloud.data.prepared import PreparedRef, PreparedStore, key
from segcloud.errors import SegcloudError, describe_failure
from segcloud.progress import Progress

STAT_THREADS = 16


def prepared_uri(config: Config) -> str:
    """``prepare.uri``, or the folder ``prepared`` beside the run, so that runs under one parent share it."""
    return config.prepare.uri or storage.join(storage.parent(config.run.uri), "prepared")


def prepare_cases(cases: list[Case], config: Config) -> tuple[list[PreparedRef], list[Verdict], int]:
    """Make what is missing, in parallel over the cluster.

    Returns:
        refs of all usable cases in the order of `cases`, a verdict for each other case, and the number of
        volumes made (the rest was there already).

    Raises:
        StorageError: the store cannot be listed or written, or a source not be reached at all.
    """
    store = PreparedStore(prepared_uri(config), config.prepare)
    have = store.existing()
    refs: dict[str, PreparedRef] = {}
    verdicts: dict[str, Verdict] = {}
    missing: list[tuple[Case, str]] = []
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        for case, found in zip(cases, pool.map(lambda c: _identify(c, config), cases), strict=True):
            if isinstance(found, Verdict):
                verdicts[case.id] = found
            elif found in have:
                refs[case.id] = PreparedRef(case, storage.join(store.uri, found), have[found])
            else:
                missing.append((case, found))
    if missing:
        _make(missing, store, config, refs, verdicts)
    order = [case.id for case in cases]
    return (
        [refs[i] for i in order if i in refs],
        [verdicts[i] for i in order if i in verdicts],
        sum(case.id in refs for case, _ in missing),
    )


def _identify(case: Case, config: Config) -> str | Verdict:
    assert case.label  # noqa: S101 - for the type checker
    infos = []
    for uri in (case.image, case.label):
        info = storage.stat(uri)
        if info is None:
            return Verdict(
                case.id, "missing_file", "the file is not there; correct the datalist or upload it", uri
            )
        infos.append(info)
    return key(case, *infos, config)


def _make(
    missing: list[tuple[Case, str]],
    store: PreparedStore,
    config: Config,
    refs: dict[str, PreparedRef],
    verdicts: dict[str, Verdict],
) -> None:
    todo = list(reversed(missing))
    running: dict[ray.ObjectRef, Case] = {}
    # a volume in float32 and its resampled copies fill gigabytes: no more tasks at a time than CPUs
    limit = max(1, int(ray.cluster_resources().get("CPU", 1)))
    with Progress("prepare", len(missing), "case") as progress:
        while todo or running:
            while todo and len(running) < limit:
                case, name = todo.pop()
                running[_publish.remote(store, case, name, config.to_dict())] = case
            (done,), _ = ray.wait(list(running), num_returns=1)
            case = running.pop(done)
            result = _result(done, case)
            if isinstance(result, Verdict):
                verdicts[case.id] = result
                progress.line(result.line())
            else:
                refs[case.id] = result
            progress.advance(note=case.id)


def _result(done: ray.ObjectRef, case: Case) -> PreparedRef | Verdict:
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # a SegcloudError of the store: nothing that leaving the case out would mend
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        message = f"preparing it killed its worker ({type(error).__name__}); give the nodes more memory"
        return Verdict(case.id, "worker_died", message, case.image)


@ray.remote(num_cpus=1, max_retries=2)
def _publish(store: PreparedStore, case: Case, name: str, config: dict) -> PreparedRef | Verdict:
    import torch

    torch.set_num_threads(1)  # the parallelism is over cases
    try:
        return store.publish(case, name, Config.model_validate(config))
    except BadScan as bad:
        of_label = bad.code.startswith(("label", "empty_label", "grid"))
        return Verdict(case.id, bad.code, bad.message, (case.label if of_label else None) or case.image)
    except SegcloudError:
        raise
    except Exception as error:  # a bug or lack of memory on one case must not hide the verdicts of the others
        return Verdict(case.id, "failed", describe_failure(error), case.image)
