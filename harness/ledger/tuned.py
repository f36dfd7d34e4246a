"""What a search found, written down: all trials as JSON, the best as a piece of a study file."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from harness.ledger.files import write_bytes, write_json
from harness.ledger.tree import Tree
from harness.study.tuning import Tune

_EDGE = 0.05
"""A best value in the outer 5 % of its range (of its logarithm) lies on the edge."""


def write(
    tree: Tree, study: str, tune: Tune, groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Writes ROOT/tune/<study>.json and .yaml; returns the content of the former.

    `groups` are those of `harness.tune.Search.rows`. A group without a finished trial has no best
    and no rule in the fragment.
    """
    rows = [_summed(group, tune.maximize) for group in groups]
    budget: Counter[str] = Counter()
    for row in rows:
        budget[str(row["match"].get("init", "all"))] += row["used"]
    content = {
        "schema": 1,
        "study": study,
        "metric": tune.metric,
        "direction": "maximize" if tune.maximize else "minimize",
        "trials_per_group": tune.trials,
        "at": tune.at,
        "budget_used": dict(budget),
        "groups": rows,
    }
    content = json.loads(json.dumps(content, default=str))
    write_json(tree.tune(study, "json"), content)
    write_bytes(tree.tune(study, "yaml"), fragment(content).encode())
    return content


def _summed(group: Mapping[str, Any], maximize: bool) -> dict[str, Any]:
    trials = group["trials"]
    counts = Counter(t["outcome"] for t in trials)
    finished = [t for t in trials if t["outcome"] == "finished"]
    sign = -1 if maximize else 1
    best = min(finished, key=lambda t: (sign * t["value"], t["number"]), default=None)
    return {
        **group,
        "used": len(trials) - counts["open"],
        "counts": dict(counts),
        "best": best and {k: best[k] for k in ("number", "set", "value", "cell")},
        "at_edge": _at_edge(best["set"], group["space"]) if best else {},
    }


def _at_edge(values: Mapping[str, Any], space: Mapping[str, Any]) -> dict[str, str]:
    """Fields whose value lies at an end of its range: field -> low or high."""
    found = {}
    for key, value in values.items():
        low, high = space[key]["low"], space[key]["high"]
        if low is None:
            continue
        if space[key]["log"]:
            low, high, value = math.log(low), math.log(high), math.log(value)
        part = (value - low) / (high - low)
        if part < _EDGE or part > 1 - _EDGE:
            found[key] = "low" if part < _EDGE else "high"
    return found


def fragment(content: Mapping[str, Any]) -> str:
    """The best values as `overrides` of a study file."""
    at = ", ".join(f"{k} {v}" for k, v in content["at"].items())
    lines = [
        f"# Best of {content['trials_per_group']} trials per group by {content['metric']},"
        f" study {content['study']}{', at ' + at if at else ''}.",
        "# Paste into a study file, or add the rules to its own `overrides`.",
        "overrides:",
    ]
    rules = [_rule(g) for g in content["groups"] if g["best"]]
    if not rules:
        lines[-1] = "overrides: []"
    return "\n".join([*lines, *rules]) + "\n"


def _rule(group: Mapping[str, Any]) -> str:
    rule = {"match": group["match"], "set": group["best"]["set"]}
    flow = yaml.safe_dump(rule, default_flow_style=True, sort_keys=False, width=10_000).strip()
    edges = [f"{k} at the {end} end of its range" for k, end in group["at_edge"].items()]
    note = f"  # {'; '.join(edges)}" if edges else ""
    return f"- {flow}{note}"
