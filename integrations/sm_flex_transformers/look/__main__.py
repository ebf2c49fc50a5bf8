"""python -m sm_flex_transformers.look"""

from sm_flex_transformers.look.cli import main

main()
