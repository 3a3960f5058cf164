from hfft.cli.printing import interval, print_metrics


def test_too_few_images_are_said_in_the_place_of_an_interval(capsys):
    known = {"value": 0.5, "low": 0.25, "high": 0.75}
    unknown = {"value": 0.5, "low": None, "high": None}
    print_metrics({"test": {"accuracy": known, "log_loss": unknown}})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["test", "accuracy", "0.5000", "0.2500", "to", "0.7500"]
    assert lines[2].split() == ["test", "log", "loss", "0.5000", "too", "few", "images"]
    assert interval(unknown, "+") == "+0.5000 (too few images)"
