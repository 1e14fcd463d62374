"""Tables that are Markdown and line up as text."""

from experiments.table import markdown


def test_columns_line_up():
    assert markdown(("a", "long"), [("wide one", "b"), ("c", "d")]) == (
        "| a        | long |\n|----------|------|\n| wide one | b    |\n| c        | d    |"
    )


def test_a_header_alone_is_a_table():
    assert markdown(("a",), []) == "| a |\n|---|"
