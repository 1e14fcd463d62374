"""The published figures are recounted, and where they disagree is said with numbers."""

from experiments import published


def test_the_published_counts_are_recounted():
    table = {row[0]: row for row in published.recounted()}
    assert list(table) == ["lora", "qlora", "high-rank", "query-only"]
    assert table["high-rank"][1:] == ("0.34 %", "1,179,648 (1.72 %)", "1,771,778 (2.58 %)", "68,726,788")
    assert table["lora"][2:4] == ("589,824 (0.87 %)", "1,181,954 (1.73 %)")
    assert table["query-only"][2] == "147,456 (0.22 %)"


def test_where_the_published_figures_disagree_is_said_with_numbers():
    text = " ".join(published.disagreements())
    for number in ("1,771,778 of 68,726,788", "2.58 %", "0.34 %", "4.51 MB", "4.51 MiB", "380 MB", "12.3 %", "141 MiB"):
        assert number in text
