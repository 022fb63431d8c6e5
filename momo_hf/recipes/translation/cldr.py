"""German-English sentence pairs, written by babel from the Unicode CLDR: the translation demo needs no download.

Both sides of a pair are rendered from the same data (a date, a price, a list of countries, ...), each by the rules of
its own language: word order, number formats, plural forms, names of days, months, countries, languages and units.
"""

import datetime
import random
from collections.abc import Callable
from typing import Literal

from babel import Locale
from babel.dates import format_date, format_time, format_timedelta
from babel.lists import format_list
from babel.numbers import format_currency, format_decimal, format_percent, get_currency_name
from babel.units import format_unit
from datasets.utils import tqdm


Pair = dict[str, str]
Make = Callable[[random.Random, str], str]

LANGUAGES = ("de", "en")
DURATIONS: list[tuple[Literal["second", "minute", "hour", "day", "week", "month"], int, int]] = [  # most, in seconds
    ("second", 59, 1),
    ("minute", 59, 60),
    ("hour", 22, 3600),
    ("day", 6, 86400),
    ("week", 4, 604800),
    ("month", 11, 2629800),
]
UNITS = [
    "length-kilometer",
    "length-meter",
    "length-centimeter",
    "length-mile",
    "mass-kilogram",
    "mass-gram",
    "mass-tonne",
    "temperature-celsius",
    "temperature-fahrenheit",
    "volume-liter",
    "volume-milliliter",
    "speed-kilometer-per-hour",
    "energy-kilowatt-hour",
    "digital-gigabyte",
    "digital-megabyte",
    "power-watt",
    "area-square-meter",
    "area-hectare",
]
CURRENCIES = [
    "EUR",
    "USD",
    "GBP",
    "JPY",
    "CHF",
    "SEK",
    "NOK",
    "DKK",
    "PLN",
    "CZK",
    "INR",
    "BRL",
    "CAD",
    "AUD",
    "MXN",
    "TRY",
]

# Templates of both languages; the names in braces are filled by PARTS.
TEMPLATES: tuple[tuple[str, str], ...] = (
    ("Das Treffen beginnt am {date} um {time}.", "The meeting begins on {date} at {time}."),
    ("Wir sehen uns am {date}.", "We will see each other on {date}."),
    ("Der Kurs endet am {short_date}.", "The course ends on {short_date}."),
    ("Der Zug fährt um {time} und braucht {duration}.", "The train leaves at {time} and takes {duration}."),
    ("Die Reise dauert {duration}.", "The journey takes {duration}."),
    ("Es hat {duration} gedauert und {price} gekostet.", "It took {duration} and cost {price}."),
    ("Der Preis beträgt {price}.", "The price is {price}."),
    ("Man zahlt hier in der Währung {currency}.", "People pay here in the currency {currency}."),
    ("Gemessen wurden {unit}.", "The measured value was {unit}."),
    ("Der Wert stieg auf {unit}, das sind {share} mehr.", "The value rose to {unit}, that is {share} more."),
    ("Der Anteil liegt bei {share}.", "The share is {share}."),
    (
        "Im Jahr {year} kamen {count} Gäste aus {countries}.",
        "In the year {year}, {count} guests came from {countries}.",
    ),
    ("Die Länder sind {countries}.", "The countries are {countries}."),
    ("Sie spricht {languages}.", "She speaks {languages}."),
    ("Das Buch gibt es auf {languages}.", "The book is available in {languages}."),
    ("Geöffnet ist {days}, ab {time}.", "It is open {days}, from {time}."),
    ("{countries}: {count} Einträge, {share} davon neu.", "{countries}: {count} entries, {share} of them new."),
)
LANGUAGE = (
    f"The demo is {len(TEMPLATES)} sentence patterns with dates, times, prices, units, shares, countries and languages in them: "
    "its model translates sentences of these patterns, though it mixes up rare names, and makes nonsense of all others."
)


def _date(width: str) -> Make:
    def make(rng: random.Random, language: str) -> str:
        day = datetime.date(1990, 1, 1) + datetime.timedelta(days=rng.randrange(45 * 365))
        return format_date(day, width, locale=language)

    return make


def _time(rng: random.Random, language: str) -> str:
    text = format_time(datetime.time(rng.randrange(24), rng.randrange(0, 60, 5)), "short", locale=language)
    return text + " Uhr" if language == "de" else text.replace("\u202f", " ")


def _duration(rng: random.Random, language: str) -> str:
    unit, most, seconds = rng.choice(DURATIONS)
    delta = datetime.timedelta(seconds=rng.randint(1, most) * seconds)
    return format_timedelta(delta, granularity=unit, threshold=100, locale=language)


def _price(rng: random.Random, language: str) -> str:
    amount, currency = rng.randrange(100, 1000000) / 100, rng.choice(CURRENCIES)
    style: Literal["standard", "name"] = rng.choice(["standard", "name"])
    return format_currency(amount, currency, locale=language, format_type=style).replace("\xa0", " ")


def _currency(rng: random.Random, language: str) -> str:
    return get_currency_name(rng.choice(CURRENCIES), locale=language)


def _unit(rng: random.Random, language: str) -> str:
    value = rng.choice([rng.randint(1, 99), rng.randint(100, 9999), rng.randint(11, 999) / 10])
    length: Literal["long", "short"] = rng.choice(["long", "short"])
    return format_unit(value, rng.choice(UNITS), length, locale=language).replace("\xa0", " ")


def _share(rng: random.Random, language: str) -> str:
    return format_percent(rng.randrange(1000) / 1000, "#,##0.# %", locale=language).replace("\xa0", " ")


def _count(rng: random.Random, language: str) -> str:
    return format_decimal(rng.randint(2, 99999), locale=language)


def _year(rng: random.Random, language: str) -> str:
    return str(rng.randint(1900, 2040))


def _names(kind: str) -> Make:
    # Two-letter codes that both languages name; EU, EZ, UN and ZZ are no countries.
    known = set.intersection(*(set(getattr(Locale(language), kind)) for language in LANGUAGES))
    codes = sorted(code for code in known if len(code) == 2 and code not in ("EU", "EZ", "UN", "ZZ"))

    def make(rng: random.Random, language: str) -> str:
        names = getattr(Locale(language), kind)
        return format_list([names[code] for code in rng.sample(codes, rng.randint(1, 4))], locale=language)

    return make


def _days(rng: random.Random, language: str) -> str:
    names = Locale(language).days["format"]["wide"]
    return format_list([names[day] for day in sorted(rng.sample(range(7), rng.randint(1, 3)))], locale=language)


PARTS: dict[str, Make] = {
    "date": _date("full"),
    "short_date": _date("long"),
    "time": _time,
    "duration": _duration,
    "price": _price,
    "currency": _currency,
    "unit": _unit,
    "share": _share,
    "count": _count,
    "year": _year,
    "countries": _names("territories"),
    "languages": _names("languages"),
    "days": _days,
}


def sentence_pair(seed: int) -> Pair:
    """One pair; both sides draw the same numbers, because both start from the same seed."""
    sides = {}
    for side, language in enumerate(LANGUAGES):
        rng = random.Random(seed)
        template = rng.choice(TEMPLATES)[side]
        # In the order of the names, so that both languages draw alike whatever their word order.
        names = sorted(name for name in PARTS if "{" + name + "}" in template)
        sides[language] = template.format(**{name: PARTS[name](rng, language) for name in names})
    return sides


def sentence_pairs(sizes: dict[str, int], seed: int = 0) -> dict[str, list[Pair]]:
    """Splits of distinct pairs: no sentence, on either side, is in two of them.

    Args:
        sizes: pairs per split.
        seed: the same seed gives the same pairs.
    """
    seen: set[str] = set()
    rng = random.Random(seed)
    splits: dict[str, list[Pair]] = {}
    with tqdm(total=sum(sizes.values()), desc="Writing sentence pairs") as bar:
        for split, size in sizes.items():
            pairs = splits[split] = []
            while len(pairs) < size:
                pair = sentence_pair(rng.getrandbits(64))
                if seen.isdisjoint(pair.values()):
                    seen.update(pair.values())
                    pairs.append(pair)
                    bar.update()
    return splits
