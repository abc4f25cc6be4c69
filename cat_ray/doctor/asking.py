"""Asking processes on the nodes, and what becomes of it if they don't answer."""

from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cat_ray.errors import last_line
from cat_ray.ray_errors import Kind, cause_of

# A process of Ray's that imports torch takes its time on a busy machine, and a store that is down
# longer.
NODE_SECONDS = 120.0
REASON_CHARACTERS = 200


def pinned(kind: type, node_id: str, **options: Any) -> Any:
    """A class whose actors run on this node and on no other."""
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(kind).options(scheduling_strategy=where, **options)


def gather(
    asked: Mapping[Any, Any], seconds: float = NODE_SECONDS
) -> tuple[dict[Any, Any], dict[Any, str]]:
    """The answers that come in time, and why there is none."""
    answers, reasons = {}, {}
    by_reference = {reference: key for key, reference in asked.items()}
    if not by_reference:
        return answers, reasons
    ready, late = ray.wait(list(by_reference), num_returns=len(by_reference), timeout=seconds)
    for reference in ready:
        try:
            answers[by_reference[reference]] = ray.get(reference)
        except RayError as error:
            reasons[by_reference[reference]] = reason_of(getattr(error, "cause", None) or error)
    for reference in late:
        reasons[by_reference[reference]] = f"nothing came in {seconds:g} s"
    return answers, reasons


def reason_of(error: BaseException) -> str:
    """What caused an error, cut to what a table can show."""
    cause = cause_of(error)
    told = last_line(error) if cause.kind == Kind.OTHER else cause.text
    return told[:REASON_CHARACTERS]
