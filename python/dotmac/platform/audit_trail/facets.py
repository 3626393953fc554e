"""How many events have each value of a field: what a viewer shows beside its list, to narrow it down."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from dotmac.platform.audit_trail.filters import Filters, Parameters
from dotmac.platform.audit_trail.histogram import GROUPS
from dotmac.platform.audit_trail.rollup import plan
from dotmac.platform.errors import InvalidArgument

if TYPE_CHECKING:
    import asyncpg

__all__ = ["DEFAULT_FIELDS", "Facet", "FacetValue", "check_fields", "facet_sql", "facets_of"]

DEFAULT_FIELDS = ("category", "level", "outcome", "action", "user_id", "resource_type")
# The filter that narrows each field, where it has another name.
_OWN = {"category": "categories", "level": "levels", "outcome": "outcomes", "action": "actions"} | {
    "ip_address": "networks"
}
_UTC = ZoneInfo("UTC")
_READ = {name: read.partition(" AS ")[0] for name, read in GROUPS.items()} | {
    "tenant_id": "nullif(tenant_id, '')"
}


@dataclass(frozen=True, slots=True)
class FacetValue:
    """One value and how many events have it; None for those that have none."""

    value: str | None
    count: int


@dataclass(frozen=True, slots=True)
class Facet:
    """The commonest values of one field.

    Attributes:
        field: its name.
        values: the commonest first; those alike in number by name.
        distinct: how many values there are.
        other: events whose value is not among `values`.
    """

    field: str
    values: tuple[FacetValue, ...]
    distinct: int
    other: int

    def to_dict(self) -> dict[str, Any]:
        """The facet as JSON types."""
        values = [{"value": one.value, "count": one.count} for one in self.values]
        return {"field": self.field, "values": values, "distinct": self.distinct, "other": self.other}


def check_fields(fields: object) -> tuple[str, ...]:
    """The fields that a caller named. Raises: InvalidArgument."""
    names = (
        (fields,) if isinstance(fields, str) else tuple(fields) if isinstance(fields, list | tuple) else ()
    )
    if not names or any(name not in GROUPS for name in names):
        raise InvalidArgument("fields", fields, f"give one or several of {', '.join(GROUPS)}")
    return tuple(dict.fromkeys(names))


def facet_sql(filters: Filters, fields: tuple[str, ...], limit: int) -> tuple[str, list[Any]]:
    """One statement for all facets, so that they agree with one another.

    Each field is counted under all filters but its own: the other values stay in sight, to be chosen too. Not
    so the tenant: that filter says what a caller may see.
    Fields under the same filters share one pass over the events.
    """
    values = Parameters()
    selects: list[str] = []
    passes: dict[Filters, list[str]] = {}
    for name in fields:
        narrowed = filters if name == "tenant_id" else replace(filters, **{_OWN.get(name, name): None})
        counting = plan(narrowed, (name,), None, _UTC)
        if counting.by_rollup:
            parts = " UNION ALL ".join(counting.sources(values.add, (name,), None, _UTC))
            selects.append(
                f"SELECT '{name}' AS field, {name} AS value, sum(n) AS n "  # noqa: S608 (names and conditions of ours)
                f"FROM ({parts}) AS part GROUP BY {name}"
            )
        else:
            passes.setdefault(narrowed, []).append(name)
    selects += [_pass(narrowed, names, values) for narrowed, names in passes.items()]
    most = values.add(limit)
    sql = (
        "SELECT field, value, n::bigint, total::bigint, kinds FROM ("  # noqa: S608 (names and conditions of ours)
        "SELECT *, sum(n) OVER same AS total, count(*) OVER same AS kinds, row_number() OVER ("
        'PARTITION BY field ORDER BY n DESC, value COLLATE "C" NULLS LAST) AS place '
        f"FROM ({' UNION ALL '.join(selects)}) AS counted WHERE n <> 0 "
        f"WINDOW same AS (PARTITION BY field)) AS ranked WHERE place <= {most} ORDER BY field, place"
    )
    return sql, values


def _pass(filters: Filters, names: list[str], values: Parameters) -> str:
    """Counts several fields in one pass over the events."""
    columns = [f"field_{place}" for place in range(len(names))]
    read = ", ".join(f"{_READ[name]} AS {column}" for name, column in zip(names, columns, strict=True))
    parts = list(filters.parts(values.add))
    where = f" WHERE {' AND '.join(parts)}" if parts else ""
    # grouping() has a bit for each column, the last one's lowest, which is 0 where the row is of that column.
    bits = {1 << place: number for number, place in enumerate(reversed(range(len(names))))}
    every = (1 << len(names)) - 1
    whose = f"grouping({', '.join(columns)})"
    field = " ".join(f"WHEN {every - bit} THEN '{names[number]}'" for bit, number in bits.items())
    value = " ".join(f"WHEN {every - bit} THEN {columns[number]}" for bit, number in bits.items())
    return (
        f"SELECT CASE {whose} {field} END AS field, CASE {whose} {value} END AS value, count(*) AS n "  # noqa: S608 (names and conditions of ours)
        f"FROM (SELECT {read} FROM audit_events{where}) AS read "
        f"GROUP BY GROUPING SETS ({', '.join(f'({column})' for column in columns)})"
    )


def facets_of(rows: list[asyncpg.Record], fields: tuple[str, ...]) -> dict[str, Facet]:
    """The facets of what the statement found, in the order of `fields`."""
    found: dict[str, list[asyncpg.Record]] = {name: [] for name in fields}
    for row in rows:
        found[row["field"]].append(row)
    made = {}
    for name, mine in found.items():
        shown = tuple(FacetValue(row["value"], row["n"]) for row in mine)
        total, kinds = (mine[0]["total"], mine[0]["kinds"]) if mine else (0, 0)
        made[name] = Facet(name, shown, kinds, total - sum(one.count for one in shown))
    return made
