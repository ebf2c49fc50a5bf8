# Run by exec() in the globals of a script: config files, and --key=value for keys that the script already has.
import ast
import sys
from pathlib import Path

for word in sys.argv[1:]:
    if "=" not in word:
        if word.startswith("--"):
            raise AssertionError(word)
        exec(Path(word).read_text())
        continue
    name, _, text = word.removeprefix("--").partition("=")
    if name not in globals():
        raise ValueError(f"Unknown config key: {name}")
    try:
        parsed = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        parsed = text
    if type(parsed) is not type(globals()[name]):
        raise AssertionError(f"{name} is a {type(globals()[name]).__name__}")
    globals()[name] = parsed
