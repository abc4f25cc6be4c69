"""When the proxy misbehaves and how, and what a request is about: pure functions."""

import random
import re
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

# `killed` is done by whoever owns the server; the proxy then meets nobody.
FAULTS = (
    "gone",
    "killed",
    "slow",
    "500",
    "503",
    "409",
    "cut answer",
    "cut head",
    "cut request",
    "silent",
)
CHECKPOINT = re.compile(r"/checkpoints/[^/]+/(?P<file>[^/]+)$")
KINDS = (
    ("shard", r"\.tar$"),
    ("index", r"/(index\.json|[^/]*extents[^/]*)$"),
    ("journal", r"/(metrics|measured)\.jsonl$"),
    ("ledger", r"/ledger/"),
    ("grid", r"/grids/"),
    ("tensorboard", r"/tensorboard/"),
    ("samples", r"/samples/"),
    ("lease", r"/(\.lock|lease)-[^/]*\.json$"),
    ("outcome", r"/outcome\.json$"),
    ("stop", r"/stop$"),
    ("identity", r"/(config\.resolved\.yaml|data\.sha256)$"),
    ("report", r"/report\.html$"),
    ("ray", r"/ray(/|$)"),
)


@dataclass(frozen=True)
class Window:
    """A time in which every request meets the same fault; seconds from the order."""

    begin: float
    seconds: float
    fault: str

    def __contains__(self, moment: float) -> bool:
        return self.begin <= moment < self.begin + self.seconds


def schedule(
    seed: int,
    windows: int,
    shortest: float,
    longest: float,
    pause: float,
    faults: tuple[str, ...] = FAULTS,
) -> list[Window]:
    """Windows one after another, `pause` seconds apart on average: a pure function of the seed.

    Each fault comes before one comes again.
    """
    random_of = random.Random(seed)
    moment, deck, made = 0.0, [], []
    for _ in range(windows):
        deck = deck or random_of.sample(faults, len(faults))
        moment += random_of.uniform(0.5, 1.5) * pause
        made.append(Window(moment, random_of.uniform(shortest, longest), deck.pop()))
        moment += made[-1].seconds
    return made


def kind_of(method: str, target: str) -> str:
    """What a request is about, from its path."""
    parts = urlsplit(target)
    if "list-type" in parse_qs(parts.query):
        return "list"
    if match := CHECKPOINT.search(parts.path):
        if match["file"] == "manifest.json":
            return "manifest"
        if not match["file"].startswith("lease"):
            reads = method in ("GET", "HEAD")
            return "restore" if reads else "state" if match["file"] == "state.json" else "upload"
    return next((kind for kind, path in KINDS if re.search(path, parts.path)), "other")


def step_of(method: str, target: str) -> str | None:
    """Which step of an upload in parts a request is, or whether it asks for content."""
    query = parse_qs(urlsplit(target).query, keep_blank_values=True)
    if method == "POST" and "uploads" in query:
        return "begin upload"
    if "uploadId" in query:
        return {"PUT": "upload part", "POST": "end upload"}.get(method)
    return "content" if method == "GET" and "list-type" not in query else None
