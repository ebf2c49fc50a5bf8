"""A report as a table of a terminal, one line for each layer."""

from typing import Any

from sm_flex_transformers.look.report import layer_means, sentences
from sm_flex_transformers.look.run import ALL, KEPT, WINDOW

BARS = 20


def table(report: dict[str, Any]) -> str:
    tokens, kinds = report["tokens"], report["kinds"]
    first, real = (layer_means(report[name]["by_head"]) for name in ("first", "real"))
    heads, plural = sum(report["heads"]), "s" if tokens["rows"] > 1 else ""
    columns = ("first", 6), ("max", 6), ("punct.", 6), ("other", 6), ("real", 6), ("any col.", 8), ("norm 0", 9), ("norm any", 9)
    lines = [
        f"{report['model']}: {len(report['layers'])} attention layers, {heads} heads",
        f"{tokens['rows']} row{plural} of {tokens['length']} tokens of {report['text']}",
        "",
        " ".join(["layer", *(f"{name:>{width}}" for name, width in columns)]),
    ]
    for i, name in enumerate(report["layers"]):
        by_kind = [sum(head[kind] for head in kinds["by_head"][i]) / report["heads"][i] for kind in (1, 2)]
        norms = _norms(report, i)
        lines.append(
            f"{name:>5} {first[i]:6.3f} {max(report['first']['by_head'][i]):6.3f} {by_kind[0]:6.3f} {by_kind[1]:6.3f} "
            f"{real[i]:6.3f} {report['other_column']['by_layer'][i]:8.3f} {norms} {'#' * round(BARS * first[i])}".rstrip()
        )
    lines += [
        "",
        f"first: share of the attention to the first token, of rows from {tokens['far']} on, mean of the heads; max: of the head "
        "that gives most.",
        "punct., other: shares to the other tokens; real: to real tokens, the rest is the mass of StableMask or of sinks.",
        f"any col.: the largest share of any other token, of rows at least {tokens['far']} behind it.",
        "norm 0, norm any: of the first token's hidden state after the layer, and the largest of any other's.",
        "",
        f"{'perplexity':24} {'all tokens':>11} {'from ' + str(report['perplexity'][ALL]['late_from']) + ' on':>13}",
    ]
    names = {
        ALL: "all keys", WINDOW: f"window of {tokens['window']}", KEPT: f"window, first {tokens['kept']} kept",
    }  # fmt: skip
    for key, name in names.items():
        x = report["perplexity"][key]
        lines.append(f"{name:24} {_figure(x['perplexity']):>11} {_figure(x['late_perplexity']):>13}")
    return "\n".join([*lines, "", *sentences(report)])


def _norms(report: dict[str, Any], i: int) -> str:
    """Of an attention layer that is one of the model's layers."""
    name, norms = report["layers"][i], report["norms"]
    after = int(name) + 1
    if after >= len(norms["first"]):
        return f"{'-':>9} {'-':>9}"
    return f"{norms['first'][after]:9.1f} {norms['largest_other'][after]:9.1f}"


def _figure(x: float | None) -> str:
    return "-" if x is None else f"{x:,.2f}"
