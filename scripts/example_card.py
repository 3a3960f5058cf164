"""The card of a finished run as a page of the documentation, with its figures beside it.

hfft train recipes/quickstart.yaml widget=2
python scripts/example_card.py runs/quickstart docs/example_card.md
"""

import argparse
import re
import shutil
from pathlib import Path

from huggingface_hub import ModelCard

from hfft.report.card import REPOSITORY
from hfft.runs.facts import read_facts
from hfft.runs.record import FIGURES
from hfft.system.markdown import fence

_HEAD = """\
<!-- Made by scripts/example_card.py from a run; not edited by hand. -->

This is the card that hfft writes for a run of the quick start, as `model/README.md`; the command had `widget=2`, too.
`{repository}` stands for the model's place; a published card has its Hub id there. The machine was busy with other
work: how long the quick start takes alone is in the [README](../README.md). At the card's head, for the Hub:

{metadata}
"""


def main() -> None:
    """Read a run and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("page", type=Path, help="Markdown file to write; figures go into a folder of its name")
    arguments = parser.parse_args()
    model = read_facts(arguments.run).result
    card = ModelCard.load(model / "README.md")
    folder = arguments.page.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in re.findall(rf"\]\({FIGURES}/([\w.]+)\)", card.text):
        shutil.copyfile(model / FIGURES / name, folder / name)
    text = card.text.replace(f"]({FIGURES}/", f"]({folder.name}/").strip()
    head = _HEAD.format(repository=REPOSITORY, metadata=fence(card.data.to_yaml(), "yaml"))
    arguments.page.write_text(f"{head}\n---\n\n{text}\n", encoding="utf-8")
    print(f"wrote {arguments.page} and {len(list(folder.iterdir()))} figures")


if __name__ == "__main__":
    main()
