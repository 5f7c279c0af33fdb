"""Names of currencies: the source writes "Algerian dinars (DZD) per US dollar -"."""

from __future__ import annotations

import re

_COINS = {
    "emalangeni": "lilangeni", "maloti": "loti", "leva": "lev", "lei": "leu", "leke": "lek", "koruny": "koruna",
    "kroner": "krone", "kronur": "krona", "kronor": "krona", "zlotych": "zloty", "meticais": "metical",
    "quetzales": "quetzal", "colones": "colon", "reals": "real", "markas": "mark",
}  # fmt: skip
_CURRENCIES = (
    ("Communaut", "West African CFA franc"),
    ("Coop", "Central African CFA franc"),
    ("Comptoirs", "CFP franc"),
    ("konvertibilna", "convertible mark"),
)


def currency(text: str) -> tuple[str, str] | None:
    """Singular name and code ("" if none) of a currency: "Algerian dinars (DZD) per US dollar -"."""
    match = re.match(r"(.+?)(?: \(([A-Z]{2,3})(?:/[A-Z]+)?\))? per US dollar", text)
    if match is None:
        return ("United States dollar", "USD") if re.match(r"the US dollar (?:is used|became)", text) else None
    name = match[1].split("/")[0].split(" or ")[0].strip()
    for start, proper in _CURRENCIES:
        if name.startswith(start):
            return proper, match[2] or ""
    head, _, last = name.rpartition(" ")
    last = _COINS.get(last, last[:-1] if last.endswith("s") else last)
    return f"{head} {last}".strip(), match[2] or ""
