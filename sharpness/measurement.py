"""A checkpoint and a data set in, one measurement record out."""

from __future__ import annotations

import copy
import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from sharpness._arguments import ensure, explained, package
from sharpness._ranks import ALONE, Ranks
from sharpness._results import Reading, Status
from sharpness.loading import LoadedCheckpoint, as_type
from sharpness.measures.settings import MeasurementSettings
from sharpness.measures.summary import Summary, selected, summary
from sharpness.record import new_record
from sharpness.risk import batches
from sharpness.risk.batches import Pair
from sharpness.risk.doctor import Checkup, doctor
from sharpness.risk.empirical import BATCHNORM_BATCH, EmpiricalRisk
from sharpness.risk.model_state import batchnorm_layers, random_generators_kept

_MOST_TEST_SAMPLES = 10_000  # for the generalisation gap


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The results for one checkpoint, and the record that keeps them."""

    summary: Summary
    record: dict[str, Any]
    checkup: Checkup | None = None

    @property
    def interrupted(self) -> bool:
        """Whether a Ctrl-C has cut it short."""
        return self.summary.status is Status.INTERRUPTED

    @property
    def ok(self) -> bool:
        """Whether everything ended as asked for."""
        return self.summary.status.ok and (self.checkup is None or self.checkup.ok)


def risk_of(
    subject: LoadedCheckpoint,
    settings: MeasurementSettings,
    device: str = "cpu",
    ranks: Ranks = ALONE,
) -> EmpiricalRisk:
    """The mean loss of a checkpoint's network on the chosen samples.

    Of several processes each takes its own part of them.
    """
    return _risk(subject, settings, settings.split, settings.num_samples, device, ranks)


def measured(
    subject: LoadedCheckpoint,
    settings: MeasurementSettings,
    *,
    device: str = "cpu",
    progress: bool | None = None,
    on_estimate: Callable[[float], None] | None = None,
    on_begin: Callable[[dict[str, Any]], None] | None = None,
    on_readings: Callable[[list[Reading]], None] | None = None,
    ranks: Ranks = ALONE,
    resume: str | Path | None = None,
) -> Measurement:
    """Measure a checkpoint.

    Args:
        subject: the checkpoint with its network, data and loss.
        settings: what is measured, and on what.
        device: where to compute.
        progress: show a bar with the expected time; by default on a terminal.
        on_estimate: called with the expected seconds before anything is measured.
        on_begin: called before that with the part of the record that is known by then.
        on_readings: called with the numbers of each measure as soon as it is done.
        ranks: the processes that measure together; each makes the same call.
        resume: a folder to keep the search for eigenpairs in, as in `eigenpairs`.

    Raises:
        ValueError: f(theta) is not finite, or a setting is out of range.
    """
    selected(settings.measures)  # before any work
    got = f"{subject.data['name']} and {subject.path}"
    kinds = (RuntimeError, IndexError)  # a class number out of range, say
    with (
        _of_the_flag(subject),
        explained("--data", "fit the network and the loss", got, kinds=kinds),
    ):
        risk = risk_of(subject, settings, device, ranks)
        value, share = risk.value_and_accuracy()
    ensure(
        math.isfinite(value),
        subject.path,
        "give a finite loss",
        f"f(theta) = {value}",
        "Its parameters or the data hold NaN or infinite values.",
    )
    checkup = doctor(risk) if settings.doctor else None
    there = len(subject.targets(settings.split))
    accuracy = share if risk.is_classification else None
    known = {
        "checkpoint": subject.facts,
        "data": data_facts(subject, settings),
        "num_there": there,  # samples, of which those measured may be a part
        "settings": {**asdict(settings), "risk": risk.settings()},
        "value": value,
        "accuracy": accuracy,
        "doctor": checkup,
        "generalisation": _generalisation(
            subject, settings, value, accuracy, device, ranks
        ),
    }

    def begin(seconds: float) -> None:  # once `summary` has refused what is wrong
        if on_begin is not None:
            on_begin(known)
        if on_estimate is not None:
            on_estimate(seconds)

    fits = subject.start is not None and subject.start.shape == risk.theta.shape
    found = summary(
        risk,
        settings.measures,
        start=subject.start if fits else None,
        training=subject.facts["training"],
        progress=progress,
        on_estimate=begin,
        on_readings=on_readings,
        resume=resume,
        **vars(settings.of_measures),
    )
    notes = (*found.notes, *_of_other_samples(risk.num_samples, there))
    found = replace(found, notes=notes)
    known["settings"] = {**asdict(settings), "risk": risk.settings()}  # with the engine
    record = new_record(
        "measurement",
        **known,
        status=str(found.status),
        notes=found.notes,
        measures=found.results,
        cost=found.cost,
    )
    return Measurement(summary=found, record=record, checkup=checkup)


def _of_other_samples(measured: int, there: int) -> Iterator[str]:
    if measured < there:
        yield (
            f"{measured} of {there} samples were measured. Others may give other numbers, "
            "beyond the error bounds: --num-samples all, or --measures lambda_max_sampling."
        )


@contextmanager
def _of_the_flag(subject: LoadedCheckpoint) -> Iterator[None]:
    """A line about `data` names what stood behind `--data`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        flag = f"`--data {subject.data['name']}`"
        raise type(error)(str(error).replace("`data`", flag, 1)) from error


def data_facts(subject: LoadedCheckpoint, settings: MeasurementSettings) -> dict[str, Any]:
    """What a record says of the data: name, split, loss, and a digest of the samples."""
    pair = subject.samples(settings.split, settings.num_samples, settings.seed)
    digest = hashlib.sha256()
    for leaf in tree_leaves(pair):
        digest.update(repr((tuple(leaf.shape), leaf.dtype)).encode())
        digest.update(leaf.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {**subject.data, "split": settings.split, "samples": digest.hexdigest()}


def _generalisation(
    subject: LoadedCheckpoint,
    settings: MeasurementSettings,
    value: float,
    accuracy: float | None,
    device: str,
    ranks: Ranks,
) -> dict[str, Any] | None:
    """Loss and accuracy on test samples, and how much worse they are."""
    if "test" not in subject.parts or settings.split == "test":
        return None
    num = None if len(subject.targets("test")) <= _MOST_TEST_SAMPLES else _MOST_TEST_SAMPLES
    risk = _risk(subject, settings, "test", num, device, ranks)
    loss, on_test = risk.value_and_accuracy()
    facts: dict[str, Any] = {"test_loss": loss, "loss_gap": loss - value}
    if accuracy is not None:
        facts |= {"test_accuracy": on_test, "accuracy_gap": accuracy - on_test}
    return facts


def _risk(
    subject: LoadedCheckpoint,
    settings: MeasurementSettings,
    split: str,
    num: int | None,
    device: str,
    ranks: Ranks,
) -> EmpiricalRisk:
    pair = subject.samples(split, num, settings.seed, balanced=split == settings.split)
    if ranks.size > 1:
        in_parts = settings.batchnorm == "batch" and bool(batchnorm_layers(subject.model))
        pair = _own_part(pair, ranks, BATCHNORM_BATCH if in_parts else 1)
    model, dtype = subject.model, subject.dtype
    if settings.dtype is not None:
        dtype = getattr(torch, settings.dtype)
        model = copy.deepcopy(model).to(dtype)
    return EmpiricalRisk(
        model,
        subject.loss,
        as_type(pair, dtype),
        params=settings.params,
        batchnorm=settings.batchnorm,
        device=device,
        engine=settings.engine,
        process_group=ranks,
    )


def _own_part(pair: Pair, ranks: Ranks, most: int) -> Pair:
    """A process's samples: near-equal shares of units of up to `most`, which stay whole."""
    num = len(pair[1])
    sizes = [len(part[1]) for part in batches.cut(pair, most)] if most > 1 else [1] * num
    batches_stay = "BatchNorm's batches stay whole: pass --batchnorm running."
    ensure(
        len(sizes) >= ranks.size,
        "--nproc-per-node",
        f"be at most {len(sizes)} for these samples",
        f"{ranks.size} processes",
        batches_stay if most > 1 else "Each process needs a sample.",
    )
    ends = [0, *accumulate(sizes)]
    first, last = (len(sizes) * (ranks.rank + i) // ranks.size for i in (0, 1))
    return batches.rows(pair, ends[first], ends[last])


# -- a second opinion -------------------------------------------------------------------


def check_possible(batchnorm: str) -> None:
    """Refuse early what PyHessian cannot do.

    Raises:
        ValueError: it is not installed, or BatchNorm is not on running statistics.
    """
    sound, got = batchnorm == "running", f"{batchnorm!r}, which PyHessian cannot do"
    ensure(sound, "--cross-check", "go with --batchnorm running", got)
    package("pyhessian", "pyhessian")


def pyhessian_readings(
    risk: EmpiricalRisk, *, max_iter: int = 200, seed: int = 0
) -> list[Reading]:
    """lambda_max by PyHessian's power iteration, to a relative change of 1e-4.

    It has no error bound and finds the eigenvalue of largest modulus, whatever its
    sign. It gets all samples as one batch, since it weights chunks by their number.

    Raises:
        ValueError: it fails on this network or data, or the loss is no plain mean.
    """
    began = time.monotonic()
    averages = getattr(risk.loss, "reduction", None) == "mean"
    got = f"{type(risk.loss).__name__}, which PyHessian would scale otherwise"
    ensure(averages, "--cross-check", "have a loss that averages", got)
    network = risk.network()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in set(risk.names))
    advice = "It was written for plain classifiers: leave it out for this network."
    with (
        explained("--cross-check", "run PyHessian", "an error from it", advice),
        warnings.catch_warnings(),
        random_generators_kept(seed),
    ):
        warnings.simplefilter("ignore")  # it backpropagates with create_graph=True
        on_gpu = risk.device.type == "cuda"
        hessian = package("pyhessian", "pyhessian").hessian
        peer = hessian(network, risk.loss, data=risk.full_batch(), cuda=on_gpu)
        values, _ = peer.eigenvalues(maxIter=max_iter, tol=1e-4, top_n=1)
    return [
        Reading(
            name="lambda_max (PyHessian)",
            value=float(values[0]),
            error=None,
            evidence="power iteration, no bound",
            cost=f"{time.monotonic() - began:.1f} s",
        )
    ]
