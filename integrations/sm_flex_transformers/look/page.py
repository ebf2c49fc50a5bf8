"""A report as one HTML page that needs nothing else: page.html with the figures in it.

Dimension letters: H heads of a layer, C cells, P groups of positions.
"""

import base64
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sm_flex_transformers.look.measure import Looked
from sm_flex_transformers.look.report import sentences

LARGEST = 5_000_000  # bytes


def write(report: dict[str, Any], looked: Looked, path: Path) -> None:
    """Pictures are one byte a cell, of the square root of the share, so that small shares are seen too; curves one a group."""
    cells = [layer.mean("cells") for layer in looked.layers]
    curves = [layer.mean("first") for layer in looked.layers]
    first, real = ({key: x for key, x in report[name].items() if key != "by_position"} for name in ("first", "real"))
    data = {
        **report, "first": first, "real": real, "sentences": sentences(report),
        "cells": {"size": cells[0].shape[-1], "bytes": _bytes([x.sqrt() for x in cells])}, "curves": _bytes(curves),
    }  # fmt: skip
    # "</" would end the script, whatever stands in a model's name or a token.
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("</", "<\\/").replace("<!--", "<\\!--")
    template = (files("sm_flex_transformers.look") / "page.html").read_text(encoding="utf-8")
    page = template.replace("/*DATA*/null", text)
    assert len(page) < LARGEST, "cells_for() keeps the page below its limit"
    path.write_text(page, encoding="utf-8")


def _bytes(layers: list[Tensor]) -> str:
    """Numbers from 0 to 1 as one byte each, of all layers one after another, in base64."""
    flat = torch.cat([x.flatten() for x in layers])
    return base64.b64encode((flat.clamp(0, 1) * 255).round().to(torch.uint8).numpy().tobytes()).decode()
