"""Eight word problems of our own making, each answered by three teachers; one teacher errs now and then."""

from __future__ import annotations

_PROBLEMS = [
    ("A baker fills 6 trays with 8 rolls each and sells 29 of the rolls. How many are left?", "6 * 8", 48, "- 29", 19),
    ("A hall has 12 rows of 15 chairs. 34 chairs are broken. How many can be used?", "12 * 15", 180, "- 34", 146),
    ("Mara reads 14 pages per day for 9 days, then 11 more. How many pages is that?", "14 * 9", 126, "+ 11", 137),
    ("A crate holds 24 bottles. From 5 full crates 37 bottles are drunk. How many remain?", "24 * 5", 120, "- 37", 83),
    ("Ivo saves 7 coins per week for 13 weeks and finds 9 more. How many has he?", "7 * 13", 91, "+ 9", 100),
    ("A bus makes 8 trips with 45 people each; 12 people walk. How many people set out?", "8 * 45", 360, "+ 12", 372),
    ("A field has 16 rows of 11 trees. A storm fells 28. How many still stand?", "16 * 11", 176, "- 28", 148),
    ("Nine boxes hold 32 nails each, and 50 nails are used. How many are unused?", "9 * 32", 288, "- 50", 238),
]


def teacher_rows() -> list[dict]:
    """Rows as `--data-path` takes them, with the marks that `--trace-filter correct=true` looks at."""
    rows = []
    for number, (question, product, first, rest, answer) in enumerate(_PROBLEMS):
        slip = answer + 10 * (number % 3 == 0)
        rows.append(
            {
                "id": f"own-{number}",
                "question": question,
                "answer": str(answer),
                "traces": [
                    {
                        "source": "steps",
                        "text": f"1. {product} = {first}\n2. {first} {rest} = {answer}\nA: {answer}",
                        "correct": True,
                    },
                    {
                        "source": "sentences",
                        "text": f"At first {product} = {first}. Then {first} {rest} = {answer}.\nA: {answer}",
                        "correct": True,
                    },
                    {
                        "source": "one line",
                        "text": f"{product} {rest} = {slip}\nA: {slip}",
                        "correct": slip == answer,
                    },
                ],
            }
        )
    return rows
