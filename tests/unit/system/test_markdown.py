import pytest
from markdown_it import MarkdownIt

from hfft.system.markdown import escape, fence, folded, table

NASTY = (
    "plain",
    "a|b",
    "`code`",
    "<script>alert(1)</script>",
    "# title",
    "*bold* _it_ __b__",
    "snake_case_name",
    "Apple___Cedar_rust",
    "[link](https://a.b)",
    "![x](y)",
    "R&D &lt;",
    "back\\slash|",
    "~~gone~~ $x^2$ {y}",
    "猫 and Käfer",
    "1. first",
    "- item",
)


def cells(markdown):
    """What a reader sees in the cells of a table, by row."""
    found = []
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(markdown):
        if token.type == "tr_open":
            found.append([])
        elif token.type == "inline":
            assert all(part.type in ("text", "text_special") for part in token.children or ()), token.content
            found[-1].append("".join(part.content for part in token.children or ()))
    return found


def test_a_table_shows_any_text_as_it_is():
    made = table(["class", "n"], [[escape(name), str(number)] for number, name in enumerate(NASTY)])
    assert cells(made) == [["class", "n"], *([name, str(number)] for number, name in enumerate(NASTY))]


def test_a_text_of_several_lines_becomes_one():
    assert escape(" two\nlines\t and  more ") == "two lines and more"
    assert escape("a\x1b\u202eb") == r"a\\x1b\\u202eb"


def test_words_with_underscores_stay_readable():
    assert escape("snake_case_name") == "snake_case_name"
    assert escape("_x") == r"\_x"


def test_numbers_are_aligned_to_the_right():
    assert table(["a", "b", "c"], [["x", "y", "1"]], left=2).splitlines()[1] == "| --- | --- | ---: |"


@pytest.mark.parametrize("text", ["a: 1", "a: '```'\nb: 2", "````\n`"])
def test_a_fence_holds_backticks(text):
    (token,) = MarkdownIt().parse(fence(text, "yaml"))
    assert (token.type, token.info, token.content) == ("fence", "yaml", f"{text}\n")


def test_a_folded_table_is_a_table():
    types = [
        token.type for token in MarkdownIt("gfm-like", {"linkify": False}).parse(folded("9", table(["a"], [["b"]])))
    ]
    assert types[0] == types[-1] == "html_block"
    assert "table_open" in types
