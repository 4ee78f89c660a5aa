"""The YAML header of a model card: our fields go in, the user's stay, byte for byte where they are not touched.

A field is ours while it holds what we last wrote: the card carries a record, digests of the values written. Anything
else in the header is the user's, and is neither changed nor removed.
"""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

Record = dict[str, Any]
LICENSE_FIELDS = ("license", "license_name", "license_link")
FIELDS = ("base_model", "library_name", "pipeline_tag", "datasets", *LICENSE_FIELDS)
"""Replaced as a whole; `tags` are united, `model-index` is merged measurement by measurement."""


def split_card(content: str) -> tuple[str | None, str]:
    """The YAML text of a card, None where it has no header, and the text below it.

    Raises:
        ValueError: The header is not closed, is no YAML, or none that the Hub's library reads as a card's.
    """
    match = REGEX_YAML_BLOCK.search(content)
    if match is None:
        if content.lstrip().startswith("---"):
            raise ValueError("it opens with --- and no second line --- closes it")
        return None, content
    try:
        ModelCard(content)
    except (yaml.YAMLError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    return match.group(2), content[match.end() :]


def merge_header(text: str, ours: dict[str, Any], record: Record) -> tuple[str, Record]:
    """Put our fields into a YAML text.

    Args:
        text: The header as it is, without its fences.
        ours: Fields and values; one of ours that is missing here is removed.
        record: What the last call returned, {} on the first.

    Returns:
        The new text, and the record of what in it is ours.
    """
    existing: dict[str, Any] = yaml.safe_load(text) or {}
    merged = dict(existing)
    written: Record = {}

    def is_free(key: str) -> bool:
        return existing.get(key) is None or record.get(key) == _digest(existing[key])

    # `license: other` and its name and link belong together: ours never complete the user's.
    kept = set() if all(is_free(key) for key in LICENSE_FIELDS) else set(LICENSE_FIELDS)
    for key in FIELDS:
        value = None if key in kept else ours.get(key)
        if not is_free(key):
            continue
        if value is not None:
            merged[key], written[key] = value, _digest(value)
        elif existing.get(key) is not None:
            del merged[key]
    tags = existing.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    merged["tags"] = tags + [tag for tag in ours.get("tags", []) if tag not in tags]
    index, results = _merge_results(existing.get("model-index"), ours.get("model-index"), record)
    if index:
        merged["model-index"] = index
        written["model-index"] = results
    else:
        merged.pop("model-index", None)
    return _edit(text, existing, merged), written


def _merge_results(existing: Any, ours: Any, record: Record) -> tuple[list[dict[str, Any]], list[str]]:
    """Our earlier measurements out, the new ones in; one that the user states otherwise stays as stated."""
    index = copy.deepcopy(existing or [])
    earlier = record.get("model-index", [])
    for model in index:
        for group in model["results"]:
            others = [m for m in group["metrics"] if _digest([*_place(group), m]) not in earlier]
            emptied = group["metrics"] and not others  # by us: what the user left empty stays
            group["metrics"] = None if emptied else others
        groups = [group for group in model["results"] if group["metrics"] is not None]
        model["results"] = None if model["results"] and not groups else groups
    index = [model for model in index if model["results"] is not None]
    written = []
    for group in (group for model in ours or [] for group in model["results"]):
        if not index:
            index.append({"name": ours[0]["name"], "results": []})
        same = [other for model in index for other in model["results"] if _place(other) == _place(group)]
        target = same[0] if same else {**group, "metrics": []}
        stated = [_description(metric) for other in same for metric in other["metrics"]]
        new = [metric for metric in group["metrics"] if _description(metric) not in stated]
        written += [_digest([*_place(group), metric]) for metric in new]
        target["metrics"] = target["metrics"] + new
        if new and not same:
            index[0]["results"].append(target)
    return index, written


def _place(group: dict[str, Any]) -> tuple[Any, Any]:
    return group["task"], group["dataset"]


def _description(metric: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metric.items() if key != "value"}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _edit(text: str, existing: dict[str, Any], merged: dict[str, Any]) -> str:
    """`text` saying `merged`: only the lines of changed keys are written anew, so comments and quotes survive."""
    changed = [key for key in {**existing, **merged} if existing.get(key) != merged.get(key)]
    if not changed:
        return text
    lines = text.splitlines()
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    starts = {key.value: key.start_mark.line for key, _ in node.value} if node else {}
    for key in sorted(changed, key=lambda key: starts.get(key, -1), reverse=True):  # from below: line numbers hold
        new = _dump({key: merged[key]}).splitlines() if key in merged else []
        if key not in starts:
            continue
        end = min((line for line in starts.values() if line > starts[key]), default=len(lines))
        while end > starts[key] + 1 and (not lines[end - 1].strip() or lines[end - 1].startswith("#")):
            end -= 1  # a comment above the next key
        lines[starts[key] : end] = new
    for key in changed:
        if key not in starts:
            lines += _dump({key: merged[key]}).splitlines()
    edited = "\n".join(lines)
    try:
        if yaml.safe_load(edited) == merged:
            return edited
    except yaml.YAMLError:
        pass
    return _dump(merged)  # one line {a: b}, or an anchor used elsewhere: lines cannot be exchanged there


def _dump(values: dict[str, Any]) -> str:
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True)).rstrip("\n")
