"""The whole census, or of some model types, as a Markdown table and counts.

python -m tests.helpers.census [--attn stablemask|sm_flex] [type ...]
"""

import argparse
import sys

import torch

from tests.helpers.census.configs import model_types
from tests.helpers.census.judge import judge_type
from tests.helpers.census.report import lines, markdown


def main(names: list[str], attention: str) -> None:
    torch.set_num_threads(1)
    census = {}
    for name in names or model_types():
        print(f"{name} ...", file=sys.stderr)
        census[name] = judge_type(name, attention)
    print(markdown(census), *lines(census), sep="\n\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*")
    parser.add_argument("--attn", choices=("stablemask", "sm_flex"), default="stablemask")
    given = parser.parse_args()
    main(given.types, given.attn)
