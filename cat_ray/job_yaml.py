"""YAML as a job may hold it: what YAML would take without a word, such as a key that is given
twice, is refused, and whatever is wrong is told in one line."""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from cat_ray.errors import BadInput
from cat_ray.uris import check_has_no_credentials

# A job's sections are six deep, and a few hundred values.
DEEPEST, MOST_VALUES, LARGEST_BYTES = 50, 100_000, 2**20
TAG = "tag:yaml.org,2002:"
MERGE, TEXT, DATE = f"{TAG}merge", f"{TAG}str", f"{TAG}timestamp"
INTEGER, NUMBER = f"{TAG}int", f"{TAG}float"
# YAML 1.1 reads 1:30 as 90 and 010 as 8; people don't.
UNCLEAR_NUMBER = re.compile(r"[-+]?0[0-7_]+|.*:.*")
TAGS = {f"{TAG}{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}


class _Wrong(yaml.MarkedYAMLError):
    """What a job can't hold, though YAML may."""

    def __init__(self, problem: str, node: yaml.Node | yaml.Event):
        super().__init__(problem=problem, problem_mark=node.start_mark)


class _Loader(yaml.SafeLoader):
    """Reads one document, no deeper than a job may be."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise _Wrong(f"more than {DEEPEST} levels", self.peek_event())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_text(path: str) -> str:
    """A job file's text.

    Raises:
        BadInput: the file is missing, or no text.
    """
    check_has_no_credentials(path)
    try:
        with Path(path).open("rb") as file:
            content = file.read(LARGEST_BYTES + 1)
        if len(content) > LARGEST_BYTES:
            raise BadInput(
                f"{path} has more than {LARGEST_BYTES:,} bytes: that is no job, see jobs/"
            )
        return content.decode()
    except OSError as error:
        raise BadInput(f"can't read the job file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not a text file: a job is YAML, see jobs/") from error


def read_yaml(text: str, name: str) -> Any:
    """What YAML holds: text, numbers, truth values, lists, and sections whose keys are text.

    Args:
        text: the YAML.
        name: is used in messages, which don't quote the text: it may hold credentials.

    Raises:
        BadInput: it isn't YAML, or holds something else.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {}, set())
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, LookupError, OverflowError) as error:
        # The last three are PyYAML's for `!!int x`, `!!bool x` and an escape that is no character.
        # What is raised instead doesn't show them: they quote the text.
        raise BadInput(f"{name} is not valid YAML: {_told(error, text)}") from None


def _measure(
    node: yaml.Node, known: dict[int, tuple[int, int]], above: set[int]
) -> tuple[int, int]:
    """How many values there are below a node, and in how many levels, with its aliases' content.

    Args:
        node: it is checked as well.
        known: what was found of others, by id.
        above: the nodes that it lies in, by id.
    """
    if id(node) in known:
        return known[id(node)]
    if id(node) in above:
        raise _Wrong("an alias lies within what it stands for", node)
    if node.tag not in TAGS:
        if node.tag == DATE:
            raise _Wrong(f"{node.value} is a date: put it in quotes", node)
        raise _Wrong("a value has a tag that a job can't have", node)
    if node.tag in (INTEGER, NUMBER) and UNCLEAR_NUMBER.fullmatch(str(node.value)):
        raise _Wrong(f"{node.value} may mean two numbers: write it plainly, or in quotes", node)
    above.add(id(node))
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
    below = [_measure(part, known, above) for part in _parts(node)]
    above.remove(id(node))
    count = 1 + sum(size for size, _ in below)
    depth = 1 + max((levels for _, levels in below), default=0)
    if count > MOST_VALUES or depth > DEEPEST:
        raise _Wrong(f"more than {DEEPEST} levels or {MOST_VALUES:,} values, by aliases", node)
    known[id(node)] = count, depth
    return count, depth


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if key.tag == MERGE:
            continue
        line = key.start_mark.line + 1
        if key.tag != TEXT:
            told = key.value if isinstance(key, yaml.ScalarNode) else "a list or a section"
            raise _Wrong(f"the key {told} is not text: put it in quotes", key)
        if key.value in lines:
            first = lines[key.value]
            where = "" if first == line else f", before in line {first}"
            raise _Wrong(f"the key {key.value} is given twice{where}", key)
        lines[key.value] = line


def _told(error: Exception, text: str) -> str:
    """What is wrong, and where, without the lines that PyYAML quotes."""
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line} has the character #x{error.character:04x}, which YAML can't have"
    if not isinstance(error, yaml.MarkedYAMLError):
        return "a value is not what its tag says"
    what = error.problem or error.context or "it can't be read"
    if what.startswith("found undefined alias"):
        # It quotes the name, which may be a value that begins with a star.
        what = "an alias stands for nothing: put text that begins with * in quotes"
    mark = error.problem_mark or error.context_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}" if mark else what
