"""A finding: what one check has found, and what to do about it."""

from dataclasses import dataclass
from typing import Literal

from cat_ray.doctor.facts import Facts, Node, NodeFacts

Verdict = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One check: what was found, and what to do if it is not right."""

    check: str
    verdict: Verdict
    found: str
    advice: str = ""


def answering(facts: Facts) -> list[tuple[Node, NodeFacts]]:
    """The nodes that answered, and what they said."""
    return [(node, node.facts) for node in facts.nodes if node.facts is not None]
