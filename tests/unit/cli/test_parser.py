"""Words of a verb may stand before, between and after its options; an option that isn't there is refused."""

import itertools

import pytest

from hfft.cli import main
from hfft.cli.parser import build_parser


@pytest.fixture(scope="module")
def parsed():
    return build_parser().parse_args


def orders(words, options):
    """Every way to put options, each with its value, between words whose order stays."""
    for places in itertools.combinations_with_replacement(range(len(words) + 1), len(options)):
        line = [[word] for word in words]
        for option, place in sorted(zip(options, places, strict=True), key=lambda pair: -pair[1]):
            line.insert(place, option)
        yield [word for part in line for word in part]


@pytest.mark.parametrize(
    ("verb", "words", "options", "kept"),
    [
        ("train", ["r.yaml", "name=a", "seed=1"], [["--overwrite"]], ("overrides", {"overwrite": True})),
        (
            "plan",
            ["r.yaml", "name=a", "seed=1"],
            [["--processes", "12"], ["--json"]],
            ("overrides", {"processes": 12}),
        ),
        ("check-data", ["photos", "a=1", "b=2"], [["--max-shown", "0"], ["--json"]], ("overrides", {"max_shown": 0})),
        ("sweep", ["r.yaml", "seed=0,1", "optim=sgd"], [["--html", "f.html"]], ("values", {})),
        ("predict", ["model", "a.png", "b.png"], [["--top", "3"], ["--format", "csv"]], ("images", {"top": 3})),
        ("compare", ["one", "two", "three"], [["--split", "test"]], ("runs", {"split": "test"})),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_words_stand_anywhere(verb, words, options, kept, parsed):
    name, values = kept
    for line in orders(words, options):
        found = vars(parsed([verb, *line]))
        assert found[name] == (words if verb == "compare" else words[1:]), line
        assert {key: found[key] for key in values} == values, line


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train r.yaml --overwite seed=1", "unknown option --overwite; did you mean --overwrite?"),
        ("plan r.yaml --procesess 12", "unknown option --procesess; did you mean --processes?"),
        ("plan r.yaml seed=1 --zzz 3", "unknown option --zzz; allowed: --checkpoint, --minutes, --processes, --json"),
        ("train r.yaml --name=a", "unknown option --name; an override has no dashes: name=a"),
        ("train r.yaml --overwrite name", "found 'name'; allowed: key=value"),
        ("report run --html again", "unknown option --html; allowed: --trust-remote-code"),
        ("report run again", "found 'again'; `hfft report` takes no more words"),
        ("train --overwrite", "the following arguments are required: recipe"),
    ],
)
def test_what_is_not_known_is_refused(line, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == f"hfft {line.split()[0]}: error: {said}"
    assert error.startswith(f"usage: hfft {line.split()[0]} ")
